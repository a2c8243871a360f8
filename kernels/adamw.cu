// adamw.cu: the optimizer's step, and the norm of all gradients that clips it.
//
// idea      the step is one pass over weights, moments and gradient, with the bias corrections computed once on the host. The sum of
//           squares runs in f64 over fixed chunks; a second launch adds the chunks' sums in their order. The clipping factor stays on
//           the device, so that the step waits for nobody.
// cost      adamw reads 4n and writes 3n (and n of the compute dtype); sum_of_squares reads n
// not here  AMSGrad, Nesterov momentum
// test      tests/test_kernels.cpp
#include "kernels/tiles.cuh"

namespace {

constexpr int kThreads = block_threads(256);

template <class A> struct Factors {  // m = keep1 m + take1 g, v = keep2 v + take2 g^2; correct: 1 / (1 - beta^step)
  A lr, keep1, take1, keep2, take2, correct1, correct2, eps, weight_decay;
  explicit Factors(const AdamW& o)
      : lr(A(o.lr)), keep1(A(o.beta1)), take1(A(1 - o.beta1)), keep2(A(o.beta2)), take2(A(1 - o.beta2)),
        correct1(A(1 / (1 - std::pow(o.beta1, double(o.step))))), correct2(A(1 / (1 - std::pow(o.beta2, double(o.step))))), eps(A(o.eps)),
        weight_decay(A(o.weight_decay)) {}
};

// weights, m, v (n) of A updated from gradient (n) * clip; compute (n) of T, if not null, = weights. Reads 4n, writes 3n (4n).
template <class T, int N>
__global__ void __launch_bounds__(256) adamw_kernel(acc_t<T>* weights, T* compute, acc_t<T>* m, acc_t<T>* v, const acc_t<T>* gradient,
                                                    const double* clip, Factors<acc_t<T>> f, int64_t n) {
  using A = acc_t<T>;
  const A scale = A(*clip);
  for_tile<kThreads, N>(n, [=](int64_t i, auto width) {
    constexpr int W = decltype(width)::value;
    auto pw = load_pack<W>(weights + i), pm = load_pack<W>(m + i), pv = load_pack<W>(v + i);
    const auto pg = load_pack<W>(gradient + i);
    Pack<T, W> pc;
    for (int k = 0; k < W; k++) {
      const A g = pg[k] * scale;
      pm[k] = f.keep1 * pm[k] + f.take1 * g;
      pv[k] = f.keep2 * pv[k] + f.take2 * g * g;
      pw[k] -= f.lr * (pm[k] * f.correct1 / (sqrt_of(pv[k] * f.correct2) + f.eps) + f.weight_decay * pw[k]);
      pc[k] = store<T>(pw[k]);
    }
    store_pack(weights + i, pw), store_pack(m + i, pm), store_pack(v + i, pv);
    if (compute) store_pack(compute + i, pc);
  });
}

// ---- the norm

constexpr int64_t kChunk = 1 << 16;

// out[chunk] = sum of squares of x's elements of that chunk, in f64; one block a chunk; reads n
template <class T, int N> __global__ void __launch_bounds__(256) squares_kernel(double* out, const T* x, int64_t n) {
  const int64_t begin = int64_t(blockIdx.x) * kChunk;
  const int size = int(n - begin < kChunk ? n - begin : kChunk), packed = size / N * N;
  x += begin;
  double sum = 0;
  for_row<kThreads, N>(packed, [&](int i) {
    const auto p = load_pack<N>(x + i);
    for (int k = 0; k < N; k++) sum += double(load(p[k])) * double(load(p[k]));
  });
  if (packed + int(threadIdx.x) < size) sum += double(load(x[packed + threadIdx.x])) * double(load(x[packed + threadIdx.x]));
  sum = block_reduce<Sum<double>>(sum);
  if (threadIdx.x == 0) out[blockIdx.x] = sum;
}

// out (1) = sum of x (n), in an order that n decides; one block
__global__ void __launch_bounds__(256) sum_kernel(double* out, const double* x, int64_t n) {
  double sum = 0;
  for (int64_t i = threadIdx.x; i < n; i += kThreads) sum += x[i];
  sum = block_reduce<Sum<double>>(sum);
  if (threadIdx.x == 0) *out = sum;
}

// norm = sqrt(squares (n), first to last), clip = min(1, limit / norm), or 1 without a limit; one thread: n is the number of parameters
__global__ void norm_kernel(double* norm, double* clip, const double* squares, int64_t n, double limit) {
  double sum = 0;
  for (int64_t i = 0; i < n; i++) sum += squares[i];
  *norm = sqrt(sum);
  *clip = limit > 0 && *norm > limit ? limit / *norm : 1;
}

}  // namespace

// ---- host side

void adamw(const Tensor& weights, const Tensor& compute, const Tensor& m, const Tensor& v, const Tensor& gradient, const Tensor& clip,
           const AdamW& options) {
  const int64_t n = weights.numel();
  const Dtype master = weights.dtype();
  ASSERT(master == Dtype::f32 || master == Dtype::f64);
  ASSERT(m.numel() == n && v.numel() == n && gradient.numel() == n && m.dtype() == master && v.dtype() == master && gradient.dtype() == master);
  ASSERT(compute.empty() || (compute.numel() == n && master_dtype(compute.dtype()) == master));
  ASSERT(clip.numel() == 1 && clip.dtype() == Dtype::f64 && options.step >= 1);
  if (!n) return;
  const bool casts = !compute.empty();
  DISPATCH_PACKS(casts ? compute.dtype() : master, in_packs(0, {&weights, &compute, &m, &v, &gradient}), using A = acc_t<T>;
                 constexpr int W = N > 1 ? kPack<A> : 1;
                 adamw_kernel<T, W><<<tiles(n), kThreads, 0, device().compute>>>(weights.data<A>(), casts ? compute.data<T>() : nullptr, m.data<A>(),
                                                                                 v.data<A>(), gradient.data<A>(), clip.data<double>(),
                                                                                 Factors<A>(options), n));
}

void sum_of_squares(const Tensor& out, int64_t index, const Tensor& x) {
  ASSERT(out.dtype() == Dtype::f64 && index >= 0 && index < out.numel());
  const int64_t n = x.numel(), chunks = std::max(ceil_div(n, kChunk), int64_t(1));
  const cudaStream_t stream = device().compute;
  double* result = out.data<double>() + index;
  const Tensor sums = chunks > 1 ? Tensor({chunks}, Dtype::f64, Memory::workspace) : Tensor();
  double* first = chunks > 1 ? sums.data<double>() : result;
  DISPATCH_PACKS(x.dtype(), in_packs(0, {&x}), squares_kernel<T, N><<<unsigned(chunks), kThreads, 0, stream>>>(first, x.data<T>(), n));
  if (chunks == 1) return;
  sum_kernel<<<1, kThreads, 0, stream>>>(result, first, chunks);
  LAUNCHED();
}

void norm_and_clip(const Tensor& norm, const Tensor& clip, const Tensor& squares, double limit) {
  ASSERT(norm.numel() == 1 && clip.numel() == 1 && norm.dtype() == Dtype::f64 && clip.dtype() == Dtype::f64 && squares.dtype() == Dtype::f64);
  norm_kernel<<<1, block_threads(1), 0, device().compute>>>(norm.data<double>(), clip.data<double>(), squares.data<double>(), squares.numel(),
                                                           limit);
  LAUNCHED();
}
