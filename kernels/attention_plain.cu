// attention_plain.cu: causal attention as the formula says: scores, softmax, product.
//
// idea      scores (Tq,Tk) = q k^T / sqrt(D) for each head, softmax over the keys that the query
//           sees, out = probabilities v. The products are batched over the heads and read q, k, v
//           where they lie, inside packed qkv: one head's rows are 3 H D elements apart.
// cost      forward 2, backward 4 products of (Tq,Tk,D) for each head, what no query sees included;
//           B H Tq Tk probabilities are kept for the backward, which needs H Tq Tk more while it
//           runs: one sequence at a time. Where they are not kept it has a product more.
// not here  skipping what lies above the diagonal, and never storing (Tq,Tk): attention_flash.cu
// test      tests/test_attention.cpp
#include "kernels/attention.cuh"

using namespace flash;

namespace {

constexpr int kThreads = block_threads(128);

// s (H,queries,keys) becomes probabilities: softmax over the first keys of a row, those that its
// query sees, zero beyond; lse (H,queries), if there is one: the logarithm of its sum; one block
// a row; reads it three times, writes it once
template <class T> __global__ void __launch_bounds__(128)
    causal_softmax(T* __restrict__ s, acc_t<T>* lse, Sizes n) {
  using A = acc_t<T>;
  s += int64_t(blockIdx.x) * n.keys.rows;
  const int seen = n.seen_by(blockIdx.x % n.queries.rows);
  A most = Max<A>::identity;
  for (int i = threadIdx.x; i < seen; i += kThreads) most = Max<A>::combine(most, load(s[i]));
  most = block_reduce<Max<A>>(most);
  A sum = 0;
  for (int i = threadIdx.x; i < seen; i += kThreads) sum += exp_of(load(s[i]) - most);
  sum = block_reduce<Sum<A>>(sum);
  const A scale = 1 / sum;
  INDEPENDENT
  for (int i = threadIdx.x; i < seen; i += kThreads)
    s[i] = store<T>(exp_of(load(s[i]) - most) * scale);
  for (int i = seen + threadIdx.x; i < n.keys.rows; i += kThreads) s[i] = store<T>(A(0));
  if (lse && threadIdx.x == 0) lse[blockIdx.x] = seen ? most + log_of(sum) : Max<A>::identity;
}

// s (H,queries,keys), scores, become exp(score - lse (H,queries)), zero for keys that are not seen;
// one block a row; reads and writes it once
template <class T> __global__ void __launch_bounds__(128)
    softmax_again(T* __restrict__ s, const acc_t<T>* lse, Sizes n) {
  using A = acc_t<T>;
  s += int64_t(blockIdx.x) * n.keys.rows;
  const int seen = n.seen_by(blockIdx.x % n.queries.rows);
  const A of_row = lse[blockIdx.x];
  INDEPENDENT
  for (int i = threadIdx.x; i < seen; i += kThreads) s[i] = store<T>(exp_of(load(s[i]) - of_row));
  for (int i = seen + threadIdx.x; i < n.keys.rows; i += kThreads) s[i] = store<T>(A(0));
}

// dp (H,queries,keys), the gradient of probabilities p, becomes that of scores: scale * p * (dp -
// delta (H,queries)), which is zero where p is; one block a row; reads both once
template <class T> __global__ void __launch_bounds__(128)
    causal_softmax_backward(T* __restrict__ dp, const T* __restrict__ p, const acc_t<T>* delta,
                            int keys, acc_t<T> scale) {
  using A = acc_t<T>;
  dp += int64_t(blockIdx.x) * keys;
  p += int64_t(blockIdx.x) * keys;
  const A of_row = delta[blockIdx.x];
  INDEPENDENT
  for (int i = threadIdx.x; i < keys; i += kThreads)
    dp[i] = store<T>(scale * load(p[i]) * (load(dp[i]) - of_row));
}

// The matrices of one of a tensor's sequences, batched over the heads
struct Heads : Parts {
  using Parts::Parts;
  Matrix part(int64_t b, int64_t part, bool transposed) const {
    return {begin(part, b), ld(), transposed, D};
  }
  Matrix first(int64_t b) const { return part(b, 0, false); }
  Matrix keys(int64_t b, bool transposed = false) const { return part(b, parts - 2, transposed); }
  Matrix values(int64_t b, bool transposed = false) const { return part(b, parts - 1, transposed); }
};

struct Problem {
  Sizes n;
  int64_t Tq, Tk;
  unsigned rows;  // of a sequence's scores
  double scale;
  Problem(const Tensor& out, const AttentionInputs& in)
      : n{.H = int(in.H),
          .D = int(out.numel() / (in.B * in.queries.rows() * in.H)),
          .queries = places_of(in.queries),
          .keys = places_of(in.keys)},
        Tq(n.queries.rows),
        Tk(n.keys.rows),
        rows(n.H * Tq),
        scale(1 / std::sqrt(n.D)) {
    ASSERT(Tk > 0, "queries without a key");
  }
  int64_t scores() const { return n.H * Tq * Tk; }  // of a sequence
  // (H,Tq,Tk)
  Matrix matrix(const Tensor& scores, bool transposed = false) const {
    return {scores.raw(), Tk, transposed, Tq * Tk};
  }
  Tensor of(const Tensor& all, int64_t b) const { return all.view(b * scores(), {n.H, Tq, Tk}); }
  Tensor rows_of(const Tensor& all, int64_t b) const { return all.view(b * rows, {rows}); }
  // s (H,Tq,Tk) = a b^T * factor, of queries and keys
  void multiply(const Tensor& s, Matrix a, Matrix b_transposed, double factor) const {
    matmul(s.dtype(), s.dtype(), Tq, Tk, n.D, a, b_transposed, matrix(s), factor, false, n.H);
  }
};

}  // namespace

void attention_plain_forward(const Tensor& out, const Tensor& lse, const Tensor& probabilities,
                             const AttentionInputs& in) {
  OP("attention_plain_forward", 0, 2 * flops_of_product(out, in));
  if (!out.numel()) return;
  const Problem x(out, in);
  const int64_t B = in.B, H = in.H;
  const Dtype dtype = in.q.dtype();
  const bool keeps = !probabilities.empty();
  ASSERT(!keeps || probabilities.numel() == B * x.scores(), to_string(probabilities.shape()),
         " with B = ", B, ", H = ", H, ", T = ", x.Tq);
  const Heads y(out, B, x.n.queries, x.n), qs(in.q, B, x.n.queries, x.n),
      kvs(in.kv, B, x.n.keys, x.n);
  const Tensor one = keeps ? Tensor() : Tensor({H, x.Tq, x.Tk}, dtype, Memory::workspace);
  for (int64_t b = 0; b < B; b++) {
    const Tensor p = keeps ? x.of(probabilities, b) : one;
    x.multiply(p, qs.first(b), kvs.keys(b, true), x.scale);
    const Tensor sums = lse.empty() ? lse : x.rows_of(lse, b);
    DISPATCH(dtype, causal_softmax<T>
             <<<x.rows, kThreads, 0, device().compute>>>(p.data<T>(), sums.data<A>(), x.n));
    matmul(dtype, out.dtype(), x.Tq, x.n.D, x.Tk, x.matrix(p), kvs.values(b), y.first(b), 1, false,
           H);
  }
}

void attention_plain_backward(const Tensor& dq, const Tensor& dkv, const Tensor& dout,
                              const Tensor& delta, const Tensor& lse, const Tensor& probabilities,
                              const AttentionInputs& in, bool add_dq) {
  OP("attention_plain_backward", 0, (probabilities.empty() ? 5 : 4) * flops_of_product(dout, in));
  if (!dout.numel()) return fill(dkv, 0);  // no query sees a key
  const Problem x(dout, in);
  const int64_t B = in.B, H = in.H;
  const Dtype dtype = in.q.dtype(), to = dq.dtype();
  ASSERT(dkv.dtype() == to && delta.numel() == B * x.rows);
  const Heads qs(in.q, B, x.n.queries, x.n), kvs(in.kv, B, x.n.keys, x.n),
      dqs(dq, B, x.n.queries, x.n), dkvs(dkv, B, x.n.keys, x.n), dy(dout, B, x.n.queries, x.n);
  const Tensor ds({H, x.Tq, x.Tk}, dtype, Memory::workspace);  // the gradient of probabilities, too
  const bool kept = !probabilities.empty();
  const Tensor again = kept ? Tensor() : Tensor(ds.shape(), dtype, Memory::workspace);
  for (int64_t b = 0; b < B; b++) {
    const Tensor p = kept ? x.of(probabilities, b) : again;
    if (!kept) {
      x.multiply(p, qs.first(b), kvs.keys(b, true), x.scale);
      DISPATCH(dtype, softmax_again<T><<<x.rows, kThreads, 0, device().compute>>>(
                          p.data<T>(), x.rows_of(lse, b).data<A>(), x.n));
    }
    matmul(dtype, to, x.Tk, x.n.D, x.Tq, x.matrix(p, true), dy.first(b), dkvs.values(b), 1, false,
           H);
    x.multiply(ds, dy.first(b), kvs.values(b, true), 1);
    DISPATCH(dtype, causal_softmax_backward<T><<<x.rows, kThreads, 0, device().compute>>>(
                        ds.data<T>(), p.data<T>(), x.rows_of(delta, b).data<A>(), x.Tk, x.scale));
    matmul(dtype, to, x.Tq, x.n.D, x.Tk, x.matrix(ds), kvs.keys(b), dqs.first(b), 1, add_dq, H);
    matmul(dtype, to, x.Tk, x.n.D, x.Tq, x.matrix(ds, true), qs.first(b), dkvs.keys(b), 1, false,
           H);
  }
}
