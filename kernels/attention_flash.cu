// attention_flash.cu: causal self-attention that never stores the scores (T,T). (Dao et al.,
// "FlashAttention", 2022, algorithms 1 and 4.)
//
// idea      a block owns a tile of queries and walks over tiles of keys, up to the diagonal. The
//           softmax is taken online: each row keeps its largest score and its sum of exponentials
//           so far, and what was summed before is rescaled when a larger score appears. Kept for
//           the backward: out, and lse (B,H,T), the logarithm of the row's sum, from which any tile
//           of probabilities is exp(score - lse).
// backward  with delta = sum over d of dout * out: ds = p (dp - delta), dq = ds k, dk = ds^T q, dv
//           = p^T dout. Two kernels, since nothing is added atomically: one owns queries and sums
//           dq, one owns keys and sums dk and dv; each computes its tiles of p again.
// cost      products of (tile, tile, D) for each pair of tiles on or below the diagonal: forward 2,
//           backward 7; plain: 2 and 4 for all pairs. Memory: lse, and B H T for delta while the
//           backward runs
// tiles     64 by 64; fewer where D or the type is wide, so that a block needs at most 92 KiB of
//           shared memory
// not here  tensor cores: bf16 is widened to f32 and multiplied in registers; dropout, windows,
//           unequal numbers of queries and keys
// test      tests/test_attention.cpp
#include <block_product.cuh>

namespace {

// ---- tiles in shared memory

template <class T, int kWidth> struct Tiles {
  using A = acc_t<T>;
  // kD: D, or more and filled with zeros
  static constexpr int kThreads = kProductThreads, kD = kWidth, kRowBytes = kD * int(sizeof(A));
  // queries, or keys
  static constexpr int kTile = kRowBytes <= 256 ? 64 : kRowBytes <= 512 ? 32 : 16;
  // Leading dims of tiles as (row, d), as (d, row), and of scores
  static constexpr int kLd = kD + kPad * 16 / int(sizeof(A)), kLdT = kTile + kPad * 4,
                       kLdS = kTile + kPad * kTile / 2 / int(sizeof(A));
  static constexpr int kSize = kTile * kLd, kSizeT = kD * kLdT, kScores = kTile * kLdS;
  // The softmax of a row is shared by kLanes threads beside each other; or a thread has several
  // rows to itself.
  static constexpr int kLanes = kThreads > kTile ? kThreads / kTile : 1,
                       kOwnRows = kTile * kLanes / kThreads;
  using Scores = BlockProduct<A, kTile, kTile>;
  using Output = BlockProduct<A, kTile, kD>;
};

template <class T> struct Rows {  // row t of one head of one sequence lies at data + t * ld
  T* data;
  int64_t ld;
};
constexpr int kQ = 0, kK = 1, kV = 2;

struct Sizes {
  int T, H, D;
  bool packs;  // rows begin at multiples of 16 bytes
  // blocks of a head, one after the other: gridDim.y, of which there are 65535, could not count all
  // heads, nor all tiles
  unsigned tiles = 0;
  __device__ unsigned tile() const { return blockIdx.x % tiles; }
  __device__ unsigned head() const { return blockIdx.x / tiles; }
  // This block's head, of qkv (B,T,3,H,D) and of x (B,T,H,D); and its first row in (B,H,T)
  template <class X> __device__ Rows<X> packed(X* qkv, int part) const {
    const int64_t b = head() / H, h = head() % H;
    return {qkv + ((b * T * 3 + part) * H + h) * D, int64_t(3) * H * D};
  }
  template <class X> __device__ Rows<X> rows(X* x) const {
    const int64_t b = head() / H, h = head() % H;
    return {x + (b * T * H + h) * D, int64_t(H) * D};
  }
  __device__ int64_t statistics() const { return int64_t(head()) * T; }
};

// tile = rows first, first + 1, ... of x * scale, zero beyond T and D; kTransposed: as (d, row)
template <class S, bool kTransposed, class T>
__device__ __forceinline__ void load_rows(typename S::A* tile, Rows<const T> x, int first, Sizes n,
                                          typename S::A scale = 1) {
  load_tile<S::kTile, S::kD, kTransposed>(tile, kTransposed ? S::kLdT : S::kLd,
                                          x.data + first * x.ld, x.ld, n.T - first, n.D, n.packs,
                                          scale);
}

// rows first, first + 1, ... of x = the product's * factor(row)
template <class S, class T, class F>
__device__ __forceinline__ void store_rows(Rows<T> x, int first, Sizes n,
                                           typename S::Output& product, F factor) {
  product.for_each_run([&](int row, int d, const typename S::A* sum) {
    if (first + row >= n.T) return;
    const auto f = factor(row);
    write_run<S::Output::kColumnRun>(x.data + (first + row) * x.ld + d, n.D - d, n.packs,
                                     [=](int e) { return sum[e] * f; });
  });
}

// ---- forward

// The softmax of a tile's rows over all tiles of keys so far
template <class S> struct OnlineSoftmax {
  using A = typename S::A;
  int first, lane;                        // this thread's rows begin at `first`
  A most[S::kOwnRows], sum[S::kOwnRows];  // largest score; sum of exp(score - most)

  __device__ OnlineSoftmax()
      : first(threadIdx.x / S::kLanes * S::kOwnRows), lane(threadIdx.x % S::kLanes) {
    for (int r = 0; r < S::kOwnRows; r++) most[r] = Max<A>::identity, sum[r] = 0;
  }

  // s (key, row): scores become exp(score - most), or zero where the key comes later than the
  // query, which is `ahead` of the tile's first key. factor (row) = what earlier sums must be
  // multiplied with.
  __device__ __forceinline__ void add(A* s, A* factor, int ahead) {
    A now[S::kOwnRows], more[S::kOwnRows];
    s += first;
    for (int r = 0; r < S::kOwnRows; r++) now[r] = most[r], more[r] = 0;
    for (int key = lane; key < S::kTile; key += S::kLanes)
      for (int r = 0; r < S::kOwnRows; r++) {
        const A larger = Max<A>::combine(now[r], s[key * S::kLdS + r]);
        now[r] = key <= first + r + ahead ? larger : now[r];
      }
    for (int r = 0; r < S::kOwnRows; r++) now[r] = reduce_lanes<Max<A>, S::kLanes>(now[r]);
    for (int key = lane; key < S::kTile; key += S::kLanes)
      for (int r = 0; r < S::kOwnRows; r++) {
        const A e = exp_of(s[key * S::kLdS + r] - now[r]), p = key <= first + r + ahead ? e : A(0);
        s[key * S::kLdS + r] = p;
        more[r] += p;
      }
    for (int r = 0; r < S::kOwnRows; r++) {
      const A earlier = sum[r] == 0 ? A(0) : exp_of(most[r] - now[r]);
      sum[r] = sum[r] * earlier + reduce_lanes<Sum<A>, S::kLanes>(more[r]);
      most[r] = now[r];
      if (lane == 0) factor[first + r] = earlier;
    }
  }
};

template <class S> constexpr size_t forward_bytes() {
  return (S::kSizeT + S::kSize + S::kScores + S::kTile) * sizeof(typename S::A);
}

// out (B,T,H,D), lse (B,H,T) from qkv (B,T,3,H,D); block (head, tile): a tile of queries; reads q
// once, k and v up to the diagonal; D <= kD, any T
template <class T, int kD> __global__ void __launch_bounds__(256)
    flash_forward(T* out, acc_t<T>* lse, const T* qkv, Sizes n, acc_t<T> scale) {
  using S = Tiles<T, kD>;
  using A = acc_t<T>;
  extern __shared__ __align__(64) char shared[];
  A *q = reinterpret_cast<A*>(shared), *kv = q + S::kSizeT, *p = kv + S::kSize,
    *factor = p + S::kScores;
  const int q0 = (n.tiles - 1 - n.tile()) * S::kTile;  // the longest walks begin first
  OnlineSoftmax<S> softmax;
  typename S::Output o;
  o.clear();
  load_rows<S, true>(q, n.packed(qkv, kQ), q0, n, scale);

  for (int k0 = 0; k0 <= q0; k0 += S::kTile) {
    load_rows<S, false>(kv, n.packed(qkv, kK), k0, n);
    __syncthreads();       // q and k are there
    typename S::Scores s;  // (key, query)
    s.clear();
    s.template add<true>(kv, S::kLd, q, S::kLdT, kD);
    s.for_each_run([&](int key, int row, const A* score) {
      UNROLL for (int e = 0; e < S::Scores::kColumnRun; e++) p[key * S::kLdS + row + e] = score[e];
    });
    __syncthreads();  // scores are there; k is no longer needed
    load_rows<S, false>(kv, n.packed(qkv, kV), k0, n);
    softmax.add(p, factor, q0 - k0);
    __syncthreads();  // v, p and factors are there
    o.for_each_run([&](int row, int, A* sum) {
      const A f = factor[row];
      UNROLL for (int e = 0; e < S::Output::kColumnRun; e++) sum[e] *= f;
    });
    o.template add<false>(p, S::kLdS, kv, S::kLd, S::kTile);
    __syncthreads();  // v, p and factors are no longer needed
  }

  for (int r = 0; r < S::kOwnRows; r++) {
    const int row = softmax.first + r;
    if (softmax.lane == 0) factor[row] = 1 / softmax.sum[r];
    if (softmax.lane == 0 && q0 + row < n.T)
      lse[n.statistics() + q0 + row] = softmax.most[r] + log_of(softmax.sum[r]);
  }
  __syncthreads();  // factors are there
  store_rows<S>(n.rows(out), q0, n, o, [=](int row) { return factor[row]; });
}

// ---- backward

constexpr int kDeltaRows = kProductThreads / kWarp;

// delta (B,H,T) = sum over d of dout * out, both (B,T,H,D); a warp owns a row; reads both once; any
// D
template <class T> __global__ void __launch_bounds__(256)
    flash_delta(acc_t<T>* delta, const T* dout, const T* out, Sizes n, int64_t rows) {
  const int64_t row = int64_t(blockIdx.x) * kDeltaRows + threadIdx.x / kWarp;  // of (B,T,H)
  if (row >= rows) return;
  acc_t<T> sum = 0;
  for (int d = threadIdx.x % kWarp; d < n.D; d += kWarp)
    sum += load(dout[row * n.D + d]) * load(out[row * n.D + d]);
  sum = reduce_lanes<Sum<acc_t<T>>>(sum);
  const int64_t h = row % n.H, t = row / n.H % n.T, b = row / n.H / n.T;
  if (threadIdx.x % kWarp == 0) delta[(b * n.H + h) * n.T + t] = sum;
}

// lse and delta of a tile's rows; beyond T zeros, which with zeros in q and dout give gradients of
// zero
template <class S, class A>
__device__ __forceinline__ void load_statistics(A* row_lse, A* row_delta, const A* lse,
                                                const A* delta, int first, Sizes n) {
  for (int i = threadIdx.x; i < S::kTile; i += S::kThreads) {
    const bool inside = first + i < n.T;
    row_lse[i] = inside ? lse[n.statistics() + first + i] : A(0);
    row_delta[i] = inside ? delta[n.statistics() + first + i] : A(0);
  }
}

template <class S> constexpr size_t backward_bytes() {
  return (2 * S::kSizeT + 2 * S::kSize + S::kTile * S::kTile + 2 * S::kTile) *
         sizeof(typename S::A);
}

// dq of dqkv (B,T,3,H,D); block (head, tile): a tile of queries; reads q and dout once, k and v up
// to the diagonal
template <class T, int kD> __global__ void __launch_bounds__(256)
    flash_backward_q(T* dqkv, const T* dout, const acc_t<T>* lse, const acc_t<T>* delta,
                     const T* qkv, Sizes n, acc_t<T> scale) {
  using S = Tiles<T, kD>;
  using A = acc_t<T>;
  extern __shared__ __align__(64) char shared[];
  A *q = reinterpret_cast<A*>(shared), *dy = q + S::kSizeT, *k = dy + S::kSizeT, *v = k + S::kSize,
    *ds = v + S::kSize;
  A *row_lse = ds + S::kTile * S::kTile, *row_delta = row_lse + S::kTile;
  const int q0 = (n.tiles - 1 - n.tile()) * S::kTile;
  load_rows<S, true>(q, n.packed(qkv, kQ), q0, n, scale);
  load_rows<S, true>(dy, n.rows(dout), q0, n);
  load_statistics<S>(row_lse, row_delta, lse, delta, q0, n);
  typename S::Output dq;
  dq.clear();

  for (int k0 = 0; k0 <= q0; k0 += S::kTile) {
    load_rows<S, false>(k, n.packed(qkv, kK), k0, n);
    load_rows<S, false>(v, n.packed(qkv, kV), k0, n);
    __syncthreads();           // all tiles are there
    typename S::Scores s, dp;  // (key, query)
    s.clear();
    dp.clear();
    s.template add<true>(k, S::kLd, q, S::kLdT, kD);
    dp.template add<true>(v, S::kLd, dy, S::kLdT, kD);
    s.for_each_run(
        [&](int key, int row, const A* s, const A* dp) {
          UNROLL for (int e = 0; e < S::Scores::kColumnRun; e++) {
            const A x = exp_of(s[e] - row_lse[row + e]) * (dp[e] - row_delta[row + e]);
            ds[key * S::kTile + row + e] = k0 + key <= q0 + row + e ? x : A(0);
          }
        },
        dp);
    __syncthreads();  // ds is there
    dq.template add<false>(ds, S::kTile, k, S::kLd, S::kTile);
    __syncthreads();  // k, v and ds are no longer needed
  }
  store_rows<S>(n.packed(dqkv, kQ), q0, n, dq, [=](int) { return scale; });
}

// dk and dv of dqkv (B,T,3,H,D); block (head, tile): a tile of keys; reads k and v once, q and dout
// from the diagonal on
template <class T, int kD> __global__ void __launch_bounds__(256)
    flash_backward_kv(T* dqkv, const T* dout, const acc_t<T>* lse, const acc_t<T>* delta,
                      const T* qkv, Sizes n, acc_t<T> scale) {
  using S = Tiles<T, kD>;
  using A = acc_t<T>;
  extern __shared__ __align__(64) char shared[];
  A *k = reinterpret_cast<A*>(shared), *v = k + S::kSizeT, *q = v + S::kSizeT, *dy = q + S::kSize,
    *p = dy + S::kSize;
  A *row_lse = p + S::kTile * S::kTile, *row_delta = row_lse + S::kTile;
  const int k0 = n.tile() * S::kTile;
  load_rows<S, true>(k, n.packed(qkv, kK), k0, n);
  load_rows<S, true>(v, n.packed(qkv, kV), k0, n);
  typename S::Output dk, dv;
  dk.clear();
  dv.clear();

  for (int q0 = k0; q0 < n.T; q0 += S::kTile) {
    load_rows<S, false>(q, n.packed(qkv, kQ), q0, n, scale);
    load_rows<S, false>(dy, n.rows(dout), q0, n);
    load_statistics<S>(row_lse, row_delta, lse, delta, q0, n);
    __syncthreads();           // all tiles are there
    typename S::Scores s, dp;  // (query, key)
    s.clear();
    dp.clear();
    s.template add<true>(q, S::kLd, k, S::kLdT, kD);
    dp.template add<true>(dy, S::kLd, v, S::kLdT, kD);
    s.for_each_run(
        [&](int row, int key, const A* s, A* dp) {
          const A lse = row_lse[row], delta = row_delta[row];
          UNROLL for (int e = 0; e < S::Scores::kColumnRun; e++) {
            const A x = exp_of(s[e] - lse), seen = k0 + key + e <= q0 + row ? x : A(0);
            p[row * S::kTile + key + e] = seen;
            dp[e] = seen * (dp[e] - delta);
          }
        },
        dp);
    __syncthreads();  // p is there
    dv.template add<false>(p, S::kTile, dy, S::kLd, S::kTile);
    __syncthreads();  // p is no longer needed: ds takes its place
    dp.for_each_run([&](int row, int key, const A* ds) {
      UNROLL for (int e = 0; e < S::Scores::kColumnRun; e++) p[row * S::kTile + key + e] = ds[e];
    });
    __syncthreads();  // ds is there
    dk.template add<false>(p, S::kTile, q, S::kLd, S::kTile);
    __syncthreads();  // q, dy and ds are no longer needed
  }
  store_rows<S>(n.packed(dqkv, kK), k0, n, dk, [](int) { return A(1); });
  store_rows<S>(n.packed(dqkv, kV), k0, n, dv, [](int) { return A(1); });
}

// ---- launches

template <class T, int kD>
void forward(const Tensor& out, const Tensor& lse, const Tensor& qkv, unsigned heads, Sizes n) {
  using S = Tiles<T, kD>;
  using A = acc_t<T>;
  n.tiles = unsigned(ceil_div(n.T, S::kTile));
  const size_t bytes = forward_bytes<S>();
  allow_shared(flash_forward<T, kD>, bytes);
  flash_forward<T, kD><<<heads * n.tiles, S::kThreads, bytes, device().compute>>>(
      out.data<T>(), lse.data<A>(), qkv.data<T>(), n, A(1 / std::sqrt(double(n.D))));
}

template <class T, int kD> void backward(const Tensor& dqkv, const Tensor& delta,
                                         const Tensor& dout, const Tensor& lse, const Tensor& qkv,
                                         unsigned heads, Sizes n) {
  using S = Tiles<T, kD>;
  using A = acc_t<T>;
  n.tiles = unsigned(ceil_div(n.T, S::kTile));
  const size_t bytes = backward_bytes<S>();
  for (const auto kernel : {flash_backward_q<T, kD>, flash_backward_kv<T, kD>}) {
    allow_shared(kernel, bytes);
    kernel<<<heads * n.tiles, S::kThreads, bytes, device().compute>>>(
        dqkv.data<T>(), dout.data<T>(), lse.data<A>(), delta.data<A>(), qkv.data<T>(), n,
        A(1 / std::sqrt(double(n.D))));
    LAUNCHED();
  }
}

// The statement with the narrowest kD that holds D.
#define DISPATCH_WIDTH(D, ...) \
  if (D <= 32) {               \
    constexpr int kD = 32;     \
    __VA_ARGS__;               \
  } else if (D <= 64) {        \
    constexpr int kD = 64;     \
    __VA_ARGS__;               \
  } else {                     \
    constexpr int kD = 128;    \
    __VA_ARGS__;               \
  }

Sizes sizes_of(const Tensor& qkv, const Tensor& out, const Tensor& lse, int64_t B, int64_t T,
               int64_t H, bool packs) {
  const int64_t D = qkv.numel() / (B * T * 3 * H);
  ASSERT(qkv.numel() == B * T * 3 * H * D && out.numel() == B * T * H * D &&
             lse.numel() == B * H * T,
         to_string(qkv.shape()), ", ", to_string(out.shape()), ", ", to_string(lse.shape()),
         " with B = ", B, ", T = ", T, ", H = ", H);
  ASSERT(out.dtype() == qkv.dtype() && lse.dtype() == master_dtype(qkv.dtype()));
  REQUIRE(B * H <= INT_MAX / ceil_div(T, 16), "flash attention takes at most 2^31 tiles, and ", B,
          " sequences of ", T, " tokens with ", H, " heads have more: give a smaller --microbatch");
  REQUIRE(D <= 128, "flash attention holds heads of at most 128 elements, these have ", D,
          ": use plain attention");
  return {.T = int(T), .H = int(H), .D = int(D), .packs = packs};
}

}  // namespace

// ---- host functions

void attention_flash_forward(const Tensor& out, const Tensor& lse, const Tensor& qkv, int64_t B,
                             int64_t T, int64_t H) {
  if (!qkv.numel()) return;
  const Sizes n =
      sizes_of(qkv, out, lse, B, T, H, in_packs(qkv.numel() / (B * T * 3 * H), {&out, &qkv}));
  const unsigned heads = unsigned(B * H);
  DISPATCH(qkv.dtype(), DISPATCH_WIDTH(n.D, forward<T, kD>(out, lse, qkv, heads, n)));
}

void attention_flash_backward(const Tensor& dqkv, const Tensor& dout, const Tensor& out,
                              const Tensor& lse, const Tensor& qkv, int64_t B, int64_t T,
                              int64_t H) {
  if (!qkv.numel()) return;
  const Sizes n = sizes_of(qkv, out, lse, B, T, H,
                           in_packs(qkv.numel() / (B * T * 3 * H), {&out, &qkv, &dout, &dqkv}));
  ASSERT(dqkv.dtype() == qkv.dtype() && dqkv.numel() == qkv.numel() &&
         dout.dtype() == qkv.dtype() && dout.numel() == out.numel());
  const Tensor delta({B, H, T}, lse.dtype(), Memory::workspace);
  const int64_t rows = B * T * H;
  const unsigned heads = unsigned(B * H), blocks = unsigned(ceil_div(rows, kDeltaRows));
  DISPATCH(qkv.dtype(), flash_delta<T><<<blocks, kProductThreads, 0, device().compute>>>(
                            delta.data<acc_t<T>>(), dout.data<T>(), out.data<T>(), n, rows));
  DISPATCH(qkv.dtype(),
           DISPATCH_WIDTH(n.D, backward<T, kD>(dqkv, delta, dout, lse, qkv, heads, n)));
}
