// columns.cuh: in FAST the columns that a thread owns, in the place of kernels/columns.cuh, which
// says what each name here does.
//
// idea      a block's one thread owns a thousand columns at a time: their sums wait in the
//           first-level cache, and each loop over them becomes vector instructions
// test      tests/test_kernels.cpp, tests/test_decode.cpp
#pragma once
#include "kernels/common.cuh"

namespace {

template <int> constexpr int kColumns = 1024;
constexpr int kRowsAhead = 8;

template <int> int own_columns(int64_t left) {
  return left < kColumns<1> ? int(left) : kColumns<1>;
}

template <int, int N, class F> __forceinline__ void for_columns(int width, F f) {
  for (int i = 0; i < width; i += kColumns<N>) f(i, own_columns<N>(width - i));
}

template <int, int N, bool kBackwards, class F>
__forceinline__ void for_ragged_columns(int width, F f) {
  const int runs = (width + kColumns<N> - 1) / kColumns<N>;
  for (int r = 0; r < runs; r++) {
    const int i = (kBackwards ? runs - 1 - r : r) * kColumns<N>;
    f(i, own_columns<N>(width - i));
  }
}

template <class T, class F> __forceinline__ void read_columns(const T* p, int n, F f) {
  INDEPENDENT
  for (int k = 0; k < n; k++) f(k, acc_t<T>(load(p[k])));
}

template <int kRows, class T, class F>
__forceinline__ void read_rows(const T* p, int64_t ld, int n, F f) {
  INDEPENDENT
  for (int k = 0; k < n; k++) {
    acc_t<T> v[kRows];
    for (int u = 0; u < kRows; u++) v[u] = acc_t<T>(load(p[u * ld + k]));
    f(k, v);
  }
}

template <class T, class F> __forceinline__ void change_columns(T* p, int n, F f) {
  INDEPENDENT
  for (int k = 0; k < n; k++) p[k] = store<T>(f(k, acc_t<T>(load(p[k]))));
}

template <int, class F> __forceinline__ void for_lane_columns(int width, F f) {
  INDEPENDENT
  for (int k = 0; k < width; k++) f(k, k);
}

}  // namespace
