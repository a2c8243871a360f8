// tiles.cuh: the loop of elementwise kernels that need no rows (others have for_row). A block owns
// kTile consecutive elements and moves them in packs.
#pragma once
#include "kernels/common.cuh"

namespace {

constexpr int kTile = 4096;
inline unsigned tiles(int64_t n) { return ceil_div(n, kTile); }

// Calls f(first element, Width) for each pack of this block's tile of n elements: see for_packs.
template <int kThreads, int N, class F> __device__ __forceinline__ void for_tile(int64_t n, F f) {
  const int64_t begin = int64_t(blockIdx.x) * kTile;
  for_packs<kThreads, N>(n - begin < kTile ? n - begin : kTile,
                         [=](int i, auto width) { f(begin + i, width); });
}

}  // namespace
