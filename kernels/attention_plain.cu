// attention_plain.cu: causal self-attention as the formula says: scores, softmax, product.
//
// idea      scores (T,T) = q k^T / sqrt(D) for each head, softmax over the keys up to the query,
//           out = probabilities v. The products are batched over the heads and read q, k, v where
//           they lie, inside packed qkv: one head's rows are 3 H D elements apart.
// cost      forward 2, backward 4 products of (T,T,D) for each head, the half above the diagonal
//           included; B H T T probabilities are kept for the backward, which needs H T T more while
//           it runs: one sequence at a time
// not here  skipping what lies above the diagonal, and never storing (T,T): attention_flash.cu
// test      tests/test_attention.cpp
#include "kernels/common.cuh"

namespace {

constexpr int kThreads = block_threads(128);

// s (B,H,T,T) becomes probabilities: softmax over columns 0..t of row t, zero beyond; one block a
// row; reads it twice, writes it once; any T
template <class T> __global__ void __launch_bounds__(128)
    causal_softmax(T* __restrict__ s, int width) {
  using A = acc_t<T>;
  s += int64_t(blockIdx.x) * width;
  const int t = blockIdx.x % width;
  A most = Max<A>::identity;
  for (int i = threadIdx.x; i <= t; i += kThreads) most = Max<A>::combine(most, load(s[i]));
  most = block_reduce<Max<A>>(most);
  A sum = 0;
  for (int i = threadIdx.x; i <= t; i += kThreads) sum += exp_of(load(s[i]) - most);
  const A scale = 1 / block_reduce<Sum<A>>(sum);
  INDEPENDENT
  for (int i = threadIdx.x; i <= t; i += kThreads)
    s[i] = store<T>(exp_of(load(s[i]) - most) * scale);
  for (int i = t + 1 + threadIdx.x; i < width; i += kThreads) s[i] = store<T>(A(0));
}

// dp (H,T,T), the gradient of probabilities p, becomes that of scores: scale * p * (dp - sum of p
// dp); one block a row; reads both twice
template <class T> __global__ void __launch_bounds__(128)
    causal_softmax_backward(T* __restrict__ dp, const T* __restrict__ p, int width,
                            acc_t<T> scale) {
  using A = acc_t<T>;
  dp += int64_t(blockIdx.x) * width;
  p += int64_t(blockIdx.x) * width;
  const int t = blockIdx.x % width;
  A sum = 0;
  for (int i = threadIdx.x; i <= t; i += kThreads) sum += load(p[i]) * load(dp[i]);
  sum = block_reduce<Sum<A>>(sum);
  INDEPENDENT
  for (int i = threadIdx.x; i <= t; i += kThreads)
    dp[i] = store<T>(scale * load(p[i]) * (load(dp[i]) - sum));
  for (int i = t + 1 + threadIdx.x; i < width; i += kThreads) dp[i] = store<T>(A(0));
}

// Matrices of one sequence, batched over its heads
struct Sequence {
  const Tensor& of;
  int64_t b, T, H, D;
  char* at(int64_t element) const {
    return static_cast<char*>(of.raw()) + element * int64_t(size_of(of.dtype()));
  }
  // (B,T,3,H,D)
  Matrix packed(int64_t part, bool transposed = false) const {
    return {at((b * T * 3 + part) * H * D), 3 * H * D, transposed, D};
  }
  // (B,T,H,D)
  Matrix rows(bool transposed = false) const { return {at(b * T * H * D), H * D, transposed, D}; }
  // (B,H,T,T)
  Matrix scores(bool transposed = false) const { return {at(b * H * T * T), T, transposed, T * T}; }
};
constexpr int kQ = 0, kK = 1, kV = 2;

int64_t head_width(const Tensor& qkv, const Tensor& out, const Tensor& probabilities, int64_t B,
                   int64_t T, int64_t H) {
  const int64_t D = qkv.numel() / (B * T * 3 * H);
  ASSERT(qkv.numel() == B * T * 3 * H * D && out.numel() == B * T * H * D &&
             probabilities.numel() == B * H * T * T,
         to_string(qkv.shape()), ", ", to_string(out.shape()), ", ",
         to_string(probabilities.shape()), " with B = ", B, ", T = ", T, ", H = ", H);
  ASSERT(out.dtype() == qkv.dtype() && probabilities.dtype() == qkv.dtype());
  return D;
}

}  // namespace

void attention_plain_forward(const Tensor& out, const Tensor& probabilities, const Tensor& qkv,
                             int64_t B, int64_t T, int64_t H) {
  if (!qkv.numel()) return;
  const int64_t D = head_width(qkv, out, probabilities, B, T, H);
  const Dtype dtype = qkv.dtype();
  for (int64_t b = 0; b < B; b++) {
    const Sequence x{qkv, b, T, H, D}, p{probabilities, b, T, H, D};
    matmul(dtype, dtype, T, T, D, x.packed(kQ), x.packed(kK, true), p.scores(),
           1 / std::sqrt(double(D)), 0, H);
  }
  const unsigned rows = unsigned(B * H * T);
  const int width = int(T);
  DISPATCH(dtype, causal_softmax<T>
           <<<rows, kThreads, 0, device().compute>>>(probabilities.data<T>(), width));
  for (int64_t b = 0; b < B; b++) {
    const Sequence x{qkv, b, T, H, D}, p{probabilities, b, T, H, D}, y{out, b, T, H, D};
    matmul(dtype, dtype, T, D, T, p.scores(), x.packed(kV), y.rows(), 1, 0, H);
  }
}

void attention_plain_backward(const Tensor& dqkv, const Tensor& dout, const Tensor& probabilities,
                              const Tensor& qkv, int64_t B, int64_t T, int64_t H) {
  if (!qkv.numel()) return;
  const int64_t D = head_width(qkv, dout, probabilities, B, T, H);
  const Dtype dtype = qkv.dtype();
  ASSERT(dqkv.dtype() == dtype && dqkv.numel() == qkv.numel());
  // the gradient of probabilities, then of scores
  const Tensor scores({H, T, T}, dtype, Memory::workspace);
  const unsigned rows = unsigned(H * T);
  const int width = int(T);
  const double scale = 1 / std::sqrt(double(D));
  for (int64_t b = 0; b < B; b++) {
    const Sequence x{qkv, b, T, H, D}, dx{dqkv, b, T, H, D}, dy{dout, b, T, H, D},
        p{probabilities, b, T, H, D}, ds{scores, 0, T, H, D};
    const Tensor p_b = probabilities.part(b * H * T * T, {H, T, T});
    matmul(dtype, dtype, T, D, T, p.scores(true), dy.rows(), dx.packed(kV), 1, 0, H);
    matmul(dtype, dtype, T, T, D, dy.rows(), x.packed(kV, true), ds.scores(), 1, 0, H);
    DISPATCH(dtype, causal_softmax_backward<T><<<rows, kThreads, 0, device().compute>>>(
                        scores.data<T>(), p_b.data<T>(), width, acc_t<T>(scale)));
    matmul(dtype, dtype, T, D, T, ds.scores(), x.packed(kK), dx.packed(kQ), 1, 0, H);
    matmul(dtype, dtype, T, D, T, ds.scores(true), x.packed(kQ), dx.packed(kK), 1, 0, H);
  }
}
