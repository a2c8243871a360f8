// adamw.cu: the optimizer's step.
//
// idea      one pass over weights, moments and gradient, with the bias corrections computed once on
//           the host. The clipping factor is read on the device, so that the step waits for nobody.
// cost      reads 4n and writes 3n (and n of the compute dtype)
// not here  AMSGrad, Nesterov momentum
// test      tests/test_kernels.cpp
#include "kernels/tiles.cuh"

namespace {

constexpr int kThreads = block_threads(256);

// m = keep1 m + take1 g, v = keep2 v + take2 g^2; correct: 1 / (1 - beta^step)
template <class A> struct Factors {
  A lr, keep1, take1, keep2, take2, correct1, correct2, eps, weight_decay;
  explicit Factors(const AdamW& o)
      : lr(A(o.lr)),
        keep1(A(o.beta1)),
        take1(A(1 - o.beta1)),
        keep2(A(o.beta2)),
        take2(A(1 - o.beta2)),
        correct1(A(1 / (1 - std::pow(o.beta1, double(o.step))))),
        correct2(A(1 / (1 - std::pow(o.beta2, double(o.step))))),
        eps(A(o.eps)),
        weight_decay(A(o.weight_decay)) {}
};

// weights, m, v (n) of A updated from gradient (n) * clip; compute (n) of T, if not null, =
// weights. Reads 4n, writes 3n (4n).
template <class T, int N> __global__ void __launch_bounds__(256)
    adamw_kernel(acc_t<T>* weights, T* compute, acc_t<T>* m, acc_t<T>* v, const acc_t<T>* gradient,
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
      pw[k] -= f.lr * (pm[k] * f.correct1 / (sqrt_of(pv[k] * f.correct2) + f.eps) +
                       f.weight_decay * pw[k]);
      pc[k] = store<T>(pw[k]);
    }
    store_pack(weights + i, pw), store_pack(m + i, pm), store_pack(v + i, pv);
    if (compute) store_pack(compute + i, pc);
  });
}

}  // namespace

// ---- host side

void adamw(const Tensor& weights, const Tensor& compute, const Tensor& m, const Tensor& v,
           const Tensor& gradient, const Tensor& clip, const AdamW& options) {
  OP("adamw", bytes_of(weights, weights, m, m, v, v, gradient, compute));
  const int64_t n = weights.numel();
  const Dtype master = weights.dtype();
  ASSERT(master == Dtype::f32 || master == Dtype::f64);
  ASSERT(m.numel() == n && v.numel() == n && gradient.numel() == n && m.dtype() == master &&
         v.dtype() == master && gradient.dtype() == master);
  ASSERT(compute.empty() || (compute.numel() == n && master_dtype(compute.dtype()) == master));
  ASSERT(clip.numel() == 1 && clip.dtype() == Dtype::f64 && options.step >= 1);
  if (!n) return;
  const bool casts = !compute.empty();
  DISPATCH_PACKS(casts ? compute.dtype() : master,
                 in_packs(0, {&weights, &compute, &m, &v, &gradient}), using A = acc_t<T>;
                 constexpr int W = N > 1 ? kPack<A> : 1;
                 adamw_kernel<T, W><<<tiles(n), kThreads, 0, device().compute>>>(
                     weights.data<A>(), casts ? compute.data<T>() : nullptr, m.data<A>(),
                     v.data<A>(), gradient.data<A>(), clip.data<double>(), Factors<A>(options), n));
}
