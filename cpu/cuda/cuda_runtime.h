// cuda_runtime.h: the part of CUDA that Threefold uses, for a machine with no GPU. The sources
// above do not know the difference.
//
// idea      a kernel is a plain function that is called once for each block (FAST: one thread a
//           block, blocks on OpenMP threads) or once for each thread (FAITHFUL: every thread a
//           fiber); device memory is host memory; a stream runs its work immediately. -DCPU_FAST or
//           -DCPU_FAITHFUL chooses the form. launch.sed rewrites `kernel<<<...>>>(...)` to
//           `cpu::launch(kernel, ...)(...)`.
// stricter  the null stream waits for no other stream; asynchronous copies read pageable host
//           memory when the stream reaches them
// not here  driver API, graphs, textures, unified memory, printf in kernels
// test      tests/test_cpu.cpp
#pragma once
#include <atomic>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>
#include <string>
#include <type_traits>

#if !defined(CPU_FAST) && !defined(CPU_FAITHFUL)
#error "compile with -DCPU_FAST or -DCPU_FAITHFUL"
#endif

// ---- the language

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __align__(n) __attribute__((aligned(n)))  // write `__shared__ __align__(16) float x[64];`

struct uint3 {
  unsigned x, y, z;
};
struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

// May alias: kernels read arrays of other types through it.
struct __attribute__((may_alias, aligned(16))) float4 {
  float x, y, z, w;
};

// glibc offers these in SIMD form, but declares so only under the whole of -ffast-math. Kernels are
// compiled with less than that (-ffinite-math-only is the part that shows), and need them: without,
// exp and tanh cost ten times as much.
// (clang, which has no such attribute, does without.)
#if defined(CPU_FAST) && defined(__x86_64__) && defined(__GLIBC__) && !defined(__clang__) && \
    defined(__FINITE_MATH_ONLY__) && __FINITE_MATH_ONLY__
#define CPU_SIMD_FORM __attribute__((simd("notinbranch"), const))
extern "C" {
CPU_SIMD_FORM float expf(float) noexcept;
CPU_SIMD_FORM float logf(float) noexcept;
CPU_SIMD_FORM double exp(double) noexcept;
CPU_SIMD_FORM double log(double) noexcept;
#if __GLIBC_PREREQ(2, 35)
CPU_SIMD_FORM float tanhf(float) noexcept;
CPU_SIMD_FORM double tanh(double) noexcept;
#endif
}
#undef CPU_SIMD_FORM
#endif

namespace cpu {
template <class To, class From> inline To bits_as(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  memcpy(&to, &from, sizeof to);
  return to;
}
}  // namespace cpu

// ---- errors

enum cudaError_t {
  cudaSuccess = 0,
  cudaErrorInvalidValue = 1,
  cudaErrorMemoryAllocation = 2,
  cudaErrorInvalidConfiguration = 9,
  cudaErrorInvalidDevice = 101,
  cudaErrorInvalidResourceHandle = 400,
  cudaErrorNotReady = 600
};
const char* cudaGetErrorName(cudaError_t error);
const char* cudaGetErrorString(cudaError_t error);
cudaError_t cudaGetLastError();  // and forgets it
cudaError_t cudaPeekAtLastError();

// ---- devices: every rank may have one of its own

struct cudaDeviceProp {
  char name[256];
  size_t totalGlobalMem, sharedMemPerBlockOptin;
  int major, minor, multiProcessorCount;
};
cudaError_t cudaGetDeviceCount(int* count);
cudaError_t cudaSetDevice(int device);
cudaError_t cudaGetDevice(int* device);
cudaError_t cudaGetDeviceProperties(cudaDeviceProp* properties, int device);
cudaError_t cudaDeviceSynchronize();

enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize = 8 };
cudaError_t cudaFuncSetAttribute(const void* kernel, cudaFuncAttribute attribute, int value);
template <class R, class... P>
cudaError_t cudaFuncSetAttribute(R (*kernel)(P...), cudaFuncAttribute attribute, int value) {
  return cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel), attribute, value);
}

// ---- streams and events

using cudaStream_t = struct CUstream_st*;
using cudaEvent_t = struct CUevent_st*;
using cudaHostFn_t = void (*)(void*);
constexpr unsigned cudaStreamNonBlocking = 1, cudaEventDefault = 0, cudaEventDisableTiming = 2;
cudaError_t cudaStreamCreate(cudaStream_t* stream);
cudaError_t cudaStreamCreateWithFlags(cudaStream_t* stream, unsigned flags);
cudaError_t cudaStreamCreateWithPriority(cudaStream_t* stream, unsigned flags, int priority);
cudaError_t cudaDeviceGetStreamPriorityRange(int* least, int* greatest);
cudaError_t cudaStreamDestroy(cudaStream_t stream);
cudaError_t cudaStreamSynchronize(cudaStream_t stream);
cudaError_t cudaStreamQuery(cudaStream_t stream);
cudaError_t cudaStreamWaitEvent(cudaStream_t stream, cudaEvent_t event, unsigned flags = 0);
cudaError_t cudaLaunchHostFunc(cudaStream_t stream, cudaHostFn_t function, void* argument);
cudaError_t cudaEventCreate(cudaEvent_t* event);
cudaError_t cudaEventCreateWithFlags(cudaEvent_t* event, unsigned flags);
cudaError_t cudaEventDestroy(cudaEvent_t event);
cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t stream = nullptr);
cudaError_t cudaEventSynchronize(cudaEvent_t event);
cudaError_t cudaEventQuery(cudaEvent_t event);
cudaError_t cudaEventElapsedTime(float* milliseconds, cudaEvent_t start, cudaEvent_t end);

// ---- memory

enum cudaMemcpyKind {
  cudaMemcpyHostToDevice = 1,
  cudaMemcpyDeviceToHost,
  cudaMemcpyDeviceToDevice
};
using cudaMemPool_t = struct CUmemPool_st*;
enum cudaMemPoolAttr { cudaMemPoolAttrReleaseThreshold = 4 };
cudaError_t cudaMalloc(void** data, size_t bytes);
cudaError_t cudaFree(void* data);
cudaError_t cudaMallocAsync(void** data, size_t bytes, cudaStream_t stream);
cudaError_t cudaFreeAsync(void* data, cudaStream_t stream);
cudaError_t cudaMallocHost(void** data, size_t bytes);
cudaError_t cudaFreeHost(void* data);
template <class T> cudaError_t cudaMalloc(T** data, size_t bytes) {
  return cudaMalloc(reinterpret_cast<void**>(data), bytes);
}
template <class T> cudaError_t cudaMallocAsync(T** data, size_t bytes, cudaStream_t stream) {
  return cudaMallocAsync(reinterpret_cast<void**>(data), bytes, stream);
}
template <class T> cudaError_t cudaMallocHost(T** data, size_t bytes) {
  return cudaMallocHost(reinterpret_cast<void**>(data), bytes);
}
cudaError_t cudaMemcpy(void* to, const void* from, size_t bytes, cudaMemcpyKind kind);
cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, cudaMemcpyKind kind,
                            cudaStream_t stream = nullptr);
cudaError_t cudaMemset(void* data, int value, size_t bytes);
cudaError_t cudaMemsetAsync(void* data, int value, size_t bytes, cudaStream_t stream = nullptr);
cudaError_t cudaDeviceGetDefaultMemPool(cudaMemPool_t* pool, int device);
cudaError_t cudaMemPoolSetAttribute(cudaMemPool_t pool, cudaMemPoolAttr attribute, void* value);

// ---- for the stand-ins of the libraries (cublas.cpp, nccl.cpp) and for tests

namespace cpu {

// How streams run. Immediate: in the caller, before a call returns. Queued: each stream is a queue
// that a thread of its own works off, so that communication overlaps with computation
// (THREEFOLD_STREAMS=queued); with random delays drawn from a seed a forgotten wait between two
// streams shows (THREEFOLD_STREAMS=queued:SEED or these functions).
void queue_streams(unsigned seed);
void run_streams_immediately();
extern bool streams_are_queued;
// Calls that made the host wait for the device, so far: how tests see where a program does.
inline std::atomic<int64_t> host_waits = 0;

bool is_stream(cudaStream_t stream);  // that was created and not destroyed, or null

// The one way for work that touches device memory to enter a stream.
void enqueue(cudaStream_t stream, std::function<void()> work);
// the same, and costs nothing when streams run immediately
template <class Work> void submit(cudaStream_t stream, Work&& work) {
  if (streams_are_queued) enqueue(stream, std::forward<Work>(work));
  else work();
}

// All device memory of this process lies in one reserved range. With share_device_memory(), called
// before the first allocation, the range belongs to a memfd that other ranks on this machine can
// map and read in place; fd is -1 otherwise.
struct Arena {
  int fd;
  char* base;
  size_t size;
};
const Arena& arena();
void share_device_memory();

// Fills memory with NaN (0xff) when it is first handed out and when it is freed. On in FAITHFUL,
// and with queued streams that have a seed.
void poison_memory(bool on);
// Whether these bytes lie in one block of device memory that is in use.
bool in_one_block(const void* data, size_t bytes);
// bytes, with what rounding and guards add; carved: taken from the arena so far
struct PoolCounts {
  size_t in_use, peak, carved;
  int64_t allocations, reuses;
};
PoolCounts pool_counts();

// False, and the error is set, where CUDA would refuse the launch.
bool legal_launch(const void* kernel, dim3 grid, dim3 block, size_t dynamic_shared,
                  cudaStream_t stream);

}  // namespace cpu

// ---- launches, threads, shared memory, warps

#ifdef CPU_FAST
#include "fast.h"
#else
#include "cpu/faithful/faithful.h"
#endif
