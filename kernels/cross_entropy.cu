// cross_entropy.cu: softmax and cross-entropy over the vocabulary in one kernel, and the sum of the losses.
//
// idea      one block a row. The first pass finds the maximum and the sum of exponentials together: a thread that meets a new maximum scales
//           down the sum that it has (Milakov and Gimelshein, "Online normalizer calculation for softmax", 2018). The second pass turns the
//           logits into their gradient in place, so they are never stored twice. Where ranks share the vocabulary, the two passes are two
//           kernels, and between them the ranks exchange three numbers a row.
// cost      loss: reads RV; gradient: reads RV, again through the caches (backwards, the end of a row is still there), and writes RV
// not here  label smoothing, ignored targets
// test      tests/test_kernels.cpp
#include "kernels/common.cuh"

namespace {

constexpr int kThreads = block_threads(1024), kRescaleThreads = block_threads(256);

// (maximum, sum of exp(x - maximum)) of two sets of x, of both
template <class A> struct SoftmaxSum {
  static constexpr Two<A> identity{Max<A>::identity, 0};
  __device__ static Two<A> combine(Two<A> x, Two<A> y) {
    const bool first = x.a > y.a;
    const Two<A> high = first ? x : y, low = first ? y : x;
    return {high.a, high.b + low.b * exp_of(low.a - high.a)};
  }
};

// The row x (n), which may begin at any address, dealt to the threads of the block: f(first, Width<N>) for packs at multiples of 16 bytes,
// f(first, Width<1>) for the elements before and behind them
template <int N, bool kBackwards, class T, class F> __device__ __forceinline__ void for_unaligned_row(const T* x, int n, F f) {
  const int unaligned = N > 1 ? int((16 - reinterpret_cast<uintptr_t>(x) % 16) % 16 / sizeof(T)) : 0;
  const int head = unaligned < n ? unaligned : n, packs = (n - head) / N, tail = head + packs * N, i = threadIdx.x;
  if (i < head) f(i, Width<1>());
  for (int p = i; p < packs; p += kThreads) f(head + (kBackwards ? packs - 1 - p : p) * N, Width<N>());
  if (i < n - tail) f(tail + i, Width<1>());
}

// Can the exponentials of the first pass be kept in the logits' place for the second? FAST, where T is exact enough.
template <class T> constexpr bool kCanKeep = kWarp == 1 && std::is_same_v<T, acc_t<T>>;

// (maximum m, sum of exp(x - m)) of the row x (V); with kKeep, x becomes exp(x - m). Every thread of the block returns it.
template <int N, bool kKeep, class T> __device__ __forceinline__ Two<acc_t<T>> row_softmax(T* x, int V) {
  using A = acc_t<T>;
  Two<A> mine = SoftmaxSum<A>::identity;
  if constexpr (kWarp == 1) {  // FAST: a thread that has all of the row, in its cache, finds the maximum first
    for (int i = 0; i < V; i++) mine.a = Max<A>::combine(mine.a, load(x[i]));
    for (int begin = 0; begin < V; begin += 1024) {  // a sum of sums loses fewer digits than one long sum
      const int end = V - begin < 1024 ? V : begin + 1024;
      A sum = 0;
      INDEPENDENT
      for (int i = begin; i < end; i++) {
        const A e = exp_of(load(x[i]) - mine.a);
        if constexpr (kKeep) x[i] = e;
        sum += e;
      }
      mine.b += sum;
    }
  } else {
    for_unaligned_row<N, false>(x, V, [&](int i, auto width) {
      constexpr int W = decltype(width)::value;
      const auto p = load_pack<W>(x + i);
      A top = load(p[0]);
      for (int k = 1; k < W; k++) top = Max<A>::combine(top, load(p[k]));
      if (top > mine.a) mine.b *= exp_of(mine.a - top), mine.a = top;
      for (int k = 0; k < W; k++) mine.b += exp_of(load(p[k]) - mine.a);
    });
  }
  return block_reduce<SoftmaxSum<A>>(mine);
}

// The row's logits x (V), or what row_softmax kept of them, become exp(x - m) * factor, less `scale` at the target (-1: none here).
template <int N, bool kKept, class T>
__device__ __forceinline__ void row_gradient(T* x, int V, int target, acc_t<T> m, acc_t<T> factor, acc_t<T> scale) {
  using A = acc_t<T>;
  if constexpr (kWarp == 1) {
    const A at_target = target < 0 ? A(0) : (kKept ? load(x[target]) : exp_of(load(x[target]) - m)) * factor - scale;
    INDEPENDENT
    for (int i = 0; i < V; i++) x[i] = store<T>((kKept ? load(x[i]) : exp_of(load(x[i]) - m)) * factor);
    if (target >= 0) x[target] = store<T>(at_target);
  } else {
    for_unaligned_row<N, true>(x, V, [&](int i, auto width) {
      constexpr int W = decltype(width)::value;
      auto p = load_pack<W>(x + i);
      for (int k = 0; k < W; k++) p[k] = store<T>(exp_of(load(p[k]) - m) * factor - (i + k == target ? scale : A(0)));
      store_pack(x + i, p);
    });
  }
}

// losses (R) = (log of the sum of exp(logits (R,V)) - logits[target]) * scale; with kGradient: logits = (softmax - onehot) * scale.
// One block a row; reads RV (kGradient: 2RV, writes RV); any V and alignment.
template <class T, int N, bool kGradient>
__global__ void __launch_bounds__(1024) cross_entropy_kernel(acc_t<T>* losses, T* logits, const int* targets, int V, acc_t<T> scale) {
  using A = acc_t<T>;
  constexpr bool kKeep = kGradient && kCanKeep<T>;
  T* x = logits + int64_t(blockIdx.x) * V;
  const int target = targets[blockIdx.x];
  const A target_logit = load(x[target]);  // now: after the barriers of the reduction others write
  const Two<A> all = row_softmax<N, kKeep>(x, V);
  if (threadIdx.x == 0) losses[blockIdx.x] = (log_of(all.b) + (all.a - target_logit)) * scale;
  if constexpr (kGradient) row_gradient<N, kKeep>(x, V, target, all.a, scale / all.b, scale);
}

// parts (3,R) = of each row's logits (R,V): maximum, sum of exponentials beside it, the target's logit (0: not here). Reads RV.
template <class T, int N>
__global__ void __launch_bounds__(1024) softmax_parts_kernel(acc_t<T>* parts, T* logits, const int* targets, int V, int R) {
  T* x = logits + int64_t(blockIdx.x) * V;
  const int target = targets[blockIdx.x];
  const acc_t<T> target_logit = target < 0 ? acc_t<T>(0) : load(x[target]);
  const auto all = row_softmax<N, kCanKeep<T>>(x, V);
  if (threadIdx.x == 0) parts[blockIdx.x] = all.a, parts[R + blockIdx.x] = all.b, parts[2 * R + blockIdx.x] = target_logit;
}

// sums (n) *= exp(from (n) - to (n)): sums of exponentials beside one maximum, beside another; reads 3n, writes n
template <class A> __global__ void __launch_bounds__(256) rescale_kernel(A* sums, const A* from, const A* to, int n) {
  const int i = blockIdx.x * kRescaleThreads + threadIdx.x;
  if (i < n) sums[i] *= exp_of(from[i] - to[i]);
}

// The second half, with sum and target logit of all ranks in `parts` and their maximum in `top` (R). Reads and writes RV.
template <class T, int N, bool kGradient>
__global__ void __launch_bounds__(1024) cross_entropy_parts_kernel(acc_t<T>* losses, T* logits, const int* targets, const acc_t<T>* top,
                                                                   const acc_t<T>* parts, int V, int R, acc_t<T> scale) {
  using A = acc_t<T>;
  const int r = blockIdx.x;
  const A own = parts[r], sum = parts[R + r];
  if (threadIdx.x == 0) losses[r] = (log_of(sum) + (top[r] - parts[2 * R + r])) * scale;
  if constexpr (kGradient) row_gradient<N, kCanKeep<T>>(logits + int64_t(r) * V, V, targets[r], own, exp_of(own - top[r]) * scale / sum, scale);
}

// total (1) += sum of x (n), in f64; one block; reads n
template <class T> __global__ void __launch_bounds__(1024) add_sum_kernel(double* total, const T* x, int64_t n) {
  double sum = 0;
  for (int64_t i = threadIdx.x; i < n; i += kThreads) sum += load(x[i]);
  sum = block_reduce<Sum<double>>(sum);
  if (threadIdx.x == 0) *total += sum;
}

}  // namespace

// ---- host side

void cross_entropy(const Tensor& losses, const Tensor& logits, const Tensor& targets, double scale, bool gradient) {
  const int64_t R = losses.numel(), V = R ? logits.numel() / R : 0;
  ASSERT(logits.numel() == R * V && V <= INT_MAX && targets.numel() == R && losses.dtype() == master_dtype(logits.dtype()));
  if (!R) return;
  DISPATCH_PACKS(logits.dtype(), true, using A = acc_t<T>;
                 const auto kernel = gradient ? cross_entropy_kernel<T, N, true> : cross_entropy_kernel<T, N, false>;
                 kernel<<<unsigned(R), kThreads, 0, device().compute>>>(losses.data<A>(), logits.data<T>(), targets.data<int>(), int(V), A(scale)));
}

void softmax_parts(const Tensor& parts, const Tensor& logits, const Tensor& targets) {
  const int64_t R = targets.numel(), V = R ? logits.numel() / R : 0;
  ASSERT(logits.numel() == R * V && V <= INT_MAX && parts.numel() == 3 * R && parts.dtype() == master_dtype(logits.dtype()));
  if (!R) return;
  DISPATCH_PACKS(logits.dtype(), true, using A = acc_t<T>;
                 softmax_parts_kernel<T, N><<<unsigned(R), kThreads, 0, device().compute>>>(parts.data<A>(), logits.data<T>(),
                                                                                            targets.data<int>(), int(V), int(R)));
}

void softmax_rescale(const Tensor& parts, const Tensor& top) {
  const int64_t R = top.numel();
  ASSERT(parts.numel() == 3 * R && parts.dtype() == top.dtype() && top.dtype() != Dtype::bf16);
  if (!R) return;
  const unsigned blocks = unsigned(ceil_div(R, kRescaleThreads));
  DISPATCH(top.dtype(), using A = acc_t<T>;
           rescale_kernel<A><<<blocks, kRescaleThreads, 0, device().compute>>>(parts.data<A>() + R, parts.data<A>(), top.data<A>(), int(R)));
}

void cross_entropy_parts(const Tensor& losses, const Tensor& logits, const Tensor& targets, const Tensor& top, const Tensor& parts, double scale,
                         bool gradient) {
  const int64_t R = losses.numel(), V = R ? logits.numel() / R : 0;
  ASSERT(logits.numel() == R * V && targets.numel() == R && top.numel() == R && parts.numel() == 3 * R && top.dtype() == losses.dtype());
  if (!R) return;
  DISPATCH_PACKS(logits.dtype(), true, using A = acc_t<T>;
                 const auto kernel = gradient ? cross_entropy_parts_kernel<T, N, true> : cross_entropy_parts_kernel<T, N, false>;
                 kernel<<<unsigned(R), kThreads, 0, device().compute>>>(losses.data<A>(), logits.data<T>(), targets.data<int>(), top.data<A>(),
                                                                        parts.data<A>(), int(V), int(R), A(scale)));
}

void add_sum(const Tensor& total, const Tensor& x) {
  ASSERT(total.numel() == 1 && total.dtype() == Dtype::f64);
  const int64_t n = x.numel();
  DISPATCH(x.dtype(), add_sum_kernel<T><<<1, kThreads, 0, device().compute>>>(total.data<double>(), x.data<T>(), n));
}
