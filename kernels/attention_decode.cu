// attention_decode.cu: attention of one new token a sequence over a cache of keys and values.
//
// idea      one block a sequence and head. Its warps share the positions out; each keeps a maximum,
//           a sum of exponentials and a weighted sum of values, scaled down when a new maximum
//           comes (Milakov and Gimelshein, "Online normalizer calculation for softmax", 2018). In
//           the end the warps' parts are brought to one maximum and added up, first to last. The
//           new token's own key and value come from qkv and are put into the cache for the tokens
//           after it.
// layout    cache (B,2,H,S,D): the keys of one head lie one after the other
// cost      reads the cache of the positions so far once; 4 D flops and an exponential a position
//           and head
// not here  splitting one long cache over blocks ("flash decoding"); heads wider than 256
// test      tests/test_decode.cpp
#include <columns.cuh>

namespace {

constexpr int kThreads = block_threads(512), kWarps = kThreads / kWarp, kMaxD = 256,
              kCopyThreads = block_threads(128);
constexpr int kTogether = kWarp == 1 ? 1 : 4;  // positions whose loads are under way at a time

// What a warp has seen: maximum score, sum of exp(score - maximum), the values weighed with that,
// of which a lane has kOwn channels
template <class A, int kOwn> struct Seen { A most, sum, value[kOwn]; };

// Sees kRows positions, whose keys and values are ld apart.
template <int kRows, int kOwn, class A, class T>
__device__ __forceinline__ void see(Seen<A, kOwn>& s, const A (&q)[kOwn], const T* keys,
                                    const T* values, int64_t ld, A scale, int D) {
  A score[kRows] = {}, most = s.most;
  for_lane_columns<kOwn>(D, [&](int i, int d) {
    for (int u = 0; u < kRows; u++) score[u] += q[i] * A(load(keys[u * ld + d]));
  });
  for (int u = 0; u < kRows; u++) {
    score[u] = scale * reduce_lanes<Sum<A>>(score[u]);
    most = Max<A>::combine(most, score[u]);
  }
  if (most > s.most) {
    const A shrink = exp_of(s.most - most);
    s.most = most, s.sum *= shrink;
    for_lane_columns<kOwn>(D, [&](int i, int) { s.value[i] *= shrink; });
  }
  for (int u = 0; u < kRows; u++) s.sum += score[u] = exp_of(score[u] - most);
  for_lane_columns<kOwn>(D, [&](int i, int d) {
    for (int u = 0; u < kRows; u++) s.value[i] += score[u] * A(load(values[u * ld + d]));
  });
}

// out (B,H,D), cache (B,2,H,S,D), qkv (B,3,H,D), lengths (B); one block a sequence and head;
// D <= kD
template <class T, int kD> __global__ void __launch_bounds__(512)
    decode_kernel(T* out, T* cache, const T* qkv, const int* lengths, int H, int64_t S, int D,
                  acc_t<T> scale) {
  using A = acc_t<T>;
  constexpr int kOwn = kD / kWarp;
  const int64_t b = blockIdx.x / H, h = blockIdx.x % H;
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp, length = lengths[b];
  T *const keys = cache + (b * 2 * H + h) * S * D, *const values = keys + H * S * D;
  const T *const query = qkv + (b * 3 * H + h) * D, *const key = query + int64_t(H) * D,
                 *const value = key + int64_t(H) * D;
  A q[kOwn] = {};
  for_lane_columns<kOwn>(D, [&](int i, int d) { q[i] = load(query[d]); });
  Seen<A, kOwn> s{Max<A>::identity, 0, {}};
  const auto see_cached = [&](int t, auto rows) {
    constexpr int kRows = decltype(rows)::value;
    see<kRows>(s, q, keys + int64_t(t) * D, values + int64_t(t) * D, int64_t(kWarps) * D, scale, D);
  };
  int t = warp;
  for (; t + (kTogether - 1) * kWarps < length; t += kTogether * kWarps)
    see_cached(t, Width<kTogether>());
  for (; t < length; t += kWarps) see_cached(t, Width<1>());
  if (warp == 0) {
    see<1>(s, q, key, value, D, scale, D);
    for_lane_columns<kOwn>(D, [&](int, int d) {
      keys[int64_t(length) * D + d] = key[d], values[int64_t(length) * D + d] = value[d];
    });
  }
  __shared__ A most[kWarps], sum[kWarps], part[kWarps][kD];
  if (lane == 0) most[warp] = s.most, sum[warp] = s.sum;
  for_lane_columns<kOwn>(D, [&](int i, int d) { part[warp][d] = s.value[i]; });
  __syncthreads();
  A top = most[0], all = 0;
  for (int w = 1; w < kWarps; w++) top = Max<A>::combine(top, most[w]);
  for (int w = 0; w < kWarps; w++) all += sum[w] * exp_of(most[w] - top);
  for (int d = threadIdx.x; d < D; d += kThreads) {
    A v = 0;
    for (int w = 0; w < kWarps; w++) v += part[w][d] * exp_of(most[w] - top);
    out[(b * H + h) * D + d] = store<T>(v / all);
  }
}

// cache (B,2,H,S,D) at sequence b, positions first .. first+T-1 = keys and values of qkv (T,3,H,D);
// one block a position, part (0 keys, 1 values) and head; reads and writes 2THD
template <class T> __global__ void __launch_bounds__(128)
    append_kernel(T* cache, const T* qkv, int H, int64_t S, int D, int64_t first) {
  const int64_t h = blockIdx.x % H, part = blockIdx.x / H % 2, t = blockIdx.x / H / 2;
  const T* const from = qkv + ((t * 3 + 1 + part) * H + h) * D;
  T* const to = cache + ((part * H + h) * S + first + t) * D;
  INDEPENDENT
  for (int d = threadIdx.x; d < D; d += kCopyThreads) to[d] = from[d];
}

}  // namespace

void attention_decode(const Tensor& out, const Tensor& cache, const Tensor& qkv,
                      const Tensor& lengths, int64_t H) {
  // not the cache: how far it is filled, the device knows
  OP("attention_decode", bytes_of(out, qkv));
  const int64_t B = cache.dim(0), S = cache.dim(3), D = cache.dim(4);
  REQUIRE(D <= kMaxD, "decoding takes heads of at most ", kMaxD, " channels, not ", D);
  ASSERT(cache.dim(2) == H && qkv.numel() == B * 3 * H * D && out.numel() == B * H * D &&
         lengths.numel() == B);
  if (!out.numel()) return;
  DISPATCH(cache.dtype(), const auto kernel = D <= 64    ? decode_kernel<T, 64>
                                              : D <= 128 ? decode_kernel<T, 128>
                                                         : decode_kernel<T, kMaxD>;
           kernel<<<B * H, kThreads, 0, device().compute>>>(out.data<T>(), cache.data<T>(),
                                                            qkv.data<T>(), lengths.data<int>(), H,
                                                            S, D, 1 / std::sqrt(D)));
}

void append_to_cache(const Tensor& cache, const Tensor& qkv, int64_t b, int64_t first, int64_t H) {
  OP("append_to_cache", bytes_of(qkv) * 4 / 3);
  const int64_t S = cache.dim(3), D = cache.dim(4), T_ = qkv.numel() / (3 * H * D);
  ASSERT(b < cache.dim(0) && first + T_ <= S && cache.dim(2) == H);
  if (!T_) return;
  DISPATCH(cache.dtype(), append_kernel<T><<<T_ * 2 * H, kCopyThreads, 0, device().compute>>>(
                              cache.data<T>() + b * 2 * H * S * D, qkv.data<T>(), H, S, D, first));
}
