// tensor.h: shaped, typed device memory, and the one device that a rank uses, with its streams.
//
// legend    B sequences of T tokens (the context), R = B*T rows; C the width, H heads, D = C/H; V
//           the vocabulary
// idea      a Tensor owns its memory through a counted reference: copies and views share it, the
//           last one returns it to the stream-ordered pool. Kernels take raw pointers. All tensors
//           are dense and row-major.
// cost      every byte is counted as requested, by category, when it is allocated: what
//           `--device-memory` caps
// not here  strides, broadcasting, operator overloading: each op says its shapes
// test      tests/test_tensor.cpp
#pragma once
#include <cublas_v2.h>
#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include <array>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "support/check.h"
#include "support/recorder.h"

// ---- types

enum class Dtype { f32, bf16, f64, i32 };
int64_t size_of(Dtype dtype);      // bytes of one element
const char* name_of(Dtype dtype);  // "f32"
// The dtype of gradients, master weights and moments beside values of `compute`: f64 for f64, else
// f32.
inline Dtype master_dtype(Dtype compute) { return compute == Dtype::f64 ? Dtype::f64 : Dtype::f32; }

template <class T> struct DtypeOf;
template <> struct DtypeOf<float> { static constexpr Dtype value = Dtype::f32; };
template <> struct DtypeOf<double> { static constexpr Dtype value = Dtype::f64; };
template <> struct DtypeOf<__nv_bfloat16> { static constexpr Dtype value = Dtype::bf16; };
template <> struct DtypeOf<int> { static constexpr Dtype value = Dtype::i32; };

using Shape = std::vector<int64_t>;
int64_t elements(const Shape& shape);
inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
inline int64_t round_up(int64_t n, int64_t multiple) { return ceil_div(n, multiple) * multiple; }
std::string to_string(const Shape& shape);  // "(2, 3)"

// ---- what a rank owns of something that is split

// [begin, end)
struct Range {
  int64_t begin = 0, end = 0;
  int64_t size() const { return end - begin; }
};
// A parameter, seen as (outer, split, inner), of which a rank has [begin, end) of the middle dim.
// (4,3,8) split in two by its last dim: outer 12, split 8, inner 1, and rank 1 has [4, 8).
struct Slice {
  int64_t outer = 1, split = 1, inner = 1, begin = 0, end = 1;
};

// ---- memory

enum class Memory { parameters, gradients, optimizer, activations, gather, workspace, data, cache };
constexpr int kMemoryCategories = int(Memory::cache) + 1;
const char* name_of(Memory category);

struct MemoryUse {  // bytes as requested
  // at_peak: what each held when the total was highest
  std::array<int64_t, kMemoryCategories> now{}, peak{}, at_peak{};
  int64_t total = 0, total_peak = 0;
};

struct Buffer {  // a block of device memory; allocated and freed in the order of the compute stream
  Buffer(int64_t bytes, Memory category);
  ~Buffer();
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  void* data = nullptr;
  int64_t bytes = 0;
  Memory category;
  // for --trace: the one that an activation belongs to; -1: none
  const int microbatch = category == Memory::activations ? recorder.microbatch : -1;
};

// ---- tensors

class Tensor {
 public:
  Tensor() = default;
  Tensor(Shape shape, Dtype dtype, Memory category);  // uninitialised
  bool empty() const { return !buffer_; }
  const Shape& shape() const { return shape_; }
  int64_t dim(int i) const { return shape_.at(i); }
  int64_t numel() const { return empty() ? 0 : elements(shape_); }
  int64_t bytes() const { return numel() * size_of(dtype_); }
  Dtype dtype() const { return dtype_; }
  void* raw() const { return empty() ? nullptr : data_; }  // of an empty one null, as data()
  template <class T> T* data() const {
    ASSERT(empty() || dtype_ == DtypeOf<T>::value, "asked a tensor of ", name_of(dtype_), " for ",
           name_of(DtypeOf<T>::value));
    return static_cast<T*>(raw());
  }
  // of consecutive elements, from this one on; shares the memory
  Tensor view(int64_t first_element, Shape shape) const;
  // somebody else may read it: do not write in place
  bool shared() const { return buffer_.use_count() > 1; }

 private:
  std::shared_ptr<Buffer> buffer_;
  void* data_ = nullptr;
  Shape shape_;
  Dtype dtype_ = Dtype::f32;
};

// ---- streams

// Which of the recorder's two queues (--trace) a stream is: all but the compute stream communicate.
Recorder::Queue queue_of(cudaStream_t stream);

class Event {  // a place in a stream that another stream can wait for
 public:
  explicit Event(bool timed = false) {
    CUDA_CHECK(
        cudaEventCreateWithFlags(&event_, timed ? cudaEventDefault : cudaEventDisableTiming));
  }
  ~Event() { cudaEventDestroy(event_); }
  Event(const Event&) = delete;
  Event& operator=(const Event&) = delete;
  void record(cudaStream_t stream) {
    CUDA_CHECK(cudaEventRecord(event_, stream));
    if (recorder.on) behind_ = recorder.last(queue_of(stream));
  }
  void make_wait(cudaStream_t stream) const {
    CUDA_CHECK(cudaStreamWaitEvent(stream, event_, 0));
    if (recorder.on) recorder.wait(queue_of(stream), behind_);
  }
  void synchronize() const { CUDA_CHECK(cudaEventSynchronize(event_)); }
  bool reached() const {
    const cudaError_t status = cudaEventQuery(event_);
    if (status == cudaErrorNotReady) cudaGetLastError();  // or the next launch would report it
    return status == cudaSuccess;
  }
  double seconds_since(const Event& earlier) const {  // both timed, and reached
    float ms = 0;
    CUDA_CHECK(cudaEventElapsedTime(&ms, earlier.event_, event_));
    return ms * 1e-3;
  }

 private:
  cudaEvent_t event_ = nullptr;
  int behind_ = -1;  // which work of the stream, if it is recorded
};
struct TimedWork {
  Event begin{true}, end{true};
  double seconds() const { return end.seconds_since(begin); }
};
void make_wait(cudaStream_t waiter, cudaStream_t awaited);  // for all that is in `awaited` now
// What is issued from here on to the one stream waits for what was issued to the other before.
void communicate_after_compute();
void compute_after_communication();

// ---- the device

// The device of this rank. On each of its two streams work runs in the order in which it is issued.
struct Device {
  std::string name;
  bool is_gpu = false;
  int64_t block_memory = 0;  // bytes of shared memory that a block may ask for
  cudaStream_t compute = nullptr, communication = nullptr;
  // for make_wait. One serves all waits: each is for what was recorded when it was issued, whatever
  // is recorded later.
  Event mark;
  cublasHandle_t blas = nullptr;
  cudaMemPool_t pool = nullptr;
  int64_t memory_limit = 0;  // bytes; 0: no cap of our own
  MemoryUse memory;
};
int device_count();
// Opens the device on first use. `open_device` chooses which and caps its memory; call it once,
// before anything else.
Device& device();
Device& open_device(int ordinal, int64_t memory_limit_bytes);
// returns streams and handles; every Tensor must be gone
void close_device();
void synchronize();  // host waits for the compute stream
// a line a category, in MiB: now, and when all together were most
std::string describe_memory(const MemoryUse& m);

// ---- moving and filling; asynchronous on the compute stream unless said otherwise

void fill(const Tensor& x, double value);
void copy(const Tensor& to, const Tensor& from);  // same dtype and number of elements
// f32, bf16, f64, any to any; f64 to bf16 by way of f32
void cast(const Tensor& to, const Tensor& from);
// Returns when `host` may be reused. It waits for the device only where 64 MiB of earlier uploads
// of about this size (up to the same power of 2) are still on their way.
void upload(const Tensor& to, const void* host);
std::vector<double> download(const Tensor& x);  // waits; any dtype, widened
void download(const Tensor& x, void* host);     // waits; the bytes as they are
