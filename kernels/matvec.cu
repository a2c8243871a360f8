// matvec.cu: a few rows times a whole matrix: what decoding one token of a few sequences is made of.
//
// idea      every weight is read once and used m times: bound by memory, where a tiled matrix product would waste most of its tile. For
//           y = x w a block owns neighbouring columns; its threads share the rows of w out, keep sums in registers and add them up through
//           shared memory. For y = x w^T a row of w is one sum: a warp owns it.
// cost      reads KN once (from memory), mK for each block (from a cache), writes mN
// order     sums depend on K, N and the block's shape alone
// not here  splitting K over blocks for very narrow matrices
// test      tests/test_decode.cpp
#include "kernels/common.cuh"

namespace {

constexpr int kThreads = block_threads(256);
constexpr int kLanes = kWarp == 1 ? 1 : 8;               // that share neighbouring columns; the groups of kLanes share the rows
constexpr int kGroups = kThreads / kLanes;
constexpr int kAhead = kWarp == 1 ? 8 : 4;               // rows of w in flight
template <int N> constexpr int kMine = kWarp == 1 ? 1024 : N;  // columns of a thread: a pack; in FAST sums in the first-level cache

// sum[r][j] += x[r][k] * w[k][j] for the rows k, k + stride, ... of w (kRows of them) and n columns
template <int N, int kM, int kRows, class T, class A, int kWidth>
__device__ __forceinline__ void add_rows(A (&sum)[kM][kWidth], const T* x, const T* w, int64_t k, int64_t stride, int64_t K, int64_t columns, int m, int n) {
  A factor[kM][kRows];
  for (int r = 0; r < kM; r++)
    for (int u = 0; u < kRows; u++) factor[r][u] = r < m ? load(x[r * K + k + u * stride]) : A(0);
  if constexpr (kWarp == 1) {
    const T* row[kRows];
    for (int u = 0; u < kRows; u++) row[u] = w + (k + u * stride) * columns;
    for (int r = 0; r < kM; r++) {
      A* s = sum[r];
      INDEPENDENT
      for (int j = 0; j < n; j++) {
        A added = 0;
        for (int u = 0; u < kRows; u++) added += factor[r][u] * A(load(row[u][j]));
        s[j] += added;
      }
    }
  } else {
    Pack<T, N> p[kRows];
    for (int u = 0; u < kRows; u++) p[u] = load_pack<N>(w + (k + u * stride) * columns);
    for (int u = 0; u < kRows; u++)
      for (int r = 0; r < kM; r++)
        for (int j = 0; j < N; j++) sum[r][j] += factor[r][u] * A(load(p[u][j]));
  }
}

// y (m,N) = x (m,K) w (K,N), m <= kM; one block kLanes * kMine columns; reads its columns of w once
template <int N, int kM, class T> __global__ void __launch_bounds__(256) columns_kernel(T* y, const T* x, const T* w, int64_t K, int64_t columns, int m) {
  using A = acc_t<T>;
  constexpr int kWidth = kMine<N>;
  const int lane = threadIdx.x % kLanes, group = threadIdx.x / kLanes;
  const int64_t first = (int64_t(blockIdx.x) * kLanes + lane) * kWidth;
  const int n = first >= columns ? 0 : columns - first < kWidth ? int(columns - first) : kWidth;
  A sum[kM][kWidth] = {};
  if (n) {
    int64_t k = group;
    for (; k + (kAhead - 1) * kGroups < K; k += kAhead * kGroups) add_rows<N, kM, kAhead>(sum, x, w + first, k, kGroups, K, columns, m, n);
    for (; k < K; k += kGroups) add_rows<N, kM, 1>(sum, x, w + first, k, kGroups, K, columns, m, n);
  }
  __shared__ A part[kGroups * kLanes * (kWarp == 1 ? 1 : N)];
  for (int r = 0; r < kM && r < m; r++) {
    if constexpr (kWarp > 1) {  // over the groups, first to last
      for (int j = 0; j < N; j++) part[(group * kLanes + lane) * N + j] = sum[r][j];
      __syncthreads();
      for (int c = threadIdx.x; c < kLanes * N; c += kThreads) {
        A all = 0;
        for (int g = 0; g < kGroups; g++) all += part[g * kLanes * N + c];
        const int64_t column = int64_t(blockIdx.x) * kLanes * N + c;
        if (column < columns) y[r * columns + column] = store<T>(all);
      }
      __syncthreads();
    } else {
      INDEPENDENT
      for (int j = 0; j < n; j++) y[r * columns + first + j] = store<T>(sum[r][j]);
    }
  }
}

// y (m,N) = x (m,K) w^T, w (N,K), m <= kM; a warp owns a row of w, which is read from memory once and from a cache m - 1 times
template <int N, int kM, class T> __global__ void __launch_bounds__(256) rows_kernel(T* y, const T* x, const T* w, int64_t K, int64_t rows, int m) {
  using A = acc_t<T>;
  const int lane = threadIdx.x % kWarp;
  const int64_t row = int64_t(blockIdx.x) * (kThreads / kWarp) + threadIdx.x / kWarp;
  if (row >= rows) return;
  const T* const of = w + row * K;
  for (int r = 0; r < kM && r < m; r++) {
    const T* const xr = x + r * K;
    A sum = 0;
    if constexpr (kWarp == 1) {
      for (int64_t k = 0; k < K; k++) sum += A(load(xr[k])) * A(load(of[k]));
    } else {
      for (int64_t k = lane * N; k < K; k += kWarp * N) {
        const auto p = load_pack<N>(of + k);
        for (int j = 0; j < N; j++) sum += A(load(xr[k + j])) * A(load(p[j]));
      }
    }
    const A all = reduce_lanes<Sum<A>>(sum);
    if (lane == 0) y[r * rows + row] = store<T>(all);
  }
}

template <int kM> void launch(const Tensor& y, const Tensor& x, const Tensor& w, bool transposed) {
  const int64_t K = x.dim(1), columns = y.dim(1);
  const int m = int(x.dim(0));
  const bool packs = in_packs(w.dim(1), {&w});
  if (transposed) {
    DISPATCH_PACKS(w.dtype(), packs, rows_kernel<N, kM, T><<<unsigned(ceil_div(columns, kThreads / kWarp)), kThreads, 0, device().compute>>>(
                                         y.data<T>(), x.data<T>(), w.data<T>(), K, columns, m));
  } else {
    DISPATCH_PACKS(w.dtype(), packs, columns_kernel<N, kM, T><<<unsigned(ceil_div(columns, kLanes * kMine<N>)), kThreads, 0, device().compute>>>(
                                         y.data<T>(), x.data<T>(), w.data<T>(), K, columns, m));
  }
}

}  // namespace

void matvec(const Tensor& y, const Tensor& x, const Tensor& w, bool transposed) {
  const int64_t m = x.dim(0);
  ASSERT(m >= 1 && m <= kMatvecRows && y.dim(0) == m && x.dim(1) == w.dim(transposed ? 1 : 0) && y.dim(1) == w.dim(transposed ? 0 : 1),
         to_string(y.shape()), " = ", to_string(x.shape()), " ", to_string(w.shape()));
  if (m == 1) launch<1>(y, x, w, transposed);
  else if (m == 2) launch<2>(y, x, w, transposed);
  else if (m <= 4) launch<4>(y, x, w, transposed);
  else launch<8>(y, x, w, transposed);
}
