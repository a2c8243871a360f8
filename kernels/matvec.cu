// matvec.cu: a few rows times a whole matrix: what decoding one token of a few sequences is made
// of; and the sums of a matrix's columns, which are a row of ones times the matrix.
//
// idea      every weight is read once and used m times: bound by memory, where a tiled matrix
//           product would waste most of its tile. For y = x w a block owns neighbouring columns;
//           its threads share the rows of w out, keep sums in registers and add them up through
//           shared memory. For y = x w^T a row of w is one sum: a warp owns it. A matrix of many
//           rows and few columns is summed in chunks of rows, by different blocks, into one row
//           each of a workspace, which is summed in the same way until one chunk is left: no
//           atomics, one order.
// cost      reads KN once (from memory), mK for each block (from a cache), writes mN; the workspace
//           has at most a row for 64 that are summed
// order     of a sum: K, N and the width of the packs (dtype and alignment) decide it alone
// not here  splitting K over blocks for products of very narrow matrices
// test      tests/test_decode.cpp, tests/test_kernels.cpp
#include <columns.cuh>

namespace {

constexpr int kThreads = block_threads(256);
// Threads that share neighbouring columns; the groups of so many share the rows. A product wants
// many blocks, sums wide reads of few rows.
constexpr int kProductLanes = block_threads(2), kSumLanes = block_threads(32);
constexpr int kChunk = 128;  // rows; a chunk has more than half as many

// y (m,N) = x (m,K) w (K,N), m <= kM; or kSums, as if x were a row of ones: y (chunks,N) = the sums
// of each chunk's rows of w; `add`: +=. Grid (blocks of kLanes * kColumns columns, chunks of rows);
// reads w once.
template <int N, int kM, bool kSums, class Y, class T> __global__ void __launch_bounds__(256)
    columns_kernel(Y* y, const T* x, const T* w, int64_t K, int64_t columns, int m, bool add) {
  using A = acc_t<T>;
  constexpr int kLanes = kSums ? kSumLanes : kProductLanes, kOwn = kColumns<N>,
                kGroups = kThreads / kLanes;
  const int lane = threadIdx.x % kLanes, group = threadIdx.x / kLanes;
  const int64_t block = int64_t(blockIdx.x) * kLanes * kOwn, first = block + lane * kOwn;
  const int64_t begin = K * blockIdx.y / gridDim.y, end = K * (blockIdx.y + 1) / gridDim.y;
  A sum[kM][kOwn] = {};
  if (first < columns) {
    const auto n = own_columns<N>(columns - first);
    const auto add_rows = [&](int64_t k, auto rows) {
      constexpr int kRows = decltype(rows)::value;
      A factor[kM][kRows];
      for (int r = 0; r < kM; r++)
        for (int u = 0; u < kRows; u++)
          factor[r][u] = kSums ? A(1) : r < m ? A(load(x[r * K + k + u * kGroups])) : A(0);
      read_rows<kRows>(w + k * columns + first, kGroups * columns, n, [&](int j, const A* v) {
        for (int r = 0; r < kM; r++)
          for (int u = 0; u < kRows; u++) sum[r][j] += factor[r][u] * v[u];
      });
    };
    int64_t k = begin + group;
    for (; k + (kRowsAhead - 1) * kGroups < end; k += kRowsAhead * kGroups)
      add_rows(k, Width<kRowsAhead>());
    for (; k < end; k += kGroups) add_rows(k, Width<1>());
  }
  __shared__ A part[kGroups][kOwn][kLanes];  // lanes side by side
  UNROLL for (int r = 0; r < kM; r++) {      // over the groups, first to last
    if (r >= m) break;
    for (int j = 0; j < kOwn; j++) part[group][j][lane] = sum[r][j];
    __syncthreads();
    Y* const to = y + (int64_t(blockIdx.y) * m + r) * columns + block;
    INDEPENDENT
    for (int i = threadIdx.x; i < kLanes * kOwn; i += kThreads) {
      const int j = i / kLanes, l = i % kLanes, c = l * kOwn + j;
      if (block + c >= columns) continue;
      A all = add ? A(load(to[c])) : A(0);
      for (int g = 0; g < kGroups; g++) all += part[g][j][l];
      to[c] = store<Y>(all);
    }
    __syncthreads();
  }
}

// y (m,N) = x (m,K) w^T, w (N,K), m <= kM; a warp owns a row of w, which is read from memory once
// and from a cache m - 1 times
template <int N, int kM, class Y, class T> __global__ void __launch_bounds__(256)
    rows_kernel(Y* y, const T* x, const T* w, int64_t K, int64_t rows, int m) {
  using A = acc_t<T>;
  const int lane = threadIdx.x % kWarp;
  const int64_t row = int64_t(blockIdx.x) * (kThreads / kWarp) + threadIdx.x / kWarp;
  if (row >= rows) return;
  const T* const of = w + row * K;
  for (int r = 0; r < kM && r < m; r++) {
    const T* const xr = x + r * K;
    A sum = 0;
    for (int64_t k = lane * N; k < K; k += kWarp * N) {
      const auto p = load_pack<N>(of + k), q = load_pack<N>(xr + k);
      for (int j = 0; j < N; j++) sum += A(load(q[j])) * A(load(p[j]));
    }
    const A all = reduce_lanes<Sum<A>>(sum);
    if (lane == 0) y[r * rows + row] = store<Y>(all);
  }
}

template <int kM> void launch(const Tensor& y, const Tensor& x, const Tensor& w, bool transposed) {
  const int64_t K = x.dim(1), columns = y.dim(1);
  const int m = x.dim(0);
  if (transposed) {
    // (a warp of one thread, FAST's, reads rows from begin to end: no packs)
    DISPATCH_PACKS(
        w.dtype(), kWarp > 1 && in_packs(K, {&w, &x}),
        const auto to =
            [&]<class Y>(Y* y) {
              rows_kernel<N, kM, Y, T>
                  <<<ceil_div(columns, kThreads / kWarp), kThreads, 0, device().compute>>>(
                      y, x.data<T>(), w.data<T>(), K, columns, m);
            };
        y.dtype() == w.dtype() ? to(y.data<T>()) : to(y.data<acc_t<T>>()));
  } else {
    DISPATCH_PACKS(w.dtype(), in_packs(columns, {&w}),
                   const unsigned blocks = ceil_div(columns, kProductLanes * kColumns<N>);
                   columns_kernel<N, kM, false, T, T><<<blocks, kThreads, 0, device().compute>>>(
                       y.data<T>(), x.data<T>(), w.data<T>(), K, columns, m, false));
  }
}

}  // namespace

// ---- host side

void matvec(const Tensor& y, const Tensor& x, const Tensor& w, bool transposed) {
  OP("matvec", bytes_of(y, x, w));
  const int64_t m = x.dim(0);
  ASSERT(m >= 1 && m <= kMatvecRows && y.dim(0) == m && x.dim(1) == w.dim(transposed ? 1 : 0) &&
             y.dim(1) == w.dim(transposed ? 0 : 1) && (transposed || y.dtype() == w.dtype()),
         to_string(y.shape()), " = ", to_string(x.shape()), " ", to_string(w.shape()));
  if (m == 1) launch<1>(y, x, w, transposed);
  else if (m <= 4) launch<4>(y, x, w, transposed);
  else launch<8>(y, x, w, transposed);
}

void bias_backward(const Tensor& dbias, const Tensor& dy, bool add) {
  OP("bias_backward", bytes_of(dbias, dy));
  const int64_t columns = dbias.numel();
  ASSERT(columns && dy.numel() % columns == 0);
  const int64_t rows = dy.numel() / columns;
  if (!rows && !add) fill(dbias, 0);
  if (!rows) return;
  Tensor sums;
  DISPATCH_PACKS(dy.dtype(), in_packs(columns, {&dy}), const T* const none = nullptr;
                 const unsigned blocks = ceil_div(columns, kSumLanes * kColumns<N>);
                 const int64_t chunks = std::min(ceil_div(rows, kChunk), ceil_div(1024, blocks));
                 if (chunks > 1) sums = Tensor({chunks, columns}, dbias.dtype(), Memory::workspace);
                 A* const to = chunks > 1 ? sums.data<A>() : dbias.data<A>();
                 columns_kernel<N, 1, true, A, T>
                 <<<dim3(blocks, unsigned(chunks)), kThreads, 0, device().compute>>>(
                     to, none, dy.data<T>(), rows, columns, 1, add && chunks == 1));
  if (!sums.empty()) bias_backward(dbias, sums, add);
}
