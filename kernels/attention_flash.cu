// attention_flash.cu: causal attention that never stores the scores (queries, keys). (Dao et al.,
// "FlashAttention", 2022, algorithms 1 and 4.)
//
// idea      a block owns a tile of queries and walks over tiles of keys, as far as its last query
//           sees them. The softmax is taken online: each row keeps its largest score and its sum of
//           exponentials so far, and what was summed before is rescaled when a larger score
//           appears. Kept for the backward: out, and lse, the logarithm of the row's sum, from
//           which any tile of probabilities is exp(score - lse).
// rows      Queries and keys may be different parts of the sequence, each row with a position
//           (attention.cuh). A query sees the keys whose position is not after its own: the first
//           so many, perhaps all or none.
// backward  with delta = sum over d of dout * out: ds = p (dp - delta), dq = ds k, dk = ds^T q, dv
//           = p^T dout. Two kernels, since nothing is added atomically: one owns queries and sums
//           dq, one owns keys and sums dk and dv; each computes its tiles of p again. lse and
//           delta may be of more keys than these: gradients then are these keys' part.
// forms     f32 and f64, and whatever runs on a CPU: here, in registers (block_product.cuh). bf16
//           on a GPU: in tensor cores (attention_mma.cu), if rows begin at multiples of 16 bytes.
// cost      products of (tile, tile, D) for each pair of tiles on or below the diagonal: forward 2,
//           backward 7; plain: 2 and 4 for all pairs. Memory: lse, and in the backward as much for
//           delta, which is the caller's
// tiles     64 by 64; fewer where D or the type is wide, so that a block needs at most 85 KiB of
//           shared memory, of which workstation cards give it 99
// not here  dropout, windows
// test      tests/test_attention.cpp
#include <block_product.cuh>

#include "kernels/attention.cuh"

using namespace flash;

namespace {

// ---- tiles in shared memory

template <class T, int kWidth> struct Tiles {
  using A = acc_t<T>;
  // kD: D, or more and filled with zeros
  static constexpr int kThreads = kProductThreads, kD = kWidth, kRowBytes = kD * int(sizeof(A));
  // queries, or keys
  static constexpr int kTile = kRowBytes > 512 ? 16 : kRowBytes > 256 || sizeof(A) > 4 ? 32 : 64;
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

// tile = rows first, first + 1, ... of x * scale, zero beyond the last row and D; kTransposed: as
// (d, row)
template <class S, bool kTransposed, class T>
__device__ __forceinline__ void load_rows(typename S::A* tile, Rows<const T> x, int first, Sizes n,
                                          typename S::A scale = 1) {
  load_tile<S::kTile, S::kD, kTransposed>(tile, kTransposed ? S::kLdT : S::kLd,
                                          x.data + first * x.ld, x.ld, x.rows - first, n.D, n.packs,
                                          scale);
}

// rows first, first + 1, ... of x = the product's * factor(row)
template <class S, class T, class F>
__device__ __forceinline__ void store_rows(const Results& x, int first, Sizes n,
                                           typename S::Output& product, F factor) {
  using A = typename S::A;
  product.for_each_run([&](int row, int d, const A* sum) {
    if (first + row >= x.rows) return;
    const auto f = factor(row);
    const int64_t at = x.first + (first + row) * x.ld + d;
    const auto write = [&](auto* p) {
      write_run<S::Output::kColumnRun>(p, n.D - d, n.packs, [=, add = x.add](int e) {
        return sum[e] * f + (add ? load(p[e]) : A(0));
      });
    };
    if (x.wide) write(static_cast<A*>(x.data) + at);
    else write(static_cast<T*>(x.data) + at);
  });
}

// seen[row] = how many keys the query q0 + row sees
template <class S> __device__ __forceinline__ void count_seen(int* seen, int q0, Sizes n) {
  for (int i = threadIdx.x; i < S::kTile; i += S::kThreads) seen[i] = n.seen_by(q0 + i);
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

  // s (key, row): scores of the keys from k0 on become exp(score - most), or zero where the row
  // does not see the key. factor (row) = what earlier sums must be multiplied with.
  __device__ __forceinline__ void add(A* s, A* factor, int k0, const int* seen) {
    A now[S::kOwnRows], more[S::kOwnRows];
    s += first;
    seen += first;
    for (int r = 0; r < S::kOwnRows; r++) now[r] = most[r], more[r] = 0;
    for (int key = lane; key < S::kTile; key += S::kLanes)
      for (int r = 0; r < S::kOwnRows; r++) {
        const A larger = Max<A>::combine(now[r], s[key * S::kLdS + r]);
        now[r] = k0 + key < seen[r] ? larger : now[r];
      }
    for (int r = 0; r < S::kOwnRows; r++) now[r] = reduce_lanes<Max<A>, S::kLanes>(now[r]);
    for (int key = lane; key < S::kTile; key += S::kLanes)
      for (int r = 0; r < S::kOwnRows; r++) {
        const A e = exp_of(s[key * S::kLdS + r] - now[r]), p = k0 + key < seen[r] ? e : A(0);
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
  return (S::kSizeT + S::kSize + S::kScores + S::kTile) * sizeof(typename S::A) +
         S::kTile * sizeof(int);
}

// (256, 2): up to 128 registers a thread. Left to itself nvcc aims at more blocks a multiprocessor,
// and spills for them on sm_90.

// out, lse (B,H,queries); block (head, tile): a tile of queries; reads q once, and k and v as far
// as the tile sees them; D <= kD
template <class T, int kD> __global__ void __launch_bounds__(256, 2)
    flash_forward(Results out, acc_t<T>* lse, Inputs<T> in, Sizes n, acc_t<T> scale) {
  using S = Tiles<T, kD>;
  using A = acc_t<T>;
  extern __shared__ __align__(64) char shared[];
  A *q = reinterpret_cast<A*>(shared), *kv = q + S::kSizeT, *p = kv + S::kSize,
    *factor = p + S::kScores;
  int* seen = reinterpret_cast<int*>(factor + S::kTile);
  const int q0 = (n.tiles - 1 - n.tile()) * S::kTile;  // the longest walks begin first
  const int keys = n.seen_by_tile(q0, S::kTile);
  OnlineSoftmax<S> softmax;
  typename S::Output o;
  o.clear(n.queries.rows - q0, n.D);
  load_rows<S, true>(q, n.of_head(in.q), q0, n, scale);
  count_seen<S>(seen, q0, n);

  for (int k0 = 0; k0 < keys; k0 += S::kTile) {
    load_rows<S, false>(kv, n.of_head(in.k), k0, n);
    __syncthreads();       // q, k and seen are there
    typename S::Scores s;  // (key, query)
    s.clear(keys - k0, n.queries.rows - q0);
    s.template add<true>(kv, S::kLd, q, S::kLdT, kD);
    s.for_each_run([&](int key, int row, const A* score) {
      UNROLL for (int e = 0; e < S::Scores::kColumnRun; e++) p[key * S::kLdS + row + e] = score[e];
    });
    __syncthreads();  // scores are there; k is no longer needed
    load_rows<S, false>(kv, n.of_head(in.v), k0, n);
    softmax.add(p, factor, k0, seen);
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
    const bool any = softmax.sum[r] > 0;
    if (softmax.lane == 0) factor[row] = any ? 1 / softmax.sum[r] : A(0);
    if (softmax.lane == 0 && q0 + row < n.queries.rows)
      lse[n.statistics() + q0 + row] =
          any ? softmax.most[r] + log_of(softmax.sum[r]) : Max<A>::identity;
  }
  __syncthreads();  // factors are there
  store_rows<S, T>(n.of_head(out), q0, n, o, [=](int row) { return factor[row]; });
}

// ---- backward

constexpr int kDeltaLanes = block_threads(8), kDeltaRows = kProductThreads / kDeltaLanes;

// delta (B,H,queries) = sum over d of dout * out, both (B,queries,H,D); kDeltaLanes threads own a
// row; reads both once; any D
template <class T, int N> __global__ void __launch_bounds__(256)
    delta_kernel(acc_t<T>* delta, const T* dout, const T* out, int H, int queries, int D,
                 int64_t rows) {
  const int lane = threadIdx.x % kDeltaLanes;
  const int64_t row = int64_t(blockIdx.x) * kDeltaRows + threadIdx.x / kDeltaLanes;  // of (B,T,H)
  const int columns = row < rows ? D : 0;
  acc_t<T> sum = 0;
  for (int d = lane * N; d < columns; d += kDeltaLanes * N) {
    const auto p = load_pack<N>(dout + row * D + d), q = load_pack<N>(out + row * D + d);
    for (int k = 0; k < N; k++) sum += load(p[k]) * load(q[k]);
  }
  sum = reduce_lanes<Sum<acc_t<T>>, kDeltaLanes>(sum);
  if (row >= rows || lane) return;
  delta[(row / H / queries * H + row % H) * queries + row / H % queries] = sum;
}

// lse and delta of a tile's queries, and how many keys each sees; beyond the last query zeros,
// which with zeros in q and dout give gradients of zero
template <class S, class A>
__device__ __forceinline__ void load_statistics(A* row_lse, A* row_delta, int* seen, const A* lse,
                                                const A* delta, int first, Sizes n) {
  for (int i = threadIdx.x; i < S::kTile; i += S::kThreads) {
    const bool inside = first + i < n.queries.rows;
    row_lse[i] = inside ? lse[n.statistics() + first + i] : A(0);
    row_delta[i] = inside ? delta[n.statistics() + first + i] : A(0);
  }
  count_seen<S>(seen, first, n);
}

template <class S> constexpr size_t backward_bytes() {
  return (2 * S::kSizeT + 2 * S::kSize + S::kTile * S::kTile + 2 * S::kTile) *
             sizeof(typename S::A) +
         S::kTile * sizeof(int);
}

// d.q; block (head, tile): a tile of queries; reads q and dout once, and k and v as far as the tile
// sees them
template <class T, int kD> __global__ void __launch_bounds__(256, 2)
    flash_backward_q(Gradients d, Rows<const T> dout, const acc_t<T>* lse, const acc_t<T>* delta,
                     Inputs<T> in, Sizes n, acc_t<T> scale) {
  using S = Tiles<T, kD>;
  using A = acc_t<T>;
  extern __shared__ __align__(64) char shared[];
  A *q = reinterpret_cast<A*>(shared), *dy = q + S::kSizeT, *k = dy + S::kSizeT, *v = k + S::kSize,
    *ds = v + S::kSize;
  A *row_lse = ds + S::kTile * S::kTile, *row_delta = row_lse + S::kTile;
  int* seen = reinterpret_cast<int*>(row_delta + S::kTile);
  const int q0 = (n.tiles - 1 - n.tile()) * S::kTile;
  const int keys = n.seen_by_tile(q0, S::kTile);
  load_rows<S, true>(q, n.of_head(in.q), q0, n, scale);
  load_rows<S, true>(dy, n.of_head(dout), q0, n);
  load_statistics<S>(row_lse, row_delta, seen, lse, delta, q0, n);
  typename S::Output dq;
  dq.clear(n.queries.rows - q0, n.D);

  for (int k0 = 0; k0 < keys; k0 += S::kTile) {
    load_rows<S, false>(k, n.of_head(in.k), k0, n);
    load_rows<S, false>(v, n.of_head(in.v), k0, n);
    __syncthreads();           // all tiles are there
    typename S::Scores s, dp;  // (key, query)
    s.clear(keys - k0, n.queries.rows - q0);
    dp.clear(keys - k0, n.queries.rows - q0);
    s.template add<true>(k, S::kLd, q, S::kLdT, kD);
    dp.template add<true>(v, S::kLd, dy, S::kLdT, kD);
    s.for_each_run(
        [&](int key, int row, const A* s, const A* dp) {
          UNROLL for (int e = 0; e < S::Scores::kColumnRun; e++) {
            const A x = exp_of(s[e] - row_lse[row + e]) * (dp[e] - row_delta[row + e]);
            ds[key * S::kTile + row + e] = k0 + key < seen[row + e] ? x : A(0);
          }
        },
        dp);
    __syncthreads();  // ds is there
    dq.template add<false>(ds, S::kTile, k, S::kLd, S::kTile);
    __syncthreads();  // k, v and ds are no longer needed
  }
  store_rows<S, T>(n.of_head(d.q), q0, n, dq, [=](int) { return scale; });
}

// d.k and d.v; block (head, tile): a tile of keys; reads k and v once, and q and dout from the
// first query on that sees the tile
template <class T, int kD> __global__ void __launch_bounds__(256, 2)
    flash_backward_kv(Gradients d, Rows<const T> dout, const acc_t<T>* lse, const acc_t<T>* delta,
                      Inputs<T> in, Sizes n, acc_t<T> scale) {
  using S = Tiles<T, kD>;
  using A = acc_t<T>;
  extern __shared__ __align__(64) char shared[];
  A *k = reinterpret_cast<A*>(shared), *v = k + S::kSizeT, *q = v + S::kSizeT, *dy = q + S::kSize,
    *p = dy + S::kSize;
  A *row_lse = p + S::kTile * S::kTile, *row_delta = row_lse + S::kTile;
  int* seen = reinterpret_cast<int*>(row_delta + S::kTile);
  const int k0 = n.tile() * S::kTile;
  load_rows<S, true>(k, n.of_head(in.k), k0, n);
  load_rows<S, true>(v, n.of_head(in.v), k0, n);
  typename S::Output dk, dv;
  dk.clear(n.keys.rows - k0, n.D);
  dv.clear(n.keys.rows - k0, n.D);

  for (int q0 = n.first_seeing(k0) / S::kTile * S::kTile; q0 < n.queries.rows; q0 += S::kTile) {
    load_rows<S, false>(q, n.of_head(in.q), q0, n, scale);
    load_rows<S, false>(dy, n.of_head(dout), q0, n);
    load_statistics<S>(row_lse, row_delta, seen, lse, delta, q0, n);
    __syncthreads();           // all tiles are there
    typename S::Scores s, dp;  // (query, key)
    s.clear(n.queries.rows - q0, n.keys.rows - k0);
    dp.clear(n.queries.rows - q0, n.keys.rows - k0);
    s.template add<true>(q, S::kLd, k, S::kLdT, kD);
    dp.template add<true>(dy, S::kLd, v, S::kLdT, kD);
    s.for_each_run(
        [&](int row, int key, const A* s, A* dp) {
          const A lse = row_lse[row], delta = row_delta[row];
          const int keys = seen[row];
          UNROLL for (int e = 0; e < S::Scores::kColumnRun; e++) {
            const A x = exp_of(s[e] - lse), kept = k0 + key + e < keys ? x : A(0);
            p[row * S::kTile + key + e] = kept;
            dp[e] = kept * (dp[e] - delta);
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
  store_rows<S, T>(n.of_head(d.k), k0, n, dk, [](int) { return A(1); });
  store_rows<S, T>(n.of_head(d.v), k0, n, dv, [](int) { return A(1); });
}

// ---- launches

template <class T, int kD> void forward(Sizes n, Results out, acc_t<T>* lse, Inputs<T> in) {
  using S = Tiles<T, kD>;
  n.tiles = ceil_div(n.queries.rows, S::kTile);
  const size_t bytes = forward_bytes<S>();
  allow_shared(flash_forward<T, kD>, bytes);
  flash_forward<T, kD>
      <<<n.blocks(), S::kThreads, bytes, device().compute>>>(out, lse, in, n,
                                                             acc_t<T>(1 / std::sqrt(n.D)));
  LAUNCHED();
}

template <class T, int kD> void backward(Sizes n, Gradients d, Rows<const T> dout,
                                         const acc_t<T>* lse, const acc_t<T>* delta, Inputs<T> in) {
  using S = Tiles<T, kD>;
  constexpr size_t bytes = backward_bytes<S>();
  static_assert(bytes <= 99 << 10);
  for (const bool owns_keys : {false, true}) {
    const auto kernel = owns_keys ? flash_backward_kv<T, kD> : flash_backward_q<T, kD>;
    n.tiles = ceil_div(owns_keys ? n.keys.rows : n.queries.rows, S::kTile);
    if (!n.tiles) continue;
    allow_shared(kernel, bytes);
    kernel<<<n.blocks(), S::kThreads, bytes, device().compute>>>(d, dout, lse, delta, in, n,
                                                                 acc_t<T>(1 / std::sqrt(n.D)));
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

// ---- arguments

template <class T> Rows<const T> read(const Parts& x, int64_t part) {
  return {x.tensor.data<T>() + part * x.H * x.D, x.ld(), int(x.rows)};
}
template <class T> Inputs<T> inputs(const Parts& q, const Parts& kv) {
  return {read<T>(q, 0), read<T>(kv, kv.parts - 2), read<T>(kv, kv.parts - 1)};
}
Results write(const Parts& x, Dtype dtype, int64_t part, bool add) {
  const bool wide = x.tensor.dtype() == master_dtype(dtype);
  ASSERT(wide || (x.tensor.dtype() == dtype && !add), name_of(x.tensor.dtype()));
  return {x.begin(part), x.ld(), int(x.rows), wide, add};
}

// Heads of a group: as many as have 16 MiB of keys and values, and at most 32; in FAST one
int64_t most_heads(int64_t bytes_of_head) {
  return kWarp == 1 ? 1 : std::clamp<int64_t>((16 << 20) / bytes_of_head, 1, 32);
}

Sizes sizes_of(const Tensor& out, const Tensor& lse, const AttentionInputs& in) {
  const int64_t B = in.B, H = in.H;
  Sizes n{.H = int(H), .queries = places_of(in.queries), .keys = places_of(in.keys)};
  const int64_t T = n.queries.rows, D = out.numel() / (B * T * H);
  ASSERT(out.numel() == B * T * H * D && lse.numel() == B * H * T, to_string(out.shape()), ", ",
         to_string(lse.shape()), " with B = ", B, ", T = ", T, ", H = ", H);
  ASSERT(n.keys.rows > 0, "queries without a key");
  REQUIRE(B * H <= INT_MAX / ceil_div(std::max(T, in.keys.rows()), 16),
          "flash attention takes at most 2^31 tiles, and ", B, " sequences of ", T, " tokens with ",
          H, " heads have more: give a smaller --microbatch");
  REQUIRE(D <= 128, "flash attention holds heads of at most 128 elements, these have ", D,
          ": use plain attention");
  n.D = D;
  n.heads = B * H;
  const int64_t bytes = 2 * int64_t(n.keys.rows) * D * size_of(in.q.dtype());
  n.group_heads = ceil_div(n.heads, ceil_div(n.heads, most_heads(bytes)));  // of like sizes
  return n;
}

}  // namespace

// ---- host functions

void attention_delta(const Tensor& delta, const Tensor& dout, const Tensor& out) {
  OP("attention_delta", bytes_of(delta, dout, out));
  const int64_t H = delta.dim(1), queries = delta.dim(2), rows = delta.numel();
  if (!rows) return;
  const int64_t D = out.numel() / rows;
  ASSERT(dout.numel() == rows * D && out.numel() == rows * D, to_string(delta.shape()));
  const unsigned blocks = ceil_div(rows, kDeltaRows);
  DISPATCH_PACKS(out.dtype(), in_packs(D, {&dout, &out}),
                 delta_kernel<T, N><<<blocks, kProductThreads, 0, device().compute>>>(
                     delta.data<A>(), dout.data<T>(), out.data<T>(), H, queries, D, rows));
}

void attention_flash_forward(const Tensor& out, const Tensor& lse, const AttentionInputs& in) {
  OP("attention_flash_forward", 0, 2 * flops_of_product(out, in));
  if (!out.numel()) return;
  Sizes n = sizes_of(out, lse, in);
  n.packs = in_packs(n.D, {&out, &in.q, &in.kv});
  const Dtype dtype = in.q.dtype();
  const Parts qs(in.q, in.B, n.queries, n), kvs(in.kv, in.B, n.keys, n);
  const Results to = write(Parts(out, in.B, n.queries, n), dtype, 0, false);
  const auto launch = [&]<class T>(T) {
    acc_t<T>* l = lse.data<acc_t<T>>();
#ifndef CPU_FAST
    if constexpr (std::is_same_v<T, __nv_bfloat16>)
      if (n.packs) return mma_forward(n, to, l, inputs<T>(qs, kvs));
#endif
    DISPATCH_WIDTH(n.D, forward<T, kD>(n, to, l, inputs<T>(qs, kvs)));
  };
  DISPATCH(dtype, launch(T()));
}

void attention_flash_backward(const Tensor& dq, const Tensor& dkv, const Tensor& dout,
                              const Tensor& delta, const Tensor& lse, const AttentionInputs& in,
                              bool add_dq) {
  // the kernels make 7: both compute scores, and dout v^T
  OP("attention_flash_backward", 0, 5 * flops_of_product(dout, in));
  if (!dout.numel()) return fill(dkv, 0);  // no query sees a key
  Sizes n = sizes_of(dout, lse, in);
  ASSERT(delta.numel() == lse.numel());
  n.packs = in_packs(n.D, {&dq, &dkv, &dout, &in.q, &in.kv});
  const int64_t B = in.B;
  const Dtype dtype = in.q.dtype();
  const Parts qs(in.q, B, n.queries, n), kvs(in.kv, B, n.keys, n), dqs(dq, B, n.queries, n),
      dkvs(dkv, B, n.keys, n), dys(dout, B, n.queries, n);
  ASSERT(dkvs.parts >= 2);
  const Gradients d{write(dqs, dtype, 0, add_dq), write(dkvs, dtype, dkvs.parts - 2, false),
                    write(dkvs, dtype, dkvs.parts - 1, false)};
  const auto launch = [&]<class T>(T) {
    const acc_t<T>*l = lse.data<acc_t<T>>(), *de = delta.data<acc_t<T>>();
#ifndef CPU_FAST
    if constexpr (std::is_same_v<T, __nv_bfloat16>)
      if (n.packs) return mma_backward(n, d, read<T>(dys, 0), l, de, inputs<T>(qs, kvs));
#endif
    DISPATCH_WIDTH(n.D, backward<T, kD>(n, d, read<T>(dys, 0), l, de, inputs<T>(qs, kvs)));
  };
  DISPATCH(dtype, launch(T()));
}
