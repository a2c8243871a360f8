// tiles.cuh: the loop of every elementwise kernel. A block owns kTile consecutive elements and
// moves them in packs.
#pragma once
#include "kernels/common.cuh"

namespace {

constexpr int kTile = 4096;
inline unsigned tiles(int64_t n) { return unsigned(ceil_div(n, kTile)); }

// Calls f(first element, Width) for each pack of this block's tile of n elements: Width<N>, and
// Width<1> at the end when N does not divide n.
template <int kThreads, int N, class F> __device__ __forceinline__ void for_tile(int64_t n, F f) {
  const int64_t begin = int64_t(blockIdx.x) * kTile;
  const int size = int(n - begin < kTile ? n - begin : kTile), packed = size / N * N;
  INDEPENDENT
  for (int i = threadIdx.x * N; i < packed; i += kThreads * N) f(begin + i, Width<N>());
  if (N > 1 && packed + int(threadIdx.x) < size) f(begin + packed + threadIdx.x, Width<1>());
}

}  // namespace
