// elementwise.cu: add, GELU and its backward, each with the bias of the linear layer before it.
//
// idea      each element is read and written once, in packs of 16 bytes; a bias costs no pass
// cost      the bytes of the arguments
// not here  residual add with layernorm (layernorm.cu), bias inside the matrix product, the bias's
//           gradient (matvec.cu)
// test      tests/test_kernels.cpp
#include "kernels/tiles.cuh"

namespace {

constexpr int kThreads = block_threads(256);

// y (n) = f(a (n), b (n)); y may be a or b
template <class T, int N, class F> __global__ void __launch_bounds__(256)
    combine_kernel(T* y, const T* a, const T* b, int64_t n, F f) {
  for_tile<kThreads, N>(n, [=](int64_t i, auto width) {
    constexpr int W = decltype(width)::value;
    const auto p = load_pack<W>(a + i), q = load_pack<W>(b + i);
    Pack<T, W> r;
    for (int k = 0; k < W; k++) r[k] = store<T>(f(load(p[k]), load(q[k])));
    store_pack(y + i, r);
  });
}

// y (R,N) = f(a (R,N), b (R,N) + bias (N)); one block a row; y may be a or b
template <class T, int N, class F> __global__ void __launch_bounds__(256)
    combine_rows_kernel(T* y, const T* a, const T* b, const T* bias, int columns, F f) {
  const int64_t row = int64_t(blockIdx.x) * columns;
  y += row, a += row, b += row;
  for_row<N>(columns, [=](int i) {
    const auto p = load_pack<N>(a + i), q = load_pack<N>(b + i), s = load_pack<N>(bias + i);
    Pack<T, N> r;
    for (int k = 0; k < N; k++) r[k] = store<T>(f(load(p[k]), load(q[k]) + load(s[k])));
    store_pack(y + i, r);
  });
}

struct Add {
  template <class A> __device__ A operator()(A a, A b) const { return a + b; }
};
struct Second {
  template <class A> __device__ A operator()(A, A b) const { return b; }
};

// ---- GELU, tanh form
// 0.5 x (1 + tanh u) with u = sqrt(2/pi) (x + 0.044715 x^3), which is x / (1 + exp(-2u)): one exp,
// and small values keep all their digits, because nothing is subtracted from 1.

template <class A> struct Gelu {
  A x;      // at most 9 from 0: nothing overflows, and beyond s is 0 or 1 to all digits
  A e, s;   // exp(-2u), and s = 1 / (1 + e); then 1 - s = e s
  A slope;  // d(2u)/dx
  __device__ __forceinline__ explicit Gelu(A at) : x(at < -9 ? A(-9) : at > 9 ? A(9) : at) {
    constexpr A a = A(1.5957691216057307117597842397375), b = A(a * 0.044715);
    const A square = x * x;
    e = exp_of(-x * (a + b * square));
    s = 1 / (1 + e);
    slope = a + 3 * b * square;
  }
};

struct GeluForward {
  template <class A> __device__ __forceinline__ A operator()(A, A x) const {
    const Gelu<A> g(x);
    return (x > g.x ? x : g.x) * g.s;
  }
};
struct GeluBackward {
  template <class A> __device__ __forceinline__ A operator()(A dy, A x) const {
    const Gelu<A> g(x);
    return dy * g.s * (1 + g.x * g.slope * (g.e * g.s));
  }
};

// ---- host side

template <class F>
void combine(const Tensor& y, const Tensor& a, const Tensor& b, const Tensor& bias, F f) {
  const int64_t n = y.numel();
  ASSERT(a.numel() == n && b.numel() == n);
  if (!n) return;
  if (bias.empty()) {
    DISPATCH_PACKS(y.dtype(), in_packs(0, {&y, &a, &b}),
                   combine_kernel<T, N, F><<<tiles(n), kThreads, 0, device().compute>>>(
                       y.data<T>(), a.data<T>(), b.data<T>(), n, f));
  } else {
    const int64_t columns = bias.numel();
    ASSERT(n % columns == 0 && (y.shape().size() == 1 || y.shape().back() == columns), "a bias ",
           to_string(bias.shape()), " of rows ", to_string(y.shape()));
    DISPATCH_PACKS(y.dtype(), in_packs(columns, {&y, &a, &b, &bias}),
                   const unsigned threads = row_threads(columns / N, kThreads);
                   combine_rows_kernel<T, N, F><<<n / columns, threads, 0, device().compute>>>(
                       y.data<T>(), a.data<T>(), b.data<T>(), bias.data<T>(), columns, f));
  }
}

}  // namespace

void add(const Tensor& y, const Tensor& a, const Tensor& b, const Tensor& bias) {
  OP("add", bytes_of(y, a, b));
  combine(y, a, b, bias, Add());
}
void add_bias(const Tensor& y, const Tensor& bias) {
  OP("add_bias", bytes_of(y, y, bias));
  combine(y, y, y, bias, Second());
}
void gelu_forward(const Tensor& y, const Tensor& x, const Tensor& bias) {
  OP("gelu_forward", bytes_of(y, x));
  combine(y, x, x, bias, GeluForward());
}
void gelu_backward(const Tensor& dx, const Tensor& dy, const Tensor& x, const Tensor& bias) {
  OP("gelu_backward", bytes_of(dx, dy, x));
  combine(dx, dy, x, bias, GeluBackward());
}
