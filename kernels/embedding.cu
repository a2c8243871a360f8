// embedding.cu: token and position embeddings, and their gradients without atomics.
//
// idea      the gradient of a token's row is the sum of the rows of dx where that token stands. With the rows sorted by token each token is
//           one run. Runs are short or (a space, in text by bytes) a fifth of everything, so a block takes not a run but kSegment
//           consecutive places of the sorted order: a run inside them is added to dwte at once; a run that crosses their border leaves
//           its part in a workspace, and the block where the run begins adds the parts up, first to last, in a second launch.
// cost      forward reads and writes RC; backward reads RC twice (by token, by position) and updates each dwte row in use once
// test      tests/test_kernels.cpp
#include <algorithm>

#include "kernels/common.cuh"

namespace {

constexpr int kThreads = block_threads(256);
constexpr int kSegment = kWarp == 1 ? 64 : 8;

// x (R,C) = wte (V,C)[tokens (R)] + wpe (T,C)[positions (R), or row % T], 0 where the token is -1; one block a row; reads 2RC, writes RC
template <class T, int N>
__global__ void __launch_bounds__(256) embedding_kernel(T* x, const int* tokens, const int* positions, const T* wte, const T* wpe, int64_t period, int C) {
  const int64_t row = blockIdx.x;
  x += row * C;
  if (tokens[row] < 0) {
    const Pack<T, N> zero{};
    return for_row<kThreads, N>(C, [=](int i) { store_pack(x + i, zero); });
  }
  wte += int64_t(tokens[row]) * C;
  wpe += (positions ? positions[row] : row % period) * C;
  for_row<kThreads, N>(C, [=](int i) {
    const auto p = load_pack<N>(wte + i), q = load_pack<N>(wpe + i);
    Pack<T, N> r;
    for (int k = 0; k < N; k++) r[k] = store<T>(load(p[k]) + load(q[k]));
    store_pack(x + i, r);
  });
}

// The neighbouring columns that a thread sums at a time: a pack in registers; in FAST a run of columns in the first-level cache.
template <int N> constexpr int kColumns = kWarp == 1 ? 1024 : N;

// Calls f(first column, columns) for the groups of columns that this thread owns.
template <int N, class F> __device__ __forceinline__ void for_columns(int C, F f) {
  for (int i = threadIdx.x * kColumns<N>; i < C; i += kThreads * kColumns<N>) f(i, kWarp > 1 || C - i > kColumns<N> ? kColumns<N> : C - i);
}

// sum (n) += row (n)
template <int N, class T, class A> __device__ __forceinline__ void add_row(A* sum, const T* row, int n) {
  if constexpr (kWarp == 1) {
    INDEPENDENT
    for (int k = 0; k < n; k++) sum[k] += load(row[k]);
  } else {
    const auto p = load_pack<N>(row);
    for (int k = 0; k < N; k++) sum[k] += load(p[k]);
  }
}

// to (n) = sum (n), or += it; sum (n) = 0
template <int N, bool kAdd, class A> __device__ __forceinline__ void put_sum(A* to, A* sum, int n) {
  if constexpr (kWarp == 1) {
    INDEPENDENT
    for (int k = 0; k < n; k++) to[k] = kAdd ? to[k] + sum[k] : sum[k], sum[k] = 0;
  } else {
    Pack<A, N> p{};
    if constexpr (kAdd) p = load_pack<N>(to);
    for (int k = 0; k < N; k++) p[k] += sum[k], sum[k] = 0;
    store_pack(to, p);
  }
}

// dwte (V,C) += the runs that lie within this block's segment of `order`; parts (segments,2,C) = [0] this segment's part of a run that began
// before it, [1] of a run that begins in it and goes on behind it. Reads RC of dx.
template <class T, int N>
__global__ void __launch_bounds__(256) segment_kernel(acc_t<T>* dwte, acc_t<T>* parts, const T* dx, const int* tokens, const int* order, int R,
                                                      int C) {
  using A = acc_t<T>;
  const int begin = blockIdx.x * kSegment, end = R - begin < kSegment ? R : begin + kSegment;
  const int before = begin ? tokens[order[begin - 1]] : -1, behind = end < R ? tokens[order[end]] : -1;
  A* const part = parts + int64_t(blockIdx.x) * 2 * C;
  for_columns<N>(C, [=](int i, int n) {
    A sum[kColumns<N>];
    for (int k = 0; k < kColumns<N>; k++) sum[k] = 0;
    bool from_before = tokens[order[begin]] == before;
    for (int j = begin; j < end; j++) {
      const int row = order[j], token = tokens[row], next = j + 1 < end ? tokens[order[j + 1]] : -1;
      add_row<N>(sum, dx + int64_t(row) * C + i, n);
      if (token == next) continue;
      if (from_before) put_sum<N, false>(part + i, sum, n);
      else if (j + 1 == end && token == behind) put_sum<N, false>(part + C + i, sum, n);
      else put_sum<N, true>(dwte + int64_t(token) * C + i, sum, n);
      from_before = false;
    }
  });
}

// dwte += the runs that cross the border behind this block's segment and begin in it: their parts in the order of the segments
template <class A, int N>
__global__ void __launch_bounds__(256) crossing_kernel(A* dwte, const A* parts, const int* tokens, const int* order, int R, int C) {
  const int begin = blockIdx.x * kSegment, end = begin + kSegment;
  if (end >= R) return;
  const int token = tokens[order[end]];
  if (tokens[order[end - 1]] != token || (begin && tokens[order[begin - 1]] == token)) return;
  for_columns<N>(C, [=](int i, int n) {
    A sum[kColumns<N>];
    for (int k = 0; k < kColumns<N>; k++) sum[k] = 0;
    add_row<N>(sum, parts + (int64_t(blockIdx.x) * 2 + 1) * C + i, n);
    for (int j = end; j < R && tokens[order[j]] == token; j += kSegment) add_row<N>(sum, parts + int64_t(j / kSegment) * 2 * C + i, n);
    put_sum<N, true>(dwte + int64_t(token) * C + i, sum, n);
  });
}

// dwpe (T,C) += the rows of dx (R,C) at each position, first to last; one block a position; reads RC
template <class T, int N>
__global__ void __launch_bounds__(256) position_kernel(acc_t<T>* dwpe, const T* dx, int64_t R, int64_t period, int C) {
  using A = acc_t<T>;
  for_columns<N>(C, [=](int i, int n) {
    A sum[kColumns<N>];
    for (int k = 0; k < kColumns<N>; k++) sum[k] = 0;
    for (int64_t row = blockIdx.x; row < R; row += period) add_row<N>(sum, dx + row * C + i, n);
    put_sum<N, true>(dwpe + int64_t(blockIdx.x) * C + i, sum, n);
  });
}

}  // namespace

// ---- host side

void embedding_forward(const Tensor& x, const Tensor& tokens, const Tensor& wte, const Tensor& wpe, int64_t period, const Tensor& positions) {
  const int64_t C = wte.dim(-1), R = tokens.numel();
  ASSERT(positions.empty() || positions.numel() == R);
  ASSERT(x.numel() == R * C && wpe.numel() >= std::min(period, R) * C && wte.dtype() == x.dtype() && wpe.dtype() == x.dtype());
  if (!R) return;
  const int* const at = positions.empty() ? nullptr : positions.data<int>();
  DISPATCH_PACKS(x.dtype(), in_packs(C, {&x, &wte, &wpe}),
                 embedding_kernel<T, N><<<unsigned(R), kThreads, 0, device().compute>>>(x.data<T>(), tokens.data<int>(), at, wte.data<T>(),
                                                                                         wpe.data<T>(), period, int(C)));
}

std::vector<int> sort_rows(const std::vector<int>& tokens) {
  std::vector<int> order;
  for (size_t row = 0; row < tokens.size(); row++)
    if (tokens[row] >= 0) order.push_back(int(row));
  std::stable_sort(order.begin(), order.end(), [&](int a, int b) { return tokens[a] < tokens[b]; });
  return order;
}

void embedding_backward(const Tensor& dwte, const Tensor& dwpe, const Tensor& dx, const Tensor& tokens, const Tensor& order, int64_t period) {
  const int64_t C = dwte.dim(-1), R = tokens.numel(), sorted_rows = order.numel(), positions = std::min(period, R);
  ASSERT(dx.numel() == R * C && sorted_rows <= R && dwpe.numel() >= positions * C);
  ASSERT(dwte.dtype() == master_dtype(dx.dtype()) && dwpe.dtype() == dwte.dtype());
  if (!R) return;
  const unsigned segments = unsigned(ceil_div(sorted_rows, kSegment));
  const Tensor parts({segments, 2, C}, dwte.dtype(), Memory::workspace);
  const int* token = tokens.data<int>();
  const int* sorted = order.data<int>();
  const cudaStream_t stream = device().compute;
  DISPATCH_PACKS(dx.dtype(), in_packs(C, {&dx, &dwte, &dwpe}), using A = acc_t<T>;
                 if (segments) {
                   segment_kernel<T, N><<<segments, kThreads, 0, stream>>>(dwte.data<A>(), parts.data<A>(), dx.data<T>(), token, sorted,
                                                                           int(sorted_rows), int(C));
                   LAUNCHED();
                   crossing_kernel<A, N><<<segments, kThreads, 0, stream>>>(dwte.data<A>(), parts.data<A>(), token, sorted, int(sorted_rows), int(C));
                   LAUNCHED();
                 }
                 position_kernel<T, N><<<unsigned(positions), kThreads, 0, stream>>>(dwpe.data<A>(), dx.data<T>(), R, period, int(C)));
}
