// tensor.cu: memory, the device, and the kernels that move and fill.
// idea      cudaMallocAsync takes memory from a stream-ordered pool, which gives it back to the
//           driver only where an allocation fails: a plain cudaMalloc or cudaFree inside a step
//           would stop the whole device.
// not here  the ops: kernels/ has one file for each
// test      tests/test_tensor.cpp
#include "tensor.h"

#include <bit>
#include <list>
#include <map>

#include "kernels/tiles.cuh"

// ---- types

int64_t size_of(Dtype dtype) {
  switch (dtype) {
    case Dtype::bf16: return 2;
    case Dtype::f64: return 8;
    default: return 4;
  }
}

const char* name_of(Dtype dtype) {
  static const char* names[] = {"f32", "bf16", "f64", "i32"};
  return names[int(dtype)];
}

const char* name_of(Memory category) {
  static const char* names[] = {"parameters",     "gradients", "optimizer", "activations",
                                "gather buffers", "workspace", "data",      "keys and values"};
  static_assert(std::size(names) == kMemoryCategories);
  return names[int(category)];
}

int64_t elements(const Shape& shape) {
  int64_t n = 1;
  for (int64_t d : shape) n *= d;
  ASSERT(n >= 0, "no tensor is ", to_string(shape));
  return n;
}

std::string to_string(const Shape& shape) {
  std::string s = "(";
  for (size_t i = 0; i < shape.size(); i++) s += (i ? ", " : "") + std::to_string(shape[i]);
  return s + ")";
}

// ---- the device

static std::unique_ptr<Device> opened;

int device_count() {
  int count = 0;
  CUDA_CHECK(cudaGetDeviceCount(&count));
  return count;
}

// The pool gives back to the driver what is freed beyond that, whenever the host waits.
static void keep_freed(Device& d, uint64_t bytes) {
  CUDA_CHECK(cudaMemPoolSetAttribute(d.pool, cudaMemPoolAttrReleaseThreshold, &bytes));
}

Device& open_device(int ordinal, int64_t memory_limit_bytes) {
  ASSERT(!opened, "the device is open already");
  const int count = device_count();
  REQUIRE(ordinal < count, "device ", ordinal, " was asked for, but this machine has ", count);
  CUDA_CHECK(cudaSetDevice(ordinal));
  auto d = std::make_unique<Device>();
  d->memory_limit = memory_limit_bytes;
  cudaDeviceProp properties;
  CUDA_CHECK(cudaGetDeviceProperties(&properties, ordinal));
  d->name = properties.name;
  d->is_gpu = properties.major > 0;
  d->block_memory = properties.sharedMemPerBlockOptin;
  CUDA_CHECK(cudaStreamCreateWithFlags(&d->compute, cudaStreamNonBlocking));
  // What other ranks wait for goes first: between two kernels of the compute stream that fill the
  // device a collective would otherwise wait until the second has no block left to start.
  int lowest, highest;
  CUDA_CHECK(cudaDeviceGetStreamPriorityRange(&lowest, &highest));
  CUDA_CHECK(cudaStreamCreateWithPriority(&d->communication, cudaStreamNonBlocking, highest));
  CUDA_CHECK(cudaDeviceGetDefaultMemPool(&d->pool, ordinal));
  keep_freed(*d, UINT64_MAX);
  CUBLAS_CHECK(cublasCreate(&d->blas));
  CUBLAS_CHECK(cublasSetStream(d->blas, d->compute));
  opened = std::move(d);
  return *opened;
}

Device& device() { return opened ? *opened : open_device(0, 0); }

// Pinned host memory, which copies read and write while the host goes on. Allocating it may make
// the device wait, so it is kept: the first steps allocate it, later ones do not.
struct Staged {
  void* data = nullptr;
  Event free;  // once it is reached another copy may use the memory
  explicit Staged(int64_t bytes) { CUDA_CHECK(cudaMallocHost(&data, bytes)); }
  ~Staged() { cudaFreeHost(data); }
  static constexpr int64_t kLeast = 4 << 10, kMost = 1 << 20;
};
// by size, a power of 2; in the order of use, so that the first one is free first
static std::map<int64_t, std::list<Staged>> staging;
constexpr int64_t kMostStaged = 64 << 20;  // bytes of one size

static Staged& stage(int64_t bytes) {
  const int64_t size = std::bit_ceil(uint64_t(std::max(bytes, Staged::kLeast)));
  std::list<Staged>& all = staging[size];
  if (all.empty() || !all.front().free.reached()) {
    if (int64_t(all.size() + 1) * size <= kMostStaged) all.emplace_front(size);
    else all.front().free.synchronize();
  }
  all.splice(all.end(), all, all.begin());
  return all.back();
}

void close_device() {
  if (!opened) return;
  synchronize();
  staging.clear();
  op_times.clear();
  cublasDestroy(opened->blas);
  cudaStreamDestroy(opened->compute);
  cudaStreamDestroy(opened->communication);
  opened.reset();
}

// ---- streams

void synchronize() { CUDA_CHECK(cudaStreamSynchronize(device().compute)); }

Recorder::Queue queue_of(cudaStream_t stream) {
  return stream == device().compute ? Recorder::compute : Recorder::communication;
}

void make_wait(cudaStream_t waiter, cudaStream_t awaited) {
  device().mark.record(awaited);
  device().mark.make_wait(waiter);
}
void communicate_after_compute() { make_wait(device().communication, device().compute); }
void compute_after_communication() { make_wait(device().compute, device().communication); }

// ---- memory

static std::string mib(int64_t bytes) { return format("%.1f MiB", bytes / 1048576.0); }

std::string describe_memory(const MemoryUse& m) {
  std::string s;
  for (int i = 0; i < kMemoryCategories; i++)
    if (m.peak[i])
      s += sentence("  ", name_of(Memory(i)), ": ", mib(m.now[i]), " now, ", mib(m.at_peak[i]),
                    " at the peak\n");
  return s + sentence("  all: ", mib(m.total), " now, ", mib(m.total_peak), " at the peak\n");
}

// Null: it does not fit.
static void* allocate(Device& d, int64_t bytes) {
  void* data = nullptr;
  cudaError_t status = cudaMallocAsync(&data, bytes, d.compute);
  if (status == cudaErrorMemoryAllocation) {
    // Blocks that were freed make a larger one only when the device is past their last use.
    cudaGetLastError();  // forget it: the next launch asks for the last error
    keep_freed(d, 0);
    synchronize();
    keep_freed(d, UINT64_MAX);
    status = cudaMallocAsync(&data, bytes, d.compute);
  }
  if (status == cudaErrorMemoryAllocation) return cudaGetLastError(), nullptr;
  CUDA_CHECK(status);
  return data;
}

Buffer::Buffer(int64_t bytes, Memory category) : bytes(bytes), category(category) {
  Device& d = device();
  const auto refuse = [&](const std::string& limit) {
    throw Error(sentence("out of device memory: ", mib(bytes), " more for ", name_of(category),
                         " does not fit ", limit, "; what holds it:\n", describe_memory(d.memory)));
  };
  if (d.memory_limit && d.memory.total + bytes > d.memory_limit)
    refuse(sentence("under --device-memory ", mib(d.memory_limit)));
  if (bytes) {
    data = allocate(d, bytes);
    if (!data) refuse(sentence("in what ", d.name, " has left"));
  }
  MemoryUse& m = d.memory;
  const int i = int(category);
  m.now[i] += bytes;
  m.peak[i] = std::max(m.peak[i], m.now[i]);
  m.total += bytes;
  recorder.allocated(name_of(category), microbatch, bytes);
  if (m.total <= m.total_peak) return;
  m.total_peak = m.total;
  m.at_peak = m.now;
}

Buffer::~Buffer() {
  if (!opened) return;  // the device was closed: this stays until the process ends
  opened->memory.now[int(category)] -= bytes;
  opened->memory.total -= bytes;
  recorder.allocated(name_of(category), microbatch, -bytes);
  if (data) cudaFreeAsync(data, opened->compute);
}

// ---- tensors

Tensor::Tensor(Shape shape, Dtype dtype, Memory category)
    : buffer_(std::make_shared<Buffer>(elements(shape) * size_of(dtype), category)),
      data_(buffer_->data),
      shape_(std::move(shape)),
      dtype_(dtype) {}

Tensor Tensor::view(int64_t first, Shape shape) const {
  ASSERT(first >= 0 && first + elements(shape) <= numel(), to_string(shape), " at ", first,
         " is not inside ", to_string(shape_));
  Tensor t = *this;
  t.shape_ = std::move(shape);
  t.data_ = static_cast<char*>(data_) + first * size_of(dtype_);
  return t;
}

// ---- kernels
// for_tile calls a function for each element of a block's tile; acc_t<T> is the type in which
// numbers of type T are computed with: float for bf16, else T itself. On the host side DISPATCH
// launches the kernel for a tensor's dtype, and OP names the op and its bytes for --profile.

namespace {

constexpr int kThreads = block_threads(256);

// x (n) = value; writes n
template <class T> __global__ void __launch_bounds__(256)
    fill_kernel(T* __restrict__ x, double value, int64_t n) {
  const T v = store<T>(static_cast<acc_t<T>>(value));
  for_tile<kThreads, 1>(n, [=](int64_t i, auto) { x[i] = v; });
}

// y (n) of T = x (n) of U; reads n, writes n
template <class T, class U> __global__ void __launch_bounds__(256)
    cast_kernel(T* __restrict__ y, const U* __restrict__ x, int64_t n) {
  for_tile<kThreads, 1>(n, [=](int64_t i, auto) {
    y[i] = store<T>(static_cast<acc_t<T>>(load(x[i])));
  });
}

}  // namespace

// ---- host side

void fill(const Tensor& x, double value) {
  const int64_t n = x.numel();
  if (!n) return;
  OP("fill", bytes_of(x));
  if (value == 0) {
    CUDA_CHECK(cudaMemsetAsync(x.raw(), 0, x.bytes(), device().compute));
    return;
  }
  DISPATCH(x.dtype(),
           fill_kernel<T><<<tiles(n), kThreads, 0, device().compute>>>(x.data<T>(), value, n));
}

void copy(const Tensor& to, const Tensor& from) {
  OP("copy", bytes_of(to, from));
  ASSERT(to.dtype() == from.dtype() && to.numel() == from.numel());
  CUDA_CHECK(cudaMemcpyAsync(to.raw(), from.raw(), to.bytes(), cudaMemcpyDeviceToDevice,
                             device().compute));
}

template <class U> static void cast_from(const Tensor& to, const Tensor& from) {
  const int64_t n = to.numel();
  DISPATCH(to.dtype(), cast_kernel<T, U>
           <<<tiles(n), kThreads, 0, device().compute>>>(to.data<T>(), from.data<U>(), n));
}

void cast(const Tensor& to, const Tensor& from) {
  OP("cast", bytes_of(to, from));
  ASSERT(to.numel() == from.numel());
  if (!to.numel()) return;
  if (to.dtype() == from.dtype()) return copy(to, from);
  DISPATCH(from.dtype(), cast_from<T>(to, from));
}

void upload(const Tensor& to, const void* host) {
  OP("upload", bytes_of(to));
  if (!to.numel()) return;
  for (int64_t at = 0; at < to.bytes(); at += Staged::kMost) {
    const int64_t bytes = std::min(Staged::kMost, to.bytes() - at);
    Staged& staged = stage(bytes);
    memcpy(staged.data, static_cast<const char*>(host) + at, bytes);
    CUDA_CHECK(cudaMemcpyAsync(static_cast<char*>(to.raw()) + at, staged.data, bytes,
                               cudaMemcpyHostToDevice, device().compute));
    staged.free.record(device().compute);
  }
}

void download(const Tensor& x, void* host) {
  if (!x.numel()) return;
  const bool small = x.bytes() <= Staged::kMost;  // to memory that is not pinned a copy waits, too
  void* const to = small ? stage(x.bytes()).data : host;
  CUDA_CHECK(cudaMemcpyAsync(to, x.raw(), x.bytes(), cudaMemcpyDeviceToHost, device().compute));
  synchronize();
  if (small) memcpy(host, to, x.bytes());
}

static double wide(double x) { return x; }
static double wide(__nv_bfloat16 x) { return __bfloat162float(x); }
template <class T> static std::vector<double> download_wide(const Tensor& x) {
  std::vector<T> host(x.numel());
  download(x, host.data());
  std::vector<double> values(host.size());
  for (size_t i = 0; i < host.size(); i++) values[i] = wide(host[i]);
  return values;
}

std::vector<double> download(const Tensor& x) {
  if (x.dtype() == Dtype::i32) return download_wide<int>(x);
  std::vector<double> values;
  DISPATCH(x.dtype(), values = download_wide<T>(x));
  return values;
}
