// elementwise.cu: add, add_bias, GELU and their backward.
//
// idea      each element is read and written once, in packs of 16 bytes. The only sum is the bias's gradient: chunks of rows are summed by
//           different blocks into one row each of a workspace, and a second launch sums those rows; no atomics, one order.
// cost      the bytes of the arguments; the workspace is at most 1/32 of dy
// not here  residual add with layernorm (layernorm.cu), bias inside the matrix product
// test      tests/test_kernels.cpp
#include "kernels/tiles.cuh"

namespace {

constexpr int kThreads = block_threads(256);

// y = f(a, b) for W neighbours; y may be a or b
template <int W, class T, class F> __device__ __forceinline__ void combine(T* y, const T* a, const T* b, F f) {
  const auto p = load_pack<W>(a), q = load_pack<W>(b);
  Pack<T, W> r;
  for (int k = 0; k < W; k++) r[k] = store<T>(f(load(p[k]), load(q[k])));
  store_pack(y, r);
}
template <class A> __device__ __forceinline__ A sum_of(A a, A b) { return a + b; }

// y (n) = a (n) + b (n); y may be a or b
template <class T, int N> __global__ void __launch_bounds__(256) add_kernel(T* y, const T* a, const T* b, int64_t n) {
  for_tile<kThreads, N>(n, [=](int64_t i, auto width) { combine<decltype(width)::value>(y + i, a + i, b + i, sum_of<acc_t<T>>); });
}

// ---- GELU, tanh form: 0.5 x (1 + tanh u) with u = sqrt(2/pi) (x + 0.044715 x^3), which is x / (1 + exp(-2u)): one exp, and small values
// keep all their digits, because nothing is subtracted from 1

template <class A> struct Gelu {
  A e, s;   // exp(-2u), and s = 1 / (1 + e); then 1 - s = e s
  A slope;  // d(2u)/dx
  __device__ __forceinline__ explicit Gelu(A x) {
    constexpr A a = A(1.5957691216057307117597842397375), b = A(a * 0.044715), most = sizeof(A) == 8 ? A(600) : A(60);
    const A square = x * x, u = -x * (a + b * square);
    e = exp_of(u < most ? u : most);  // no overflow, not even of e times x^3
    s = 1 / (1 + e);
    slope = a + 3 * b * square;
  }
};

// y (n) = gelu(x (n))
template <class T, int N> __global__ void __launch_bounds__(256) gelu_forward_kernel(T* y, const T* x, int64_t n) {
  for_tile<kThreads, N>(n, [=](int64_t i, auto width) {
    combine<decltype(width)::value>(y + i, x + i, x + i, [](acc_t<T> v, acc_t<T>) { return v * Gelu<acc_t<T>>(v).s; });
  });
}

// dx (n) = dy (n) * gelu'(x (n)); dx may be dy
template <class T, int N> __global__ void __launch_bounds__(256) gelu_backward_kernel(T* dx, const T* dy, const T* x, int64_t n) {
  for_tile<kThreads, N>(n, [=](int64_t i, auto width) {
    combine<decltype(width)::value>(dx + i, dy + i, x + i, [](acc_t<T> d, acc_t<T> v) {
      const Gelu<acc_t<T>> g(v);
      return d * g.s * (1 + v * g.slope * (g.e * g.s));
    });
  });
}

// ---- bias

// y (R,N) += bias (N); one block a row; reads RN, writes RN
template <class T, int N> __global__ void __launch_bounds__(256) add_bias_kernel(T* y, const T* bias, int columns) {
  y += int64_t(blockIdx.x) * columns;
  for_row<kThreads, N>(columns, [=](int i) { combine<N>(y + i, y + i, bias + i, sum_of<acc_t<T>>); });
}

// A lane owns this many neighbouring columns: a pack in registers; in FAST a run of columns in the first-level cache.
template <int N> constexpr int kColumns = kWarp == 1 ? 2048 : N;

// out (chunks,N) = sums of chunks of rows of x (R,N), or with kAdd: out (N) += the sum of the only chunk. Grid (blocks of columns, chunks);
// a block's warps take every kGroups-th row, and their sums are added in the order of the warps. Reads RN.
template <class T, int N, bool kAdd>
__global__ void __launch_bounds__(256) column_sums(acc_t<T>* out, const T* x, int64_t rows, int64_t columns) {
  using A = acc_t<T>;
  constexpr int kOwn = kColumns<N>, kGroups = kThreads / kWarp;
  const int lane = threadIdx.x % kWarp, group = threadIdx.x / kWarp;
  const int64_t block = int64_t(blockIdx.x) * kWarp * kOwn, first = block + lane * kOwn;
  const int64_t begin = rows * blockIdx.y / gridDim.y, end = rows * (blockIdx.y + 1) / gridDim.y;
  out += blockIdx.y * columns;
  A sum[kOwn];
  for (int k = 0; k < kOwn; k++) sum[k] = 0;

  if constexpr (kWarp == 1) {  // FAST
    const int own = columns - first < kOwn ? int(columns - first) : kOwn;
    const auto add = [&](int64_t r, auto rows) {  // so many rows arrive at a time
      const T* row = x + r * columns + first;
      INDEPENDENT
      for (int k = 0; k < own; k++) {
        A added = 0;
        for (int u = 0; u < decltype(rows)::value; u++) added += load(row[u * columns + k]);
        sum[k] += added;
      }
    };
    int64_t r = begin;
    for (; r + 8 <= end; r += 8) add(r, Width<8>());
    for (; r < end; r++) add(r, Width<1>());
    INDEPENDENT
    for (int k = 0; k < own; k++) out[first + k] = kAdd ? out[first + k] + sum[k] : sum[k];
    return;
  }
  __shared__ A part[kGroups][kOwn][kWarp];  // lanes side by side: no bank conflicts
  if (first < columns) {
#pragma unroll 4
    for (int64_t r = begin + group; r < end; r += kGroups) {
      const auto row = load_pack<N>(x + r * columns + first);
      for (int k = 0; k < N; k++) sum[k] += load(row[k]);
    }
  }
  for (int k = 0; k < kOwn; k++) part[group][k][lane] = sum[k];
  __syncthreads();
  for (int k = group; k < kOwn; k += kGroups) {
    const int64_t column = first + k;
    if (column >= columns) continue;
    A total = kAdd ? out[column] : A(0);
    for (int g = 0; g < kGroups; g++) total += part[g][k][lane];
    out[column] = total;
  }
}

}  // namespace

// ---- host side

void add(const Tensor& y, const Tensor& a, const Tensor& b) {
  const int64_t n = y.numel();
  ASSERT(a.numel() == n && b.numel() == n && a.dtype() == y.dtype() && b.dtype() == y.dtype());
  if (!n) return;
  DISPATCH_PACKS(y.dtype(), in_packs(0, {&y, &a, &b}),
                 add_kernel<T, N><<<tiles(n), kThreads, 0, device().compute>>>(y.data<T>(), a.data<T>(), b.data<T>(), n));
}

void gelu_forward(const Tensor& y, const Tensor& x) {
  const int64_t n = y.numel();
  ASSERT(x.numel() == n && x.dtype() == y.dtype());
  if (!n) return;
  DISPATCH_PACKS(y.dtype(), in_packs(0, {&y, &x}),
                 gelu_forward_kernel<T, N><<<tiles(n), kThreads, 0, device().compute>>>(y.data<T>(), x.data<T>(), n));
}

void gelu_backward(const Tensor& dx, const Tensor& dy, const Tensor& x) {
  const int64_t n = x.numel();
  ASSERT(dx.numel() == n && dy.numel() == n && dx.dtype() == x.dtype() && dy.dtype() == x.dtype());
  if (!n) return;
  DISPATCH_PACKS(x.dtype(), in_packs(0, {&dx, &dy, &x}),
                 gelu_backward_kernel<T, N><<<tiles(n), kThreads, 0, device().compute>>>(dx.data<T>(), dy.data<T>(), x.data<T>(), n));
}

void add_bias(const Tensor& y, const Tensor& bias) {
  const int64_t columns = bias.numel();
  ASSERT(columns && y.numel() % columns == 0 && y.dtype() == bias.dtype());
  const unsigned rows = unsigned(y.numel() / columns);
  if (!rows) return;
  DISPATCH_PACKS(y.dtype(), in_packs(columns, {&y, &bias}),
                 add_bias_kernel<T, N><<<rows, kThreads, 0, device().compute>>>(y.data<T>(), bias.data<T>(), int(columns)));
}

void bias_backward(const Tensor& dbias, const Tensor& dy) {
  const int64_t columns = dbias.numel();
  ASSERT(columns && dy.numel() % columns == 0 && dbias.dtype() == master_dtype(dy.dtype()));
  const int64_t rows = dy.numel() / columns;
  if (!rows) return;
  const bool packs = in_packs(columns, {&dy});
  const cudaStream_t stream = device().compute;
  DISPATCH_PACKS(dy.dtype(), packs, const unsigned blocks = unsigned(ceil_div(columns, kWarp * kColumns<N>));
                 const int64_t chunks = std::min(ceil_div(rows, kWarp == 1 ? 64 : 32), ceil_div(1024, blocks));
                 if (chunks == 1) {
                   column_sums<T, N, true><<<blocks, kThreads, 0, stream>>>(dbias.data<acc_t<T>>(), dy.data<T>(), rows, columns);
                 } else {
                   const Tensor sums({chunks, columns}, dbias.dtype(), Memory::workspace);
                   column_sums<T, N, false><<<dim3(blocks, unsigned(chunks)), kThreads, 0, stream>>>(sums.data<acc_t<T>>(), dy.data<T>(), rows, columns);
                   LAUNCHED();
                   column_sums<acc_t<T>, 1, true><<<unsigned(ceil_div(columns, kWarp * kColumns<1>)), kThreads, 0, stream>>>(
                       dbias.data<acc_t<T>>(), sums.data<acc_t<T>>(), chunks, columns);
                 });
}
