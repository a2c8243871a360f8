// layernorm.cu: layer normalisation (Ba et al., 2016), alone or with the residual add before it,
// and its backward.
//
// idea      one block a row. Forward: the row is read from memory once and kept in shared memory
//           for the variance and for the result. Backward: a block takes a chunk of consecutive
//           rows and keeps its sums for dgain and dbias in shared memory; each chunk's sums become
//           one row of a workspace, whose columns bias_backward adds up.
// cost      forward reads x (and h), writes y (and sum); backward reads dy, x (and residual),
//           writes dx, and at most 1024 rows of sums
// not here  other epsilons, layernorm without bias
// test      tests/test_kernels.cpp
#include "kernels/common.cuh"

namespace {

// ---- forward

constexpr int kForwardThreads = block_threads(128);
// more than the reductions' static shared memory
constexpr int64_t kStaticBytes = 1 << 10;
constexpr int64_t kSharedBytes = (48 << 10) - kStaticBytes;  // what a block may have without asking

// y (R,C) = layernorm(x), or with kAdd: sum (R,C) = x + (h + h_bias), y = layernorm(sum); mean,
// rstd (R).
// Reads and writes RC of each; any C. `keep`: the row fits into shared memory; else it is read
// again through the caches.
template <class T, int N, bool kAdd> __global__ void __launch_bounds__(128)
    forward_kernel(T* sum, T* y, acc_t<T>* mean, acc_t<T>* rstd, const T* x, const T* h,
                   const T* h_bias, const T* gain, const T* bias, int C, bool keep) {
  using A = acc_t<T>;
  extern __shared__ float4 shared_row[];
  const int64_t row = int64_t(blockIdx.x) * C;
  const T* in = x + row;
  T* kept = reinterpret_cast<T*>(shared_row);
  A total = 0;
  const auto take = [&](int i) {
    auto p = load_pack<N>(in + i);
    if constexpr (kAdd) {
      const auto q = load_pack<N>(h + row + i), b = load_pack<N>(h_bias + i);
      for (int k = 0; k < N; k++) p[k] = store<T>(load(p[k]) + (load(q[k]) + load(b[k])));
      store_pack(sum + row + i, p);
    }
    for (int k = 0; k < N; k++) total += load(p[k]);
    if (keep) store_pack(kept + i, p);
  };
  for_row<N>(C, take);
  if (kAdd) in = sum + row;
  if (keep) in = kept;  // a thread reads what it wrote itself: no barrier
  const A m = block_reduce<Sum<A>>(total) / C;

  A squares = 0;
  for_row<N>(C, [&](int i) {
    const auto p = load_pack<N>(in + i);
    for (int k = 0; k < N; k++) {
      const A d = load(p[k]) - m;
      squares += d * d;
    }
  });
  const A s = 1 / sqrt_of(block_reduce<Sum<A>>(squares) / C + A(1e-5));

  T* out = y + row;
  for_row<N>(C, [&](int i) {
    const auto p = load_pack<N>(in + i), g = load_pack<N>(gain + i), b = load_pack<N>(bias + i);
    Pack<T, N> r;
    for (int k = 0; k < N; k++) r[k] = store<T>((load(p[k]) - m) * s * load(g[k]) + load(b[k]));
    store_pack(out + i, r);
  });
  if (threadIdx.x == 0) mean[blockIdx.x] = m, rstd[blockIdx.x] = s;
}

// ---- backward

constexpr int kBackwardThreads = block_threads(256);

// Chunks of rows for R rows: from 8192 rows on enough blocks for a GPU, though those of narrow rows
// have few threads, and the workspace stays small.
inline int64_t row_chunks(int64_t R) { return std::min(ceil_div(R, 8), int64_t(1024)); }

// dx (R,C) = rstd (gain dy - a - xhat b) [+ residual], with xhat = (x - mean) rstd, a = mean of
// gain dy over the row, b = mean of gain dy xhat. dgain, dbias (chunks,C) = sums of dy xhat and of
// dy over the chunk's rows. One block a chunk; reads and writes RC of each; dx may be dy or
// residual; C as far as 2C sums fit into shared memory.
template <class T, int N, bool kResidual> __global__ void __launch_bounds__(256)
    backward_kernel(T* dx, acc_t<T>* dgain, acc_t<T>* dbias, const T* dy, const T* residual,
                    const T* x, const acc_t<T>* mean, const acc_t<T>* rstd, const T* gain,
                    int64_t R, int C) {
  using A = acc_t<T>;
  extern __shared__ float4 shared_sums[];
  // element k of pack i at k * packs + i: neighbouring threads, neighbouring banks
  A* gains = reinterpret_cast<A*>(shared_sums);
  A* biases = gains + C;
  const int packs = C / N;
  // a thread owns the same columns in every row: no barriers
  for_row<N>(C, [&](int i) {
    for (int k = 0; k < N; k++) gains[k * packs + i / N] = biases[k * packs + i / N] = 0;
  });
  const int64_t begin = R * blockIdx.x / gridDim.x, end = R * (blockIdx.x + 1) / gridDim.x;
  dx += begin * C, dy += begin * C, x += begin * C;
  if (kResidual) residual += begin * C;
  for (int64_t r = begin; r < end; r++) {
    const A m = mean[r], s = rstd[r];
    A sum_a = 0, sum_b = 0;
    for_row<N>(C, [&](int i) {
      const auto p = load_pack<N>(x + i), q = load_pack<N>(dy + i), g = load_pack<N>(gain + i);
      for (int k = 0; k < N; k++) {
        const A xhat = (load(p[k]) - m) * s, d = load(q[k]), gd = load(g[k]) * d;
        sum_a += gd;
        sum_b += gd * xhat;
        gains[k * packs + i / N] += d * xhat;
        biases[k * packs + i / N] += d;
      }
    });
    const Two<A> sums = block_reduce<SumTwo<A>>(Two<A>{sum_a, sum_b});
    const A a = sums.a / C, b = sums.b / C;
    for_row<N>(C, [&](int i) {  // x and dy again: from the first-level cache
      const auto p = load_pack<N>(x + i), q = load_pack<N>(dy + i), g = load_pack<N>(gain + i);
      Pack<T, N> more, result;
      if constexpr (kResidual) more = load_pack<N>(residual + i);
      for (int k = 0; k < N; k++) {
        const A d = s * (load(g[k]) * load(q[k]) - a - (load(p[k]) - m) * s * b);
        if constexpr (kResidual) result[k] = store<T>(load(more[k]) + d);
        else result[k] = store<T>(d);
      }
      store_pack(dx + i, result);
    });
    dx += C, dy += C, x += C;
    if (kResidual) residual += C;
  }
  for_row<N>(C, [&](int i) {
    Pack<A, N> g, b;
    for (int k = 0; k < N; k++) g[k] = gains[k * packs + i / N], b[k] = biases[k * packs + i / N];
    store_pack(dgain + int64_t(blockIdx.x) * C + i, g),
        store_pack(dbias + int64_t(blockIdx.x) * C + i, b);
  });
}

}  // namespace

// ---- host side

void add_layernorm_forward(const Tensor& sum, const Tensor& y, const Tensor& mean,
                           const Tensor& rstd, const Tensor& x, const Tensor& h,
                           const Tensor& h_bias, const Tensor& gain, const Tensor& bias) {
  OP("add_layernorm_forward", bytes_of(sum, y, mean, rstd, x, h, h_bias, gain, bias));
  const int64_t C = gain.numel(), R = mean.numel();
  ASSERT(x.numel() == R * C && y.numel() == R * C && rstd.numel() == R && bias.numel() == C);
  const bool adds = !h.empty();
  ASSERT(!adds || (h.numel() == R * C && sum.numel() == R * C && h_bias.numel() == C));
  if (!R) return;
  const int64_t bytes = C * int64_t(size_of(x.dtype()));
  const bool keep = bytes <= kSharedBytes;
  DISPATCH_PACKS(
      x.dtype(), in_packs(C, {&sum, &y, &x, &h, &h_bias, &gain, &bias}),
      const auto kernel = adds ? forward_kernel<T, N, true> : forward_kernel<T, N, false>;
      kernel<<<R, row_threads(C / N, kForwardThreads), keep ? bytes : 0, device().compute>>>(
          sum.data<T>(), y.data<T>(), mean.data<A>(), rstd.data<A>(), x.data<T>(), h.data<T>(),
          h_bias.data<T>(), gain.data<T>(), bias.data<T>(), C, keep));
}

void layernorm_forward(const Tensor& y, const Tensor& mean, const Tensor& rstd, const Tensor& x,
                       const Tensor& gain, const Tensor& bias) {
  OP("layernorm_forward", bytes_of(y, mean, rstd, x, gain, bias));
  add_layernorm_forward({}, y, mean, rstd, x, {}, {}, gain, bias);
}

void layernorm_backward(const Tensor& dx, const Tensor& dgain, const Tensor& dbias,
                        const Tensor& dy, const Tensor& residual, const Tensor& x,
                        const Tensor& mean, const Tensor& rstd, const Tensor& gain, bool add) {
  OP("layernorm_backward", bytes_of(dx, dgain, dbias, dy, residual, x, mean, rstd, gain));
  const int64_t C = gain.numel(), R = mean.numel();
  ASSERT(dx.numel() == R * C && dy.numel() == R * C && x.numel() == R * C && rstd.numel() == R);
  ASSERT(dgain.numel() == C && dbias.numel() == C &&
         (residual.empty() || residual.numel() == R * C));
  const Tensor dgains({row_chunks(R), C}, mean.dtype(), Memory::workspace),
      dbiases({row_chunks(R), C}, mean.dtype(), Memory::workspace);
  const int64_t bytes = 2 * C * int64_t(size_of(mean.dtype()));
  REQUIRE(bytes + kStaticBytes <= device().block_memory, "the layernorm of ", C, " channels keeps ",
          bytes, " bytes of sums in a block, and ", device().name, " has room for ",
          device().block_memory - kStaticBytes);
  if (R)
    DISPATCH_PACKS(
        x.dtype(), in_packs(C, {&dx, &dy, &residual, &x, &gain}),
        const auto kernel =
            residual.empty() ? backward_kernel<T, N, false> : backward_kernel<T, N, true>;
        if (bytes > kSharedBytes) allow_shared(kernel, bytes);
        kernel<<<dgains.dim(0), row_threads(C / N, kBackwardThreads), bytes, device().compute>>>(
            dx.data<T>(), dgains.data<A>(), dbiases.data<A>(), dy.data<T>(), residual.data<T>(),
            x.data<T>(), mean.data<A>(), rstd.data<A>(), gain.data<T>(), R, C));
  bias_backward(dgain, dgains, add);
  bias_backward(dbias, dbiases, add);
}
