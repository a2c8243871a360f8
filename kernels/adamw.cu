// adamw.cu: the optimizer's step.
//
// idea      one launch for all parameters, and one pass over weights, moments and gradient: a block
//           owns a line of a table, which says where they are. The bias corrections are computed
//           once on the host. The clipping factor is read on the device, so that the step waits for
//           nobody.
// cost      reads 4n and writes 3n (and n of the compute dtype)
// not here  AMSGrad, Nesterov momentum
// test      tests/test_kernels.cpp
#include "kernels/common.cuh"

namespace {

constexpr int kThreads = block_threads(256);

// m = keep1 m + take1 g, v = keep2 v + take2 g^2; correct: 1 / (1 - beta^step)
template <class A> struct Factors {
  A lr, keep1, take1, keep2, take2, correct1, correct2, eps, weight_decay;
  explicit Factors(const AdamW& o)
      : lr(o.lr),
        keep1(o.beta1),
        take1(1 - o.beta1),
        keep2(o.beta2),
        take2(1 - o.beta2),
        correct1(1 / (1 - std::pow(o.beta1, o.step))),
        correct2(1 / (1 - std::pow(o.beta2, o.step))),
        eps(o.eps),
        weight_decay(o.weight_decay) {}
};

// One block a piece: weights, m, v of A updated from gradient * clip; compute of T, if there, =
// weights. Of n elements in all reads 4n, writes 3n (4n).
template <class T, int N> __global__ void __launch_bounds__(256)
    adamw_kernel(const UpdatePiece* pieces, const double* clip, Factors<acc_t<T>> f) {
  using A = acc_t<T>;
  const UpdatePiece piece = pieces[blockIdx.x];
  A *const weights = static_cast<A*>(piece.weights), *const m = static_cast<A*>(piece.m),
           *const v = static_cast<A*>(piece.v);
  const A* const gradient = static_cast<const A*>(piece.gradient);
  T* const compute = static_cast<T*>(piece.compute);
  const A scale = A(*clip), decay = piece.decay ? f.weight_decay : A(0);
  for_packs<kThreads, N>(piece.size, [=](int i, auto width) {
    constexpr int W = decltype(width)::value;
    auto pw = load_pack<W>(weights + i), pm = load_pack<W>(m + i), pv = load_pack<W>(v + i);
    const auto pg = load_pack<W>(gradient + i);
    Pack<T, W> pc;
    for (int k = 0; k < W; k++) {
      const A g = pg[k] * scale;
      pm[k] = f.keep1 * pm[k] + f.take1 * g;
      pv[k] = f.keep2 * pv[k] + f.take2 * g * g;
      pw[k] -= f.lr * (pm[k] * f.correct1 / (sqrt_of(pv[k] * f.correct2) + f.eps) + decay * pw[k]);
      pc[k] = store<T>(pw[k]);
    }
    store_pack(weights + i, pw), store_pack(m + i, pm), store_pack(v + i, pv);
    if (compute) store_pack(compute + i, pc);
  });
}

}  // namespace

// ---- host side

void adamw(const UpdateTable& table, const Tensor& clip, const AdamW& options) {
  const Dtype master = master_dtype(table.compute);
  OP("adamw", double(table.elements *
                     (7 * size_of(master) + (table.compute != master) * size_of(table.compute))));
  ASSERT(clip.numel() == 1 && options.step >= 1);
  if (!table.size()) return;
  DISPATCH(table.compute, adamw_kernel<T, kPack<A>>
           <<<table.size(), kThreads, 0, device().compute>>>(table.data(), clip.data<double>(),
                                                             Factors<A>(options)));
}
