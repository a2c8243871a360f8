// cpu_kernels.cu: kernels that exercise the stand-in for CUDA, and launches in every form that
// cpu/cuda/launch.sed must understand.
#include "tests/cpu_kernels.h"

#include <cuda_bf16.h>
#ifndef CPU_FAST
#include "kernels/mma.cuh"
#endif

#include <cmath>
#include <cstdio>
#include <utility>

namespace {

// ---- launches

template <class T, int N> struct Times {
  __device__ static T apply(T x) { return x * N; }
};
template <class Op, class T> __global__ void apply_kernel(T* y, const T* x, int width) {
  for (int i = threadIdx.x; i < width; i += blockDim.x)
    y[blockIdx.x * width + i] = Op::apply(x[blockIdx.x * width + i]);
}

__global__ void places_kernel(Place* places) {
  const int threads = int(blockDim.x * blockDim.y * blockDim.z);
  const int thread = int(threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z));
  const int block = int(blockIdx.x + gridDim.x * (blockIdx.y + gridDim.y * blockIdx.z));
  for (int i = thread; i < kTileOfBlock; i += threads)
    places[block * kTileOfBlock + i] = {blockIdx.x, blockIdx.y, blockIdx.z,       gridDim.x,
                                        gridDim.y,  gridDim.z,  unsigned(threads)};
}

__global__ void nothing_kernel() {}

__global__ void add_kernel(float* x, int n, float value) {
  for (int i = threadIdx.x; i < n; i += blockDim.x) x[i] += value;
}

// ---- shared memory

__global__ void rotate_kernel(float* __restrict__ y, const float* __restrict__ x, int width,
                              bool barrier) {
  extern __shared__ __align__(16) float row[];
  for (int i = threadIdx.x; i < width; i += blockDim.x) row[i] = x[blockIdx.x * width + i];
  if (barrier) __syncthreads();
  for (int i = threadIdx.x; i < width; i += blockDim.x)
    y[blockIdx.x * width + i] = row[(i + 1) % width];
}

__global__ void reverse_kernel(float* __restrict__ y, const float* __restrict__ x, int width) {
  __shared__ alignas(16) float row[256];
  for (int i = threadIdx.x; i < width; i += blockDim.x) row[i] = x[blockIdx.x * width + i];
  __syncthreads();
  for (int i = threadIdx.x; i < width; i += blockDim.x)
    y[blockIdx.x * width + i] = row[width - 1 - i];
}

// ---- warps

__global__ void warp_sum_kernel(double* sums, const double* x) {
  double sum = 0;
  for (int i = threadIdx.x; i < 32; i += kWarp) sum += x[blockIdx.x * 32 + i];
  for (int o = kWarp / 2; o > 0; o >>= 1) sum += __shfl_xor_sync(~0u, sum, o);
  if (threadIdx.x == 0) sums[blockIdx.x] = sum;
}

#ifndef CPU_FAST
// What shared memory holds before anybody has written to it; then writes to it.
template <class T> __global__ void fresh_kernel(T* y) {
  extern __shared__ __align__(16) T dynamic[];
  __shared__ T fixed[64];
  const int i = threadIdx.x, n = blockDim.x;
  y[(blockIdx.x * 2 + 0) * n + i] = dynamic[i];
  y[(blockIdx.x * 2 + 1) * n + i] = fixed[i];
  dynamic[i] = fixed[i] = 1;
}

template <class T> __device__ void shuffle_all(T* y, T value) {
  for (int lanes = 1; lanes <= kShuffles; lanes++)
    y[(lanes - 1) * blockDim.x + threadIdx.x] = __shfl_xor_sync(~0u, value, lanes);
}
__global__ void shuffles_kernel(float* y, double* z, const float* x, const double* t) {
  shuffle_all(y, x[threadIdx.x]);
  __syncwarp();
  shuffle_all(z, t[threadIdx.x]);
}

// 16 x 16: c = (a b + 1) scale + a b; a warp
template <bool kAByRows, bool kBByRows>
__global__ void tensor_core_kernel(float* c, const __nv_bfloat16* a, const __nv_bfloat16* b,
                                   float scale) {
  __shared__ alignas(16) __nv_bfloat16 tiles[2][256];
  for (int t = 0; t < 2; t++)
    copy_async<16>(tiles[t] + threadIdx.x * 8, (t ? b : a) + threadIdx.x * 8, 16);
  close_copies();
  wait_for_copies<0>();
  __syncwarp();
  const Left left = load_left<kAByRows>(
      [&](int x, int k) { return tiles[0] + (kAByRows ? x * 16 + k : k * 16 + x); });
  const Right right = load_right<!kBByRows>(
      [&](int x, int k) { return tiles[1] + (kBByRows ? k * 16 + x : x * 16 + k); });
  Strip<16> sum;
  for (int j = 0; j < 2; j++)
    for (int e = 0; e < 4; e++) sum.v[j][e] = 1;
  add(sum, 0, left, right);
  for (int j = 0; j < 2; j++)
    for (int e = 0; e < 4; e++) sum.v[j][e] *= scale;
  add(sum, 0, left, right);
  for (int j = 0; j < 2; j++)
    for (int e = 0; e < 4; e++) c[strip_row(e) * 16 + strip_column(j, e)] = sum.v[j][e];
}

// y (3,64): what a warp sees of 64 numbers copied in two groups, the second one's last 8 cut off:
// before it waits, after it waited for the first group, and for both
__global__ void async_copy_kernel(float* y, const float* x) {
  __shared__ alignas(16) float held[64];
  const auto show = [&](int when) {
    for (int i = threadIdx.x; i < 64; i += kWarp) y[when * 64 + i] = held[i];
    __syncwarp();
  };
  for (int group = 0; group < 2; group++) {
    const int i = group * 32 + threadIdx.x % 8 * 4;
    if (threadIdx.x < 8) copy_async<16>(held + i, x + i, i < 56 ? 16 : 0);
    close_copies();
  }
  __syncwarp();
  show(0);
  wait_for_copies<1>();
  __syncwarp();
  show(1);
  wait_for_copies<0>();
  __syncwarp();
  show(2);
}
#endif

// ---- functions

__global__ void functions_kernel(float* __restrict__ y, double* __restrict__ z,
                                 const float* __restrict__ x, const double* __restrict__ t, int n) {
  for (int i = threadIdx.x; i < n; i += blockDim.x) {
    y[i] = expf(x[i]);
    y[n + i] = tanhf(x[i]);
    y[2 * n + i] = logf(x[i]);
    z[i] = exp(t[i]);
    z[n + i] = tanh(t[i]);
    z[2 * n + i] = log(t[i]);
  }
}

// ---- mistakes

#ifdef CPU_FAITHFUL
#define MISTAKE_IN_NEXT_LINE()                                         \
  do {                                                                 \
    if (i == 0) fprintf(stderr, "mistake in line %d\n", __LINE__ + 1); \
  } while (0)

__global__ void mistake_kernel(Mistake mistake) {
  extern __shared__ float row[];
  const int i = threadIdx.x;
  if (mistake == Mistake::barrier_not_reached) {
    MISTAKE_IN_NEXT_LINE();
    if (i != 5) __syncthreads();
  } else if (mistake == Mistake::two_barriers) {
    MISTAKE_IN_NEXT_LINE();
    if (i < 10) __syncthreads();
    else __syncthreads();
  } else if (mistake == Mistake::shuffle_not_reached) {
    MISTAKE_IN_NEXT_LINE();
    if (i != 7) row[0] = __shfl_xor_sync(~0u, 1.0f, 1);
  } else if (mistake == Mistake::two_primitives) {
    MISTAKE_IN_NEXT_LINE();
    if (i < 10) row[0] = __shfl_xor_sync(~0u, 1.0f, 1);
    else __syncwarp();
  } else {
    row[mistake == Mistake::before_shared_memory ? i - 1 : i + 1] = 1;
  }
}
#endif

}  // namespace

// ---- host

#define FOR_EACH_OF(...) __VA_ARGS__
#define AS(T_, ...) \
  {                 \
    using T = T_;   \
    __VA_ARGS__;    \
  }

void scale_rows(double* y, const double* x, int rows, int width) {
  // see Times<int, 2> for what is applied: a comment with a template in it, and then a launch on
  // several lines
  apply_kernel<Times<std::pair<double, std::pair<int, int>>::first_type, 2>, double>
      <<<dim3((rows >> 1) + (rows >= 1 ? rows - (rows >> 1) : 0)), block_threads(64), 0, nullptr>>>(
          y, x, width);
  FOR_EACH_OF(
      AS(double, apply_kernel<Times<T, 4>, T><<<rows, block_threads(32)>>>(y, y, width))
          AS(double, apply_kernel<Times<T, 2>, T><<<rows, block_threads(32)>>>(y, y, width)));
}
// Launches on several lines must not move the lines after them. After an edit: the new number.
static_assert(__LINE__ == 206);

void write_places(Place* places, dim3 grid, dim3 block) { places_kernel<<<grid, block>>>(places); }
void rotate_rows(float* y, const float* x, int rows, int width, int threads, bool barrier) {
  rotate_kernel<<<rows, block_threads(threads), width * sizeof(float)>>>(y, x, width, barrier);
}
void reverse_rows(float* y, const float* x, int rows, int width) {
  reverse_kernel<<<rows, block_threads(128)>>>(y, x, width);
}
void sum_of_warp(double* sums, const double* x, int warps) {
  warp_sum_kernel<<<warps, block_threads(32)>>>(sums, x);
}
void functions(float* y, double* z, const float* x, const double* t, int n) {
  functions_kernel<<<1, block_threads(64)>>>(y, z, x, t, n);
}
void add_and_wait(float* x, int n, float value, cudaStream_t stream) {
  add_kernel<<<1, block_threads(64), 0, stream>>>(x, n, value);
}
cudaError_t launch_with(dim3 grid, dim3 block, size_t shared_bytes) {
  nothing_kernel<<<grid, block, shared_bytes>>>();
  const cudaError_t peeked = cudaPeekAtLastError(), error = cudaGetLastError();
  return peeked == error && cudaGetLastError() == cudaSuccess ? error : cudaErrorNotReady;
}

#ifndef CPU_FAST
void read_fresh_shared_memory(float* y, int blocks) {
  fresh_kernel<float><<<blocks, block_threads(64), 64 * sizeof(float)>>>(y);
}
void shuffles(float* y, double* z, const float* x, const double* t) {
  shuffles_kernel<<<1, 64>>>(y, z, x, t);
}
void tensor_core_product(float* c, const void* a, const void* b, bool a_by_rows, bool b_by_rows,
                         float scale) {
  const auto *pa = static_cast<const __nv_bfloat16*>(a), *pb = static_cast<const __nv_bfloat16*>(b);
  const auto kernel =
      a_by_rows   ? b_by_rows ? tensor_core_kernel<true, true> : tensor_core_kernel<true, false>
        : b_by_rows ? tensor_core_kernel<false, true>
                  : tensor_core_kernel<false, false>;
  kernel<<<1, 32>>>(c, pa, pb, scale);
}
void async_copies(float* y, const float* x) { async_copy_kernel<<<1, 32>>>(y, x); }
#endif

#ifdef CPU_FAITHFUL
void make_mistake(Mistake mistake) { mistake_kernel<<<2, 64, 64 * sizeof(float)>>>(mistake); }
#endif
