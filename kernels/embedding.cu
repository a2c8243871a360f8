// embedding.cu: token and position embeddings, and their gradients without atomics.
//
// idea      the gradient of a token's row is the sum of the rows of dx where that token stands.
//           With the rows sorted by token each token is one run. Runs are short or (a space, in
//           text by bytes) a fifth of everything, so a block takes not a run but kSegment
//           consecutive places of the sorted order: a run inside them is added to dwte at once; a
//           run that crosses their border leaves its part in a workspace, and the block where the
//           run begins adds the parts up, first to last, in a second launch. The gradient of the
//           positions is a bias's, if each sequence is one long row.
// cost      forward reads and writes RC; backward reads RC twice (by token, by position), updates
//           each dwte row in use once, and clears RC/4 sums of parts
// test      tests/test_kernels.cpp
#include <columns.cuh>

#include <algorithm>

namespace {

constexpr int kThreads = block_threads(256);
constexpr int kSegment = 8;

// x (R,C) = wte (V,C)[tokens (R)] + wpe (T,C)[positions (R), or row % T], 0 where the token is -1;
// one block a row; reads 2RC, writes RC
template <class T, int N> __global__ void __launch_bounds__(256)
    embedding_kernel(T* x, const int* tokens, const int* positions, const T* wte, const T* wpe,
                     int64_t period, int C) {
  const int64_t row = blockIdx.x;
  x += row * C;
  if (tokens[row] < 0) {
    const Pack<T, N> zero{};
    return for_row<N>(C, [=](int i) { store_pack(x + i, zero); });
  }
  wte += int64_t(tokens[row]) * C;
  wpe += (positions ? positions[row] : row % period) * C;
  for_row<N>(C, [=](int i) {
    const auto p = load_pack<N>(wte + i), q = load_pack<N>(wpe + i);
    Pack<T, N> r;
    for (int k = 0; k < N; k++) r[k] = store<T>(load(p[k]) + load(q[k]));
    store_pack(x + i, r);
  });
}

// sum (n) += row (n)
template <class W, class T, class A>
__device__ __forceinline__ void add_row(A* sum, const T* row, W n) {
  read_columns(row, n, [&](int k, A v) { sum[k] += v; });
}
// to (n) += sum (n), sum = 0
template <class W, class A> __device__ __forceinline__ void move_sum(A* to, A* sum, W n) {
  change_columns(to, n, [&](int k, A v) {
    const A all = v + sum[k];
    sum[k] = 0;
    return all;
  });
}

// dwte (V,C) += the runs that lie within this block's segment of `order`; parts (segments,2,C) +=
// [0] this segment's part of a run that began before it, [1] of a run that begins in it and goes on
// after it. Reads RC of dx.
template <class T, int N> __global__ void __launch_bounds__(256)
    segment_kernel(acc_t<T>* dwte, acc_t<T>* parts, const T* dx, const int* tokens,
                   const int* order, int R, int C) {
  const int begin = blockIdx.x * kSegment, end = R - begin < kSegment ? R : begin + kSegment;
  const int before = begin ? tokens[order[begin - 1]] : -1,
            after = end < R ? tokens[order[end]] : -1;
  acc_t<T>* const part = parts + int64_t(blockIdx.x) * 2 * C;
  for_columns<kThreads, N>(C, [=](int i, auto n) {
    acc_t<T> sum[kColumns<N>] = {};
    bool from_before = tokens[order[begin]] == before;
#pragma unroll 1
    for (int j = begin; j < end; j++) {
      const int row = order[j], token = tokens[row], next = j + 1 < end ? tokens[order[j + 1]] : -1;
      add_row(sum, dx + int64_t(row) * C + i, n);
      if (token == next) continue;
      const bool goes_on = j + 1 == end && token == after;
      acc_t<T>* const to = from_before ? part : goes_on ? part + C : dwte + int64_t(token) * C;
      move_sum(to + i, sum, n);
      from_before = false;
    }
  });
}

// dwte += the runs that cross the border after this block's segment and begin in it: their parts
// in the order of the segments
template <class A, int N> __global__ void __launch_bounds__(256)
    crossing_kernel(A* dwte, const A* parts, const int* tokens, const int* order, int R, int C) {
  const int begin = blockIdx.x * kSegment, end = begin + kSegment;
  if (end >= R) return;
  const int token = tokens[order[end]];
  if (tokens[order[end - 1]] != token || (begin && tokens[order[begin - 1]] == token)) return;
  for_columns<kThreads, N>(C, [=](int i, auto n) {
    A sum[kColumns<N>] = {};
    add_row(sum, parts + (int64_t(blockIdx.x) * 2 + 1) * C + i, n);
    for (int j = end; j < R && tokens[order[j]] == token; j += kSegment)
      add_row(sum, parts + int64_t(j / kSegment) * 2 * C + i, n);
    move_sum(dwte + int64_t(token) * C + i, sum, n);
  });
}

}  // namespace

// ---- host side

void embedding_forward(const Tensor& x, const Tensor& tokens, const Tensor& wte, const Tensor& wpe,
                       int64_t period, const Tensor& positions) {
  OP("embedding_forward", 2 * bytes_of(x));
  const int64_t C = wte.dim(1), R = tokens.numel();
  ASSERT(positions.empty() || positions.numel() == R);
  ASSERT(x.numel() == R * C && wpe.numel() >= std::min(period, R) * C);
  if (!R) return;
  DISPATCH_PACKS(x.dtype(), in_packs(C, {&x, &wte, &wpe}),
                 embedding_kernel<T, N><<<R, row_threads(C / N, kThreads), 0, device().compute>>>(
                     x.data<T>(), tokens.data<int>(), positions.data<int>(), wte.data<T>(),
                     wpe.data<T>(), period, C));
}

std::vector<int> sort_rows(const std::vector<int>& tokens) {
  std::vector<int> order;
  for (size_t row = 0; row < tokens.size(); row++)
    if (tokens[row] >= 0) order.push_back(row);
  std::ranges::stable_sort(order, {}, [&](int row) { return tokens[row]; });
  return order;
}

void embedding_backward(const Tensor& dwte, const Tensor& dwpe, const Tensor& dx,
                        const Tensor& tokens, const Tensor& order, const Positions& places) {
  OP("embedding_backward", bytes_of(dx));  // once; the rows of dwte depend on the tokens
  const int64_t C = dwte.dim(1), R = tokens.numel(), sorted_rows = order.numel(),
                positions = std::min(places.rows(), R);
  ASSERT(dx.numel() == R * C && sorted_rows <= R && (!R || R % positions == 0));
  if (!R) return;
  // dx (sequences, positions C): the positions of a sequence are the columns
  if (places.high.size() == 0) bias_backward(dwpe.view(places.low.begin * C, {positions * C}), dx);
  else {
    const Tensor sums({positions * C}, dwpe.dtype(), Memory::workspace);
    bias_backward(sums, dx, false);
    int64_t row = 0;
    for (const Range& piece : {places.low, places.high}) {
      const Tensor to = dwpe.view(piece.begin * C, {piece.size() * C});
      add(to, to, sums.view(row * C, to.shape()));
      row += piece.size();
    }
  }
  const unsigned segments = ceil_div(sorted_rows, kSegment);
  if (!segments) return;
  const Tensor parts({segments, 2, C}, dwte.dtype(), Memory::workspace);
  fill(parts, 0);
  const int *token = tokens.data<int>(), *sorted = order.data<int>();
  const cudaStream_t stream = device().compute;
  DISPATCH_PACKS(dx.dtype(), in_packs(C, {&dx, &dwte}),
                 segment_kernel<T, N><<<segments, kThreads, 0, stream>>>(
                     dwte.data<A>(), parts.data<A>(), dx.data<T>(), token, sorted, sorted_rows, C);
                 LAUNCHED(); crossing_kernel<A, N><<<segments, kThreads, 0, stream>>>(
                     dwte.data<A>(), parts.data<A>(), token, sorted, sorted_rows, C));
}
