// columns.cuh: the neighbouring columns of a row that one thread owns at a time: how to walk over
// them, read them and change them.
//
// idea      a thread owns a pack of 16 bytes (Width<N>: N columns), or one column at the end of a
//           row that packs do not fill. What it sums stays in registers.
// CPU       FAST finds cpu/cuda/columns.cuh in this one's place: there a thread owns a thousand
//           columns, in the first-level cache
// test      tests/test_kernels.cpp, tests/test_decode.cpp
#pragma once
#include "kernels/common.cuh"

namespace {

template <int N> constexpr int kColumns = N;  // of a thread, where rows are read in packs of N
constexpr int kRowsAhead = 4;                 // rows whose loads are under way at a time

// How many columns a thread has that may own `left` more
template <int N> __device__ __forceinline__ Width<N> own_columns(int64_t) { return {}; }

// f(first column, how many) for the columns of a row of `width` (a multiple of N) that this thread
// owns
template <int kThreads, int N, class F>
__device__ __forceinline__ void for_columns(int width, F f) {
  for (int i = threadIdx.x * N; i < width; i += kThreads * N) f(i, Width<N>());
}

// The same for any width: packs, and single columns after them
template <int kThreads, int N, bool kBackwards, class F>
__device__ __forceinline__ void for_ragged_columns(int width, F f) {
  const int packs = width / N, i = threadIdx.x;
  for (int p = i; p < packs; p += kThreads) f((kBackwards ? packs - 1 - p : p) * N, Width<N>());
  if (i < width - packs * N) f(packs * N + i, Width<1>());
}

// f(k, p[k]) for n columns
template <int N, class T, class F>
__device__ __forceinline__ void read_columns(const T* p, Width<N>, F f) {
  const auto pack = load_pack<N>(p);
  for (int k = 0; k < N; k++) f(k, acc_t<T>(load(pack[k])));
}

// f(k, the elements k of kRows rows, which are ld apart)
template <int kRows, int N, class T, class F>
__device__ __forceinline__ void read_rows(const T* p, int64_t ld, Width<N>, F f) {
  Pack<T, N> pack[kRows];
  for (int u = 0; u < kRows; u++) pack[u] = load_pack<N>(p + u * ld);
  for (int k = 0; k < N; k++) {
    acc_t<T> v[kRows];
    for (int u = 0; u < kRows; u++) v[u] = acc_t<T>(load(pack[u][k]));
    f(k, v);
  }
}

// p[k] = f(k, p[k])
template <int N, class T, class F>
__device__ __forceinline__ void change_columns(T* p, Width<N>, F f) {
  auto pack = load_pack<N>(p);
  for (int k = 0; k < N; k++) pack[k] = store<T>(f(k, acc_t<T>(load(pack[k]))));
  store_pack(p, pack);
}

// A warp's row of at most kWarp * kOwn columns: f(k, column) for this lane's, which are kWarp
// apart. Unrolled: what has index k is a register.
template <int kOwn, class F> __device__ __forceinline__ void for_lane_columns(int width, F f) {
  const int lane = threadIdx.x % kWarp;
#pragma unroll
  for (int k = 0; k < kOwn; k++)
    if (k * kWarp + lane < width) f(k, k * kWarp + lane);
}

}  // namespace
