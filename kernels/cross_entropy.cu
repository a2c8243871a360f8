// cross_entropy.cu: softmax and cross-entropy over the vocabulary in one kernel.
//
// idea      one block a row. The first pass finds the maximum and the sum of exponentials together:
//           a thread that meets a new maximum scales down the sum that it has (Milakov and
//           Gimelshein, "Online normalizer calculation for softmax", 2018). The second pass turns
//           the logits into their gradient in place, so they are never stored twice. Where ranks
//           share the vocabulary, the two passes are two kernels, and between them the ranks
//           exchange three numbers a row.
// cost      loss: reads RV; gradient: reads RV, again through the caches (backwards, the end of a
//           row is still there), and writes RV
// not here  label smoothing, ignored targets
// test      tests/test_kernels.cpp
#include <columns.cuh>

namespace {

constexpr int kThreads = block_threads(1024), kRescaleThreads = block_threads(256);

// exp for logits of T. A GPU reads a logit of bf16 twice, with an exponential each time: expf's
// instructions would take nearly as long as memory does, and of their bits 8 count.
template <class T> __device__ __forceinline__ acc_t<T> exp_for(acc_t<T> x) {
  if constexpr (kWarp > 1 && std::is_same_v<T, __nv_bfloat16>) return power_of_two(x * kLog2E);
  else return exp_of(x);
}

// (maximum, sum of exp(x - maximum)) of two sets of x, of both
template <class A> struct SoftmaxSum {
  static constexpr Two<A> identity{Max<A>::identity, 0};
  __device__ static Two<A> combine(Two<A> x, Two<A> y) {
    const bool first = x.a > y.a;
    const Two<A> high = first ? x : y, low = first ? y : x;
    return {high.a, high.b + low.b * exp_of(low.a - high.a)};
  }
};

// (maximum m, sum of exp(x - m)) of the row x (V). Every thread of the block returns it.
template <int N, class T> __device__ __forceinline__ Two<acc_t<T>> row_softmax(const T* x, int V) {
  using A = acc_t<T>;
  Two<A> mine = SoftmaxSum<A>::identity;
  for_ragged_columns<kThreads, N, false>(V, [&](int i, auto n) {
    A top = mine.a, sum = 0;
    read_columns(x + i, n, [&](int, A v) { top = Max<A>::combine(top, v); });
    read_columns(x + i, n, [&](int, A v) { sum += exp_for<T>(v - top); });
    if (top > mine.a) mine.b *= exp_of(mine.a - top), mine.a = top;
    mine.b += sum;
  });
  return block_reduce<SoftmaxSum<A>>(mine);
}

// Of a row x (V) whose maximum and sum of exponentials are `all`: the loss, and with kGradient x =
// (softmax - onehot) * scale, and 0 after it up to the next row, at x + ld
template <int N, bool kGradient, class T>
__device__ __forceinline__ void finish_row(acc_t<T>* loss, T* x, int V, int ld, int target,
                                           acc_t<T> target_logit, Two<acc_t<T>> all,
                                           acc_t<T> scale) {
  using A = acc_t<T>;
  if (threadIdx.x == 0) *loss = (log_of(all.b) + (all.a - target_logit)) * scale;
  const A factor = scale / all.b;
  if constexpr (kGradient) {
    for_ragged_columns<kThreads, N, true>(V, [&](int i, auto n) {
      change_columns(x + i, n, [&](int k, A v) {
        return exp_for<T>(v - all.a) * factor - (i + k == target ? scale : A(0));
      });
    });
    for (int i = V + int(threadIdx.x); i < ld; i += kThreads) x[i] = store<T>(A(0));
  }
}

// losses (R) = (log of the sum of exp(logits (R,V)) - logits[target]) * scale; with kGradient:
// logits = (softmax - onehot) * scale, and 0 in the padding. One block a row; rows are ld apart;
// reads RV (kGradient: 2RV, writes R ld); any V.
template <class T, int N, bool kGradient> __global__ void __launch_bounds__(1024)
    cross_entropy_kernel(acc_t<T>* losses, T* logits, const int* targets, int V, int ld,
                         acc_t<T> scale) {
  T* x = logits + int64_t(blockIdx.x) * ld;
  const int target = targets[blockIdx.x];
  // now: after the barriers of the reduction others write
  const acc_t<T> target_logit = load(x[target]);
  finish_row<N, kGradient>(losses + blockIdx.x, x, V, ld, target, target_logit,
                           row_softmax<N>(x, V), scale);
}

// parts (3,R) = of each row's logits (R,V): maximum, sum of exponentials beside it, the target's
// logit (0: not here). Reads RV.
template <class T, int N> __global__ void __launch_bounds__(1024)
    softmax_parts_kernel(acc_t<T>* parts, const T* logits, const int* targets, int V, int ld,
                         int64_t R) {
  const T* x = logits + int64_t(blockIdx.x) * ld;
  const int target = targets[blockIdx.x];
  const auto all = row_softmax<N>(x, V);
  const acc_t<T> target_logit = target < 0 ? acc_t<T>(0) : load(x[target]);
  if (threadIdx.x == 0)
    parts[blockIdx.x] = all.a, parts[R + blockIdx.x] = all.b,
    parts[2 * R + blockIdx.x] = target_logit;
}

// sums (n) *= exp(from (n) - to (n)): sums of exponentials beside one maximum, beside another;
// reads 3n, writes n
template <class A> __global__ void __launch_bounds__(256)
    rescale_kernel(A* sums, const A* from, const A* to, int n) {
  const int i = blockIdx.x * kRescaleThreads + threadIdx.x;
  if (i < n) sums[i] *= exp_of(from[i] - to[i]);
}

// The second half, with sum and target logit of all ranks in `parts` and their maximum in `top`
// (R). Reads and writes RV.
template <class T, int N, bool kGradient> __global__ void __launch_bounds__(1024)
    cross_entropy_parts_kernel(acc_t<T>* losses, T* logits, const int* targets, const acc_t<T>* top,
                               const acc_t<T>* parts, int V, int ld, int64_t R, acc_t<T> scale) {
  const int r = blockIdx.x;
  finish_row<N, kGradient>(losses + r, logits + int64_t(r) * ld, V, ld, targets[r],
                           parts[2 * R + r], Two<acc_t<T>>{top[r], parts[R + r]}, scale);
}

}  // namespace

// ---- host side

// from one of R rows of logits to the next, of which the first V columns count
static int64_t row_length(const Tensor& logits, int64_t R, int64_t V) {
  const int64_t ld = R ? logits.numel() / R : V;
  ASSERT(logits.numel() == R * ld && V > 0 && V <= ld && ld <= INT_MAX);
  return ld;
}

void cross_entropy(const Tensor& losses, const Tensor& logits, const Tensor& targets, int64_t V,
                   double scale, bool gradient) {
  OP("cross_entropy", bytes_of(losses, logits, targets) + gradient * bytes_of(logits));
  const int64_t R = targets.numel(), ld = row_length(logits, R, V);
  ASSERT(losses.numel() == R);
  if (!R) return;
  DISPATCH_PACKS(logits.dtype(), in_packs(ld, {&logits}),
                 const auto kernel = gradient ? cross_entropy_kernel<T, N, true>
                                              : cross_entropy_kernel<T, N, false>;
                 kernel<<<R, kThreads, 0, device().compute>>>(losses.data<A>(), logits.data<T>(),
                                                              targets.data<int>(), V, ld, scale));
}

void softmax_parts(const Tensor& parts, const Tensor& logits, const Tensor& targets, int64_t V) {
  OP("softmax_parts", bytes_of(parts, logits, targets));
  const int64_t R = targets.numel(), ld = row_length(logits, R, V);
  ASSERT(parts.numel() == 3 * R);
  if (!R) return;
  DISPATCH_PACKS(logits.dtype(), in_packs(ld, {&logits}),
                 softmax_parts_kernel<T, N><<<R, kThreads, 0, device().compute>>>(
                     parts.data<A>(), logits.data<T>(), targets.data<int>(), V, ld, R));
}

void softmax_rescale(const Tensor& parts, const Tensor& top) {
  OP("softmax_rescale", 4 * bytes_of(top));
  const int64_t R = top.numel();
  ASSERT(parts.numel() == 3 * R);
  if (!R) return;
  const unsigned blocks = ceil_div(R, kRescaleThreads);
  DISPATCH(top.dtype(), rescale_kernel<A><<<blocks, kRescaleThreads, 0, device().compute>>>(
                            parts.data<A>() + R, parts.data<A>(), top.data<A>(), R));
}

void cross_entropy_parts(const Tensor& losses, const Tensor& logits, const Tensor& targets,
                         int64_t V, const Tensor& top, const Tensor& parts, double scale,
                         bool gradient) {
  OP("cross_entropy_parts",
     bytes_of(losses, targets, top, parts) + gradient * 2 * bytes_of(logits));
  const int64_t R = targets.numel(), ld = row_length(logits, R, V);
  ASSERT(losses.numel() == R && top.numel() == R && parts.numel() == 3 * R);
  if (!R) return;
  DISPATCH_PACKS(logits.dtype(), in_packs(ld, {&logits}),
                 const auto kernel = gradient ? cross_entropy_parts_kernel<T, N, true>
                                              : cross_entropy_parts_kernel<T, N, false>;
                 kernel<<<R, kThreads, 0, device().compute>>>(losses.data<A>(), logits.data<T>(),
                                                              targets.data<int>(), top.data<A>(),
                                                              parts.data<A>(), V, ld, R, scale));
}
