// attention_mma.cu: flash attention of bf16 in tensor cores; attention_flash.cu has the algorithm.
//
// idea      A block owns 64 rows and walks over tiles of the others; each of its four warps owns 16
//           of the rows, and no warp needs another's sums. The product q k^T leaves a warp's
//           scores in the very lanes where the product with v needs them (mma.cuh), so scores and
//           probabilities stay in registers, and a row's maximum and sum are taken over the four
//           lanes that share it (a quad). Shared memory holds tiles of q, k, v and dout, and in
//           attention_backward_kv the queries' lse and delta.
// flow      Two buffers: while one tile is multiplied, the next one travels to the other. One
//           barrier a tile: after it, the tile is there, and nobody reads the other buffer.
// cost      as in attention_flash.cu; the backward kernels compute the scores again
// order     each sum runs over tiles from first to last, in one lane; that of a row's exponentials
//           in the four that share it, which are added up at the end
// memory    at most 70 KiB of shared memory a block, D 64: 45 KiB
// not here  32 rows a warp, wgmma and TMA (sm_90): what the best kernels for one chip do on top
// test      tests/test_attention.cpp
#ifndef CPU_FAST  // one thread is no warp
#include "kernels/attention.cuh"
#include "kernels/mma.cuh"

using namespace flash;

namespace {

constexpr int kThreads = 128, kOwn = 64;

// Tiles of kRows rows; kD: D, or more and filled with zeros. kStep rows of the others at a time
template <int kD, int kRows> struct Shape {
  static constexpr int kStep = kRows, kLd = kD + 8, kOwnSize = kOwn * kLd, kSize = kStep * kLd;
};
template <int kD> using ForwardShape = Shape<kD, kD <= 64 ? 64 : 32>;
template <int kD> using BackwardShape = Shape<kD, 32>;
// Bytes of shared memory, of which workstation cards give a block 99 KiB
template <class S> constexpr int kForwardBytes = (S::kOwnSize + 4 * S::kSize) * 2;
template <class S>
constexpr int kBackwardBytes = (2 * S::kOwnSize + 4 * S::kSize) * 2 + 4 * S::kStep * 4;
static_assert(kForwardBytes<ForwardShape<128>> <= 99 << 10 &&
              kBackwardBytes<BackwardShape<128>> <= 99 << 10);
// Blocks whose registers a multiprocessor is to hold, as far as nvcc does without spilling; where D
// is wide, shared memory allows fewer (docs/gpu.md)
template <int kD> constexpr int kBlocks = kD <= 64 ? 4 : 3;

// Begins to bring rows first, first + 1, ... of x to a tile; zeros beyond the last row and D
template <int kRows, int kD>
__device__ __forceinline__ void fetch(bf16* tile, const Bf16Rows& x, int first, int D) {
  constexpr int kRuns = kD / 8, kRowsAtOnce = kThreads / kRuns;
  const int d = threadIdx.x % kRuns * 8, row = threadIdx.x / kRuns;
  const bf16* from = x.data + (first + row) * x.ld + d;
  const int rows = d < D ? x.rows - first - row : 0;
  if (kRowsAtOnce > kRows && row >= kRows) return;
  UNROLL for (int i = 0; i < kRows; i += kRowsAtOnce)
      copy_async<16>(tile + (row + i) * (kD + 8) + d, from + i * x.ld, i < rows ? 16 : 0);
}

// The same of two tensors, to tiles beside each other
template <int kRows, int kD>
__device__ __forceinline__ void fetch_two(bf16* tiles, const Bf16Rows& x, const Bf16Rows& y,
                                          int first, int D) {
  fetch<kRows, kD>(tiles, x, first, D);
  fetch<kRows, kD>(tiles + kRows * (kD + 8), y, first, D);
}

// 16 rows of a tile as the left operand of a product over D
template <class S> __device__ __forceinline__ auto left(const bf16* tile, int row) {
  return [=](int d) {
    return load_left<true>([=](int x, int k) { return tile + (row + x) * S::kLd + d + k; });
  };
}

// This lane's two rows of a strip
__device__ __forceinline__ int own_row(int h) { return strip_row(h * 2); }

// rows first, first + 1, ... of x = the strip's * factor[h]
template <int kD> __device__ __forceinline__ void write(const Results& x, int first, int D,
                                                        const Strip<kD>& s,
                                                        const float (&factor)[2]) {
  UNROLL for (int h = 0; h < 2; h++) {
    const int row = first + own_row(h);
    if (row >= x.rows) continue;
    const int64_t at = x.first + row * x.ld;
    UNROLL for (int j = 0; j < kD / 8; j++) {
      if (j * 8 >= D) continue;
      const int64_t to = at + strip_column(j, 0);
      float a = s.v[j][h * 2] * factor[h], b = s.v[j][h * 2 + 1] * factor[h];
      if (x.wide) {
        float* p = static_cast<float*>(x.data) + to;
        if (x.add) a += p[0], b += p[1];
        store_pack<2>(p, Pack<float, 2>{a, b});
      } else {
        bf16* p = static_cast<bf16*>(x.data) + to;
        *reinterpret_cast<unsigned*>(p) = pair(a, b);
      }
    }
  }
}

// ---- forward

// out, lse (B,H,queries); block (head, tile): 64 queries; reads q once, and k and v as far as the
// tile sees them; D <= kD, a multiple of 8. kBytes of shared memory: for tests/sass.sh, which
// reads it in the name
template <int kD, int kBytes> __global__ void __launch_bounds__(kThreads, kBlocks<kD>)
    attention_forward(Results out, float* lse, Inputs<bf16> in, Sizes n, float scale) {
  using S = ForwardShape<kD>;
  extern __shared__ __align__(16) char shared[];
  bf16 *q_tile = reinterpret_cast<bf16*>(shared), *kv_tiles = q_tile + S::kOwnSize;
  const int q0 = (n.tiles - 1 - n.tile()) * kOwn;  // the longest walks begin first
  const int strip = threadIdx.x / kWarp * 16, first = q0 + strip;
  const int keys = n.seen_by_tile(q0, kOwn), seen_by_all = n.seen_by(first),
            seen[2] = {n.seen_by(first + own_row(0)), n.seen_by(first + own_row(1))};
  const Bf16Rows k = n.of_head(in.k), v = n.of_head(in.v);
  const auto fetch_keys = [&](int buffer, int k0) {
    fetch_two<S::kStep, kD>(kv_tiles + buffer * 2 * S::kSize, k, v, k0, n.D);
    close_copies();
  };
  if (keys > 0) {
    fetch<kOwn, kD>(q_tile, n.of_head(in.q), q0, n.D);
    fetch_keys(0, 0);
  }

  const float scale2 = scale * kLog2E;
  float most[2] = {-FLT_MAX, -FLT_MAX}, sum[2] = {0, 0};  // of scores before their scale
  Strip<kD> o;
  clear(o);
  for (int k0 = 0, buffer = 0; k0 < keys; k0 += S::kStep, buffer ^= 1) {
    wait_for_copies<0>();
    __syncthreads();  // the tiles are there, and nobody reads the other buffer any more
    if (k0 + S::kStep < keys) fetch_keys(buffer ^ 1, k0 + S::kStep);
    const bf16 *k_tile = kv_tiles + buffer * 2 * S::kSize, *v_tile = k_tile + S::kSize;
    Strip<S::kStep> s;
    clear(s);
    add_product<kD, true>(s, left<S>(q_tile, strip), k_tile, S::kLd);
    if (k0 + S::kStep > seen_by_all)
      each(s, [&](int j, int e, float& x) {
        if (k0 + strip_column(j, e) >= seen[e / 2]) x = -INFINITY;
      });

    float now[2] = {most[0], most[1]};
    each(s, [&](int, int e, float x) { now[e / 2] = fmaxf(now[e / 2], x); });
    float factor[2], zero[2];
    UNROLL for (int h = 0; h < 2; h++) {
      now[h] = reduce_lanes<Max<float>, 4>(now[h]);
      factor[h] = power_of_two((most[h] - now[h]) * scale2);
      most[h] = now[h];
      zero[h] = now[h] * scale2;
      sum[h] *= factor[h];
    }
    each(s, [&](int, int e, float& x) {
      x = power_of_two(x * scale2 - zero[e / 2]);
      sum[e / 2] += x;
    });
    each(o, [&](int, int e, float& x) { x *= factor[e / 2]; });
    add_product<S::kStep, false>(
        o, [&](int key) { return as_left(s, key); }, v_tile, S::kLd);
  }

  UNROLL for (int h = 0; h < 2; h++) {
    const float all = reduce_lanes<Sum<float>, 4>(sum[h]);
    const int row = first + own_row(h);
    if (threadIdx.x % 4 == 0 && row < n.queries.rows)
      lse[n.statistics() + row] = all > 0 ? most[h] * scale + logf(all) : -FLT_MAX;
    sum[h] = all > 0 ? 1 / all : 0;
  }
  write(n.of_head(out), first, n.D, o, sum);
}

// ---- backward

// d.q; block (head, tile): 64 queries; reads q and dout once, and k and v as far as the tile sees
// them
template <int kD, int kBytes> __global__ void __launch_bounds__(kThreads, kBlocks<kD>)
    attention_backward_q(Gradients d, Bf16Rows dout, const float* lse, const float* delta,
                         Inputs<bf16> in, Sizes n, float scale) {
  using S = BackwardShape<kD>;
  extern __shared__ __align__(16) char shared[];
  bf16 *q_tile = reinterpret_cast<bf16*>(shared), *dy_tile = q_tile + S::kOwnSize,
       *kv_tiles = dy_tile + S::kOwnSize;
  const int q0 = (n.tiles - 1 - n.tile()) * kOwn;
  const int strip = threadIdx.x / kWarp * 16, first = q0 + strip;
  const int keys = n.seen_by_tile(q0, kOwn), seen_by_all = n.seen_by(first);
  const Bf16Rows k = n.of_head(in.k), v = n.of_head(in.v);
  const auto fetch_keys = [&](int buffer, int k0) {
    fetch_two<S::kStep, kD>(kv_tiles + buffer * 2 * S::kSize, k, v, k0, n.D);
    close_copies();
  };
  if (keys > 0) {
    fetch_two<kOwn, kD>(q_tile, n.of_head(in.q), n.of_head(dout), q0, n.D);
    fetch_keys(0, 0);
  }

  const float scale2 = scale * kLog2E;
  int seen[2];
  float row_lse[2], row_delta[2];
  UNROLL for (int h = 0; h < 2; h++) {
    const int row = first + own_row(h);
    const bool inside = row < n.queries.rows;
    seen[h] = n.seen_by(row);
    row_lse[h] = inside ? lse[n.statistics() + row] * kLog2E : 0;
    row_delta[h] = inside ? delta[n.statistics() + row] : 0;
  }
  Strip<kD> sum;
  clear(sum);
  for (int k0 = 0, buffer = 0; k0 < keys; k0 += S::kStep, buffer ^= 1) {
    wait_for_copies<0>();
    __syncthreads();  // the tiles are there, and nobody reads the other buffer any more
    if (k0 + S::kStep < keys) fetch_keys(buffer ^ 1, k0 + S::kStep);
    const bf16 *k_tile = kv_tiles + buffer * 2 * S::kSize, *v_tile = k_tile + S::kSize;
    Strip<S::kStep> s, dp;
    clear(s);
    clear(dp);
    add_product<kD, true>(s, left<S>(q_tile, strip), k_tile, S::kLd);
    add_product<kD, true>(dp, left<S>(dy_tile, strip), v_tile, S::kLd);
    each(s, [&](int j, int e, float& x) {
      x = power_of_two(x * scale2 - row_lse[e / 2]) * (dp.v[j][e] - row_delta[e / 2]);
    });
    if (k0 + S::kStep > seen_by_all)
      each(s, [&](int j, int e, float& x) {
        if (k0 + strip_column(j, e) >= seen[e / 2]) x = 0;
      });
    add_product<S::kStep, false>(
        sum, [&](int key) { return as_left(s, key); }, k_tile, S::kLd);
  }
  write(n.of_head(d.q), first, n.D, sum, {scale, scale});
}

// d.k and d.v; block (head, tile): 64 keys; reads k and v once, and q and dout from the first query
// on that sees the tile
template <int kD, int kBytes> __global__ void __launch_bounds__(kThreads, kBlocks<kD> - 1)
    attention_backward_kv(Gradients d, Bf16Rows dout, const float* lse, const float* delta,
                          Inputs<bf16> in, Sizes n, float scale) {
  using S = BackwardShape<kD>;
  extern __shared__ __align__(16) char shared[];
  bf16 *k_tile = reinterpret_cast<bf16*>(shared), *v_tile = k_tile + S::kOwnSize,
       *q_tiles = v_tile + S::kOwnSize;
  float* statistics = reinterpret_cast<float*>(q_tiles + 4 * S::kSize);  // lse, delta; twice
  const int k0 = n.tile() * kOwn, strip = threadIdx.x / kWarp * 16, first = k0 + strip;
  const int seen_from[2] = {n.first_seeing(first + own_row(0)), n.first_seeing(first + own_row(1))},
            seen_by_rest = n.first_seeing(first + 15),
            begin = n.first_seeing(k0) / S::kStep * S::kStep;
  const Bf16Rows q = n.of_head(in.q), dy = n.of_head(dout);
  const auto fetch_queries = [&](int buffer, int q0) {
    fetch_two<S::kStep, kD>(q_tiles + buffer * 2 * S::kSize, q, dy, q0, n.D);
    const int i = threadIdx.x % S::kStep;
    if (threadIdx.x < 2 * S::kStep)
      copy_async<4>(statistics + buffer * 2 * S::kStep + threadIdx.x,
                    (threadIdx.x < S::kStep ? lse : delta) + n.statistics() + q0 + i,
                    q0 + i < n.queries.rows ? 4 : 0);
    close_copies();
  };
  if (begin < n.queries.rows) {
    fetch_two<kOwn, kD>(k_tile, n.of_head(in.k), n.of_head(in.v), k0, n.D);
    fetch_queries(0, begin);
  }

  const float scale2 = scale * kLog2E;
  Strip<kD> sum_k, sum_v;
  clear(sum_k);
  clear(sum_v);
  for (int q0 = begin, buffer = 0; q0 < n.queries.rows; q0 += S::kStep, buffer ^= 1) {
    wait_for_copies<0>();
    __syncthreads();  // the tiles are there, and nobody reads the other buffer any more
    if (q0 + S::kStep < n.queries.rows) fetch_queries(buffer ^ 1, q0 + S::kStep);
    const bf16 *q_tile = q_tiles + buffer * 2 * S::kSize, *dy_tile = q_tile + S::kSize;
    const float* column = statistics + buffer * 2 * S::kStep;
    Strip<S::kStep> s, dp;  // (key, query)
    clear(s);
    clear(dp);
    add_product<kD, true>(s, left<S>(k_tile, strip), q_tile, S::kLd);
    add_product<kD, true>(dp, left<S>(v_tile, strip), dy_tile, S::kLd);
    UNROLL for (int j = 0; j < S::kStep / 8; j++) {
      const auto lse2 = load_pack<2>(column + strip_column(j, 0)),
                 delta2 = load_pack<2>(column + S::kStep + strip_column(j, 0));
      UNROLL for (int e = 0; e < 4; e++) {
        s.v[j][e] = power_of_two(s.v[j][e] * scale2 - lse2[e % 2] * kLog2E);
        dp.v[j][e] -= delta2[e % 2];
      }
    }
    if (q0 < seen_by_rest)
      each(s, [&](int j, int e, float& x) {
        if (q0 + strip_column(j, e) < seen_from[e / 2]) x = 0;
      });
    each(dp, [&](int j, int e, float& x) { x *= s.v[j][e]; });
    add_product<S::kStep, false>(
        sum_v, [&](int t) { return as_left(s, t); }, dy_tile, S::kLd);
    add_product<S::kStep, false>(
        sum_k, [&](int t) { return as_left(dp, t); }, q_tile, S::kLd);
  }
  write(n.of_head(d.k), first, n.D, sum_k, {scale, scale});
  write(n.of_head(d.v), first, n.D, sum_v, {1, 1});
}

// ---- launches

template <int kD> void forward(Sizes n, Results out, float* lse, Inputs<bf16> in) {
  constexpr int kBytes = kForwardBytes<ForwardShape<kD>>;
  n.tiles = ceil_div(n.queries.rows, kOwn);
  allow_shared(attention_forward<kD, kBytes>, kBytes);
  attention_forward<kD, kBytes>
      <<<n.blocks(), kThreads, kBytes, device().compute>>>(out, lse, in, n,
                                                           1 / std::sqrt(float(n.D)));
  LAUNCHED();
}

template <int kD> void backward(Sizes n, Gradients d, Bf16Rows dout, const float* lse,
                                const float* delta, Inputs<bf16> in) {
  constexpr int kBytes = kBackwardBytes<BackwardShape<kD>>;
  for (const bool owns_keys : {false, true}) {
    const auto kernel =
        owns_keys ? attention_backward_kv<kD, kBytes> : attention_backward_q<kD, kBytes>;
    n.tiles = ceil_div(owns_keys ? n.keys.rows : n.queries.rows, kOwn);
    if (!n.tiles) continue;
    allow_shared(kernel, kBytes);
    kernel<<<n.blocks(), kThreads, kBytes, device().compute>>>(d, dout, lse, delta, in, n,
                                                               1 / std::sqrt(float(n.D)));
    LAUNCHED();
  }
}

}  // namespace

// ---- for attention_flash.cu

void flash::mma_forward(Sizes n, Results out, float* lse, Inputs<bf16> in) {
  const auto launch = n.D <= 16   ? forward<16>
                      : n.D <= 32 ? forward<32>
                      : n.D <= 64 ? forward<64>
                                  : forward<128>;
  launch(n, out, lse, in);
}

void flash::mma_backward(Sizes n, Gradients d, Bf16Rows dout, const float* lse, const float* delta,
                         Inputs<bf16> in) {
  const auto launch = n.D <= 16   ? backward<16>
                      : n.D <= 32 ? backward<32>
                      : n.D <= 64 ? backward<64>
                                  : backward<128>;
  launch(n, d, dout, lse, delta, in);
}
#endif
