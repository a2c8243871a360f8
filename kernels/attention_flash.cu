// attention_flash.cu: causal self-attention that never stores the (T,T) scores (Dao et al., "FlashAttention", 2022, algorithms 1 and 4).
#include "kernels/block_product.cuh"

namespace {

// ---- shapes

template <class T, int kD_> struct Shape_ {
  using A = acc_t<T>;
  static constexpr bool kFast = kWarp == 1;
  static constexpr int kD = kD_, kThreads = kProductThreads, kPad = kFast ? 0 : 1;
  static constexpr int kTile = kFast || kD * sizeof(A) <= 256 ? 64 : kD * sizeof(A) <= 512 ? 32 : 16;  // queries, keys
  static constexpr int kRowLanes = kThreads > kTile ? kThreads / kTile : 1, kOwnRows = kTile * kRowLanes / kThreads;
  static constexpr int kLdD = kD + kPad * 16 / int(sizeof(A));
  static constexpr int kLdT = kTile + kPad * 4;
  static constexpr int kLdP = kTile + kPad * kTile / 2 / int(sizeof(A));
  static constexpr int kRows = kTile * kLdD, kColumns = kD * kLdT;
  using Scores = BlockProduct<A, kTile, kTile>;
  using Output = BlockProduct<A, kTile, kD>;
};

// One head of one sequence: row t of a tensor lies at data + t * ld
template <class T> struct Head {
  T* data;
  int64_t ld;
};

struct Sizes {
  int T, H, D;
  bool packs;
  template <class X> __device__ Head<X> packed(X* qkv, int part) const {  // q, k or v of qkv (B,T,3,H,D)
    const int64_t b = blockIdx.y / H, h = blockIdx.y % H;
    return {qkv + ((b * T * 3 + part) * H + h) * D, int64_t(3) * H * D};
  }
  template <class X> __device__ Head<X> rows(X* x) const {  // of x (B,T,H,D)
    const int64_t b = blockIdx.y / H, h = blockIdx.y % H;
    return {x + (b * T * H + h) * D, int64_t(H) * D};
  }
};

template <class S, bool kTransposed, class T> __device__ __forceinline__ void load_tile(typename S::A* tile, Head<const T> x, int first, Sizes n, typename S::A scale = 1) {
  constexpr int kRun = 16 / int(sizeof(T)), kRuns = S::kD / kRun, kBeside = !kTransposed ? kRuns : sizeof(T) == sizeof(typename S::A) ? 2 : 1;
  for (int i = threadIdx.x; i < S::kTile * kRuns; i += S::kThreads) {
    const int row = i / kBeside % S::kTile, d = (i % kBeside + i / kBeside / S::kTile * kBeside) * kRun;
    const int inside = first + row < n.T ? n.D - d : 0;
    const T* p = x.data + (first + row) * x.ld + d;
    Pack<T, kRun> v;
    if (n.packs && inside >= kRun) v = load_pack<kRun>(p);
    else for (int e = 0; e < kRun; e++) v.v[e] = e < inside ? p[e] : T(0.0f);
    for (int e = 0; e < kRun; e++) tile[kTransposed ? (d + e) * S::kLdT + row : row * S::kLdD + d + e] = load(v.v[e]) * scale;
  }
}

// x (tile rows, D) = product * scale
template <class S, class T, class F> __device__ __forceinline__ void store_tile(Head<T> x, int first, Sizes n, typename S::Output& product, F scale) {
  constexpr int kRun = S::Output::kColumnRun;
  product.for_each_run([&](int row, int d, const typename S::A* v) {
    if (first + row >= n.T || d >= n.D) return;
    T* p = x.data + (first + row) * x.ld + d;
    const auto f = scale(row);
    if (n.packs && d + kRun <= n.D) {
      Pack<T, kRun> run;
      for (int e = 0; e < kRun; e++) run.v[e] = store<T>(v[e] * f);
      store_pack<kRun>(p, run);
    } else {
      for (int e = 0; e < kRun && d + e < n.D; e++) p[e] = store<T>(v[e] * f);
    }
  });
}

template <template <class> class Op, int kLanes, class A> __device__ __forceinline__ A reduce_lanes(A v) {
  for (int o = kLanes / 2; o > 0; o >>= 1) v = Op<A>::combine(v, __shfl_xor_sync(~0u, v, o));
  return v;
}

// ---- forward

template <class S> struct OnlineSoftmax {
  using A = typename S::A;
  A most[S::kOwnRows], sum[S::kOwnRows];
  int first, lane;
  __device__ OnlineSoftmax() : first(threadIdx.x / S::kRowLanes * S::kOwnRows), lane(threadIdx.x % S::kRowLanes) {
    for (int r = 0; r < S::kOwnRows; r++) most[r] = Max<A>::identity, sum[r] = 0;
  }
  __device__ __forceinline__ void add(A* s, A* factor, int ahead) {
    A now[S::kOwnRows], more[S::kOwnRows];
    s += first;
    for (int r = 0; r < S::kOwnRows; r++) now[r] = most[r], more[r] = 0;
    for (int key = lane; key < S::kTile; key += S::kRowLanes)
      for (int r = 0; r < S::kOwnRows; r++) {
        const A larger = Max<A>::combine(now[r], s[key * S::kLdP + r]);
        now[r] = key <= first + r + ahead ? larger : now[r];
      }
    for (int r = 0; r < S::kOwnRows; r++) now[r] = reduce_lanes<Max, S::kRowLanes>(now[r]);
    for (int key = lane; key < S::kTile; key += S::kRowLanes)
      for (int r = 0; r < S::kOwnRows; r++) {
        const A e = exp_of(s[key * S::kLdP + r] - now[r]), p = key <= first + r + ahead ? e : 0;
        s[key * S::kLdP + r] = p;
        more[r] += p;
      }
    for (int r = 0; r < S::kOwnRows; r++) {
      const A old = sum[r] == 0 ? A(0) : exp_of(most[r] - now[r]);
      sum[r] = sum[r] * old + reduce_lanes<Sum, S::kRowLanes>(more[r]);
      most[r] = now[r];
      if (lane == 0) factor[first + r] = old;
    }
  }
};

template <class T, int kD>
__global__ void __launch_bounds__(256) flash_forward(T* out, acc_t<T>* lse, const T* qkv, Sizes n, acc_t<T> scale) {
  using S = Shape_<T, kD>;
  using A = acc_t<T>;
  extern __shared__ alignas(64) char shared[];
  A *q = reinterpret_cast<A*>(shared), *kv = q + S::kColumns, *p = kv + S::kRows, *factor = p + S::kTile * S::kLdP;
  const int q0 = (gridDim.x - 1 - blockIdx.x) * S::kTile;
  load_tile<S, true>(q, n.packed(qkv, 0), q0, n, scale);
  OnlineSoftmax<S> softmax;
  typename S::Output o;
  o.clear();
  for (int k0 = 0; k0 <= q0; k0 += S::kTile) {
    load_tile<S, false>(kv, n.packed(qkv, 1), k0, n);
    __syncthreads();
    typename S::Scores s;
    s.clear();
    s.template add<true>(kv, S::kLdD, q, S::kLdT, kD);
    s.for_each_run([&](int key, int row, const A* v) {
      for (int e = 0; e < S::Scores::kColumnRun; e++) p[key * S::kLdP + row + e] = v[e];
    });
    __syncthreads();
    load_tile<S, false>(kv, n.packed(qkv, 2), k0, n);
    softmax.add(p, factor, q0 - k0);
    __syncthreads();
    o.for_each_run([&](int row, int, A* v) {
      for (int e = 0; e < S::Output::kColumnRun; e++) v[e] *= factor[row];
    });
    o.template add<false>(p, S::kLdP, kv, S::kLdD, S::kTile);
    __syncthreads();
  }
  for (int r = 0; r < S::kOwnRows; r++) {
    const int row = softmax.first + r;
    if (softmax.lane == 0) {
      factor[row] = 1 / softmax.sum[r];
      if (q0 + row < n.T) lse[int64_t(blockIdx.y) * n.T + q0 + row] = softmax.most[r] + log_of(softmax.sum[r]);
    }
  }
  __syncthreads();
  store_tile<S>(n.rows(out), q0, n, o, [=](int row) { return factor[row]; });
}

// ---- backward

template <class T, int kD>
__global__ void __launch_bounds__(256) flash_backward_q(T* dqkv, acc_t<T>* delta, const T* dout, const T* out, const acc_t<T>* lse, const T* qkv, Sizes n, acc_t<T> scale) {
  using S = Shape_<T, kD>;
  using A = acc_t<T>;
  extern __shared__ alignas(64) char shared[];
  A *q = reinterpret_cast<A*>(shared), *dy = q + S::kColumns, *k = dy + S::kColumns, *v = k + S::kRows, *ds = v + S::kRows;
  A *row_lse = ds + S::kTile * S::kTile, *row_delta = row_lse + S::kTile;
  const int q0 = (gridDim.x - 1 - blockIdx.x) * S::kTile;
  load_tile<S, true>(q, n.packed(qkv, 0), q0, n, scale);
  load_tile<S, true>(dy, n.rows(dout), q0, n);
  const Head<const T> y = n.rows(out), g = n.rows(dout);
  for (int i = threadIdx.x / S::kRowLanes; i < S::kTile; i += S::kThreads / S::kRowLanes) {
    const int lane = threadIdx.x % S::kRowLanes;
    const bool there = q0 + i < n.T;
    A sum = 0;
    if (there) for (int d = lane; d < n.D; d += S::kRowLanes) sum += load(y.data[(q0 + i) * y.ld + d]) * load(g.data[(q0 + i) * g.ld + d]);
    sum = reduce_lanes<Sum, S::kRowLanes>(sum);
    if (lane == 0) {
      row_delta[i] = sum;
      row_lse[i] = there ? lse[int64_t(blockIdx.y) * n.T + q0 + i] : A(0);
      if (there) delta[int64_t(blockIdx.y) * n.T + q0 + i] = sum;
    }
  }
  typename S::Output dq;
  dq.clear();
  for (int k0 = 0; k0 <= q0; k0 += S::kTile) {
    load_tile<S, false>(k, n.packed(qkv, 1), k0, n);
    load_tile<S, false>(v, n.packed(qkv, 2), k0, n);
    __syncthreads();
    typename S::Scores s, dp;
    s.clear();
    dp.clear();
    s.template add<true>(k, S::kLdD, q, S::kLdT, kD);
    dp.template add<true>(v, S::kLdD, dy, S::kLdT, kD);
    s.for_each_run([&](int key, int row, const A* s, const A* dp) {
      for (int e = 0; e < S::Scores::kColumnRun; e++) {
        const A x = exp_of(s[e] - row_lse[row + e]) * (dp[e] - row_delta[row + e]);
        ds[key * S::kTile + row + e] = k0 + key <= q0 + row + e ? x : A(0);
      }
    }, dp);
    __syncthreads();
    dq.template add<false>(ds, S::kTile, k, S::kLdD, S::kTile);
    __syncthreads();
  }
  store_tile<S>(n.packed(dqkv, 0), q0, n, dq, [=](int) { return scale; });
}

template <class T, int kD>
__global__ void __launch_bounds__(256) flash_backward_kv(T* dqkv, const acc_t<T>* delta, const T* dout, const acc_t<T>* lse, const T* qkv, Sizes n, acc_t<T> scale) {
  using S = Shape_<T, kD>;
  using A = acc_t<T>;
  extern __shared__ alignas(64) char shared[];
  A *k = reinterpret_cast<A*>(shared), *v = k + S::kColumns, *q = v + S::kColumns, *dy = q + S::kRows, *p = dy + S::kRows;
  A *row_lse = p + S::kTile * S::kTile, *row_delta = row_lse + S::kTile;
  const int k0 = blockIdx.x * S::kTile;
  load_tile<S, true>(k, n.packed(qkv, 1), k0, n);
  load_tile<S, true>(v, n.packed(qkv, 2), k0, n);
  typename S::Output dk, dv;
  dk.clear();
  dv.clear();
  for (int q0 = k0; q0 < n.T; q0 += S::kTile) {
    load_tile<S, false>(q, n.packed(qkv, 0), q0, n, scale);
    load_tile<S, false>(dy, n.rows(dout), q0, n);
    for (int i = threadIdx.x; i < S::kTile; i += S::kThreads) {
      const bool there = q0 + i < n.T;
      row_lse[i] = there ? lse[int64_t(blockIdx.y) * n.T + q0 + i] : A(0);
      row_delta[i] = there ? delta[int64_t(blockIdx.y) * n.T + q0 + i] : A(0);
    }
    __syncthreads();
    typename S::Scores s, dp;
    s.clear();
    dp.clear();
    s.template add<true>(q, S::kLdD, k, S::kLdT, kD);
    dp.template add<true>(dy, S::kLdD, v, S::kLdT, kD);
    s.for_each_run([&](int row, int key, const A* s, A* dp) {
      for (int e = 0; e < S::Scores::kColumnRun; e++) {
        const A x = exp_of(s[e] - row_lse[row]), seen = k0 + key + e <= q0 + row ? x : A(0);
        p[row * S::kTile + key + e] = seen;
        dp[e] = seen * (dp[e] - row_delta[row]);
      }
    }, dp);
    __syncthreads();
    dv.template add<false>(p, S::kTile, dy, S::kLdD, S::kTile);
    __syncthreads();
    dp.for_each_run([&](int row, int key, const A* dp) {
      for (int e = 0; e < S::Scores::kColumnRun; e++) p[row * S::kTile + key + e] = dp[e];
    });
    __syncthreads();
    dk.template add<false>(p, S::kTile, q, S::kLdD, S::kTile);
    __syncthreads();
  }
  store_tile<S>(n.packed(dqkv, 1), k0, n, dk, [](int) { return A(1); });
  store_tile<S>(n.packed(dqkv, 2), k0, n, dv, [](int) { return A(1); });
}

// ---- launches

template <class T, int kD> void forward(const Tensor& out, const Tensor& lse, const Tensor& qkv, dim3 grid, Sizes n) {
  using S = Shape_<T, kD>;
  const size_t bytes = (S::kColumns + S::kRows + S::kTile * S::kLdP + S::kTile) * sizeof(acc_t<T>);
  CUDA_CHECK(cudaFuncSetAttribute(flash_forward<T, kD>, cudaFuncAttributeMaxDynamicSharedMemorySize, int(bytes)));
  flash_forward<T, kD><<<grid, S::kThreads, bytes, device().compute>>>(out.data<T>(), lse.data<acc_t<T>>(), qkv.data<T>(), n, acc_t<T>(1 / std::sqrt(double(n.D))));
  LAUNCHED();
}

template <class T, int kD> void backward(const Tensor& dqkv, const Tensor& delta, const Tensor& dout, const Tensor& out, const Tensor& lse, const Tensor& qkv, dim3 grid, Sizes n) {
  using S = Shape_<T, kD>;
  using A = acc_t<T>;
  const size_t bytes = (2 * S::kColumns + 2 * S::kRows + S::kTile * S::kTile + 2 * S::kTile) * sizeof(A);
  const A scale = A(1 / std::sqrt(double(n.D)));
  CUDA_CHECK(cudaFuncSetAttribute(flash_backward_q<T, kD>, cudaFuncAttributeMaxDynamicSharedMemorySize, int(bytes)));
  CUDA_CHECK(cudaFuncSetAttribute(flash_backward_kv<T, kD>, cudaFuncAttributeMaxDynamicSharedMemorySize, int(bytes)));
  flash_backward_q<T, kD><<<grid, S::kThreads, bytes, device().compute>>>(dqkv.data<T>(), delta.data<A>(), dout.data<T>(), out.data<T>(), lse.data<A>(), qkv.data<T>(), n, scale);
  LAUNCHED();
  flash_backward_kv<T, kD><<<grid, S::kThreads, bytes, device().compute>>>(dqkv.data<T>(), delta.data<A>(), dout.data<T>(), lse.data<A>(), qkv.data<T>(), n, scale);
  LAUNCHED();
}

#define DISPATCH_D(D_, ...)                                        \
  if (D_ <= 32) { constexpr int kD = 32; __VA_ARGS__; }            \
  else if (D_ <= 64) { constexpr int kD = 64; __VA_ARGS__; }       \
  else { constexpr int kD = 128; __VA_ARGS__; }

template <class T, int kD> int tile() { return Shape_<T, kD>::kTile; }

}  // namespace

void attention_flash_forward(const Tensor& out, const Tensor& lse, const Tensor& qkv, int64_t B, int64_t T, int64_t H) {
  if (!qkv.numel()) return;
  const int64_t D = qkv.numel() / (B * T * 3 * H);
  const Sizes n{int(T), int(H), int(D), in_packs(D, {&out, &qkv})};
  const int64_t heads = B * H, length = T;
  DISPATCH(qkv.dtype(), DISPATCH_D(D, (forward<T, kD>(out, lse, qkv, dim3(unsigned(ceil_div(length, tile<T, kD>())), unsigned(heads)), n))));
}

void attention_flash_backward(const Tensor& dqkv, const Tensor& dout, const Tensor& out, const Tensor& lse, const Tensor& qkv, int64_t B,
                              int64_t T, int64_t H) {
  if (!qkv.numel()) return;
  const int64_t D = qkv.numel() / (B * T * 3 * H);
  const Sizes n{int(T), int(H), int(D), in_packs(D, {&out, &qkv, &dout, &dqkv})};
  const int64_t heads = B * H, length = T;
  const Tensor delta({B, H, T}, lse.dtype(), Memory::workspace);
  DISPATCH(qkv.dtype(), DISPATCH_D(D, (backward<T, kD>(dqkv, delta, dout, out, lse, qkv, dim3(unsigned(ceil_div(length, tile<T, kD>())), unsigned(heads)), n))));
}
