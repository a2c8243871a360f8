// common.cuh: what every kernel file shares: types, the block's shape, packs of 16 bytes, the block
// reduction, dispatch over dtypes.
//
// The same text is compiled three ways (docs/kernels.md): by nvcc; on the CPU in FAST form, where a
// block has one thread, kWarp is 1, barriers and shuffles vanish and loops vectorize; on the CPU in
// FAITHFUL form, where every thread of a block is a fiber. So:
//   a block owns a row or a contiguous tile and its threads stride through it;  no literal 32 in
//   lane arithmetic, only kWarp; the threads of a block are a constant, block_threads(256), where
//   values stay in registers from turn to turn, else as many as a row needs (row_threads); a loop
//   whose turns touch different elements, perhaps in place, is marked INDEPENDENT: g++ cannot know
//   it, and would not vectorize; what one thread must do in another way is behind a name:
//   <columns.cuh> and <block_product.cuh> are kernels/'s, in FAST those in cpu/.
#pragma once
#include <cfloat>
#include <climits>
#include <cmath>
#include <initializer_list>
#include <type_traits>

#include "kernels/kernels.h"
#include "kernels/op_times.h"

#ifdef __CUDACC__
// cpu/cuda/fast.h: 1, cpu/faithful/faithful.h: 32
constexpr int kWarp = 32;
constexpr int block_threads(int threads) { return threads; }  // cpu/cuda/fast.h: 1
#endif

#ifdef CPU_FAST
#define INDEPENDENT _Pragma("GCC ivdep")
#else
#define INDEPENDENT
#endif
// A loop over what a thread holds in registers becomes straight-line code; in FAST vector
// instructions: g++ is kept from unrolling it before it vectorizes.
#if defined(__CUDACC__)
#define UNROLL _Pragma("unroll")
#elif defined(CPU_FAST)
#define UNROLL _Pragma("GCC unroll 1")
#else
#define UNROLL
#endif

#define LAUNCHED() CUDA_CHECK(cudaGetLastError())  // follows each launch

// DISPATCH(x.dtype(), kernel<T><<<...>>>(x.data<T>())): the statement with T = float, double or
// __nv_bfloat16, and A = acc_t<T>. A tensor of another dtype is refused by its data<T>(): no kernel
// is handed one.
#define DISPATCH(dtype_, ...)                                            \
  do {                                                                   \
    switch (dtype_) {                                                    \
      DISPATCH_CASE(f32, float, __VA_ARGS__)                             \
      DISPATCH_CASE(bf16, __nv_bfloat16, __VA_ARGS__)                    \
      DISPATCH_CASE(f64, double, __VA_ARGS__)                            \
      default: throw Error(sentence("no kernel for ", name_of(dtype_))); \
    }                                                                    \
    LAUNCHED();                                                          \
  } while (0)
#define DISPATCH_CASE(dtype_, T_, ...)   \
  case Dtype::dtype_: {                  \
    using T = T_;                        \
    using A [[maybe_unused]] = acc_t<T>; \
    __VA_ARGS__;                         \
  } break;

// The same, with N elements in a pack: 16 bytes where `packs` (see in_packs), else single elements.
#define DISPATCH_PACKS(dtype_, packs_, ...) \
  DISPATCH(                                 \
      dtype_,                               \
      if (packs_) {                         \
        constexpr int N = kPack<T>;         \
        __VA_ARGS__;                        \
      } else {                              \
        constexpr int N = 1;                \
        __VA_ARGS__;                        \
      })

namespace {

template <class T> struct AccOf { using type = float; };
template <> struct AccOf<double> { using type = double; };
template <class T> using acc_t = typename AccOf<T>::type;  // what sums run in

__device__ __forceinline__ float load(float x) { return x; }
__device__ __forceinline__ double load(double x) { return x; }
__device__ __forceinline__ float load(__nv_bfloat16 x) { return __bfloat162float(x); }
template <class T, class A> __device__ __forceinline__ T store(A x) { return static_cast<T>(x); }
template <> __device__ __forceinline__ __nv_bfloat16 store<__nv_bfloat16, float>(float x) {
  return __float2bfloat16(x);
}

// Before a launch whose blocks share more than 48 KiB (dynamic shared memory)
template <class K> void allow_shared(K kernel, size_t bytes) {
  CUDA_CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes));
}

// float and double by one name
__device__ __forceinline__ float exp_of(float x) { return expf(x); }
__device__ __forceinline__ double exp_of(double x) { return exp(x); }
__device__ __forceinline__ float log_of(float x) { return logf(x); }
__device__ __forceinline__ double log_of(double x) { return log(x); }
__device__ __forceinline__ float sqrt_of(float x) { return sqrtf(x); }
__device__ __forceinline__ double sqrt_of(double x) { return sqrt(x); }

// 2^x by one instruction, within 2 units in the last place; expf takes eight
__device__ __forceinline__ float power_of_two(float x) {
#ifdef __CUDACC__
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#else
  return exp2f(x);
#endif
}
constexpr float kLog2E = 1.44269504f;  // exp(x) = 2^(x log2(e))

// ---- packs
// Neighbours that a thread moves at once (a vectorized access): 16 bytes on a GPU; one element in
// FAST, where loops over packs vectorize by themselves.

template <class T> constexpr int kPack = kWarp == 1 ? 1 : 16 / int(sizeof(T));

template <class T, int N> struct alignas(N * sizeof(T) < 16 ? N * sizeof(T) : 16) Pack {
  T v[N];
  __device__ T& operator[](int i) { return v[i]; }
  __device__ const T& operator[](int i) const { return v[i]; }
};
// A GPU traps at an address that is no multiple of a pack; x86 does not mind, so FAITHFUL looks.
template <int N, class T> __device__ __forceinline__ void check_address([[maybe_unused]] T* p) {
#ifdef CPU_FAITHFUL
  ASSERT(reinterpret_cast<uintptr_t>(p) % alignof(Pack<T, N>) == 0, "a pack at an odd address");
#endif
}
template <int N, class T> __device__ __forceinline__ Pack<T, N> load_pack(const T* p) {
  check_address<N>(p);
  return *reinterpret_cast<const Pack<T, N>*>(p);
}
template <int N, class T> __device__ __forceinline__ void store_pack(T* p, Pack<T, N> x) {
  check_address<N>(p);
  *reinterpret_cast<Pack<T, N>*>(p) = x;
}
// The first `inside` elements at p, zeros after them; packs: p begins at a multiple of 16 bytes
template <int N, class T>
__device__ __forceinline__ Pack<T, N> load_run(const T* p, int inside, bool packs) {
  if (packs && inside >= N) return load_pack<N>(p);
  Pack<T, N> run;
  for (int e = 0; e < N; e++) run[e] = e < inside ? p[e] : T(0.0f);
  return run;
}
template <int N> using Width = std::integral_constant<int, N>;  // a pack's width as an argument

// Can rows of `width` elements of these tensors be read in packs? (Tensor::part may begin at any
// element.) Empty tensors do not matter.
inline bool in_packs(int64_t width, std::initializer_list<const Tensor*> tensors) {
  for (const Tensor* t : tensors)
    if (!t->empty() &&
        (reinterpret_cast<uintptr_t>(t->raw()) % 16 || width * int64_t(size_of(t->dtype())) % 16))
      return false;
  return true;
}

// Threads of a block for rows of so many packs: as few rounds as `most` threads can, and nobody
// idle in the last one, so that a row of 96 packs has 96 threads and not 256.
inline unsigned row_threads(int64_t packs, int most) {
  const int64_t rounds = std::max<int64_t>(ceil_div(packs, most), 1);
  return ceil_div(ceil_div(packs, rounds), kWarp) * kWarp;
}

// The packs of a row of `width` elements (a multiple of N), dealt to the threads of the block, of
// which there may be any number (see row_threads): f(first element of the pack)
template <int N, class F> __device__ __forceinline__ void for_row(int width, F f) {
  INDEPENDENT
  for (int i = threadIdx.x * N; i < width; i += blockDim.x * N) f(i);
}

// The same for `size` elements, of which N need not be a divisor: f(first element of the pack,
// Width), with Width<1> for those at the end
template <int kThreads, int N, class F> __device__ __forceinline__ void for_packs(int size, F f) {
  const int packed = size / N * N;
  INDEPENDENT
  for (int i = threadIdx.x * N; i < packed; i += kThreads * N) f(i, Width<N>());
  if (N > 1 && packed + int(threadIdx.x) < size) f(packed + int(threadIdx.x), Width<1>());
}

// ---- reductions over a block

template <class A> struct Sum {
  static constexpr A identity = 0;
  __device__ static A combine(A a, A b) { return a + b; }
};
template <class A> struct Max {
  static constexpr A identity = sizeof(A) == 8 ? A(-DBL_MAX) : A(-FLT_MAX);
  __device__ static A combine(A a, A b) { return a > b ? a : b; }
};

template <class A> struct Two { A a, b; };  // two values that are reduced together
template <class A> struct SumTwo {
  static constexpr Two<A> identity{0, 0};
  __device__ static Two<A> combine(Two<A> x, Two<A> y) { return {x.a + y.a, x.b + y.b}; }
};

template <class A> __device__ __forceinline__ A from_lane_xor(A v, int o) {
  return __shfl_xor_sync(~0u, v, o);
}
template <class A> __device__ __forceinline__ Two<A> from_lane_xor(Two<A> v, int o) {
  return {from_lane_xor(v.a, o), from_lane_xor(v.b, o)};
}

// Each of kLanes threads side by side returns the reduction of their values.
template <class Op, int kLanes = kWarp, class V> __device__ __forceinline__ V reduce_lanes(V v) {
  for (int o = kLanes / 2; o > 0; o >>= 1) v = Op::combine(v, from_lane_xor(v, o));
  return v;
}

// Every thread of the block returns the reduction of all their values, combined in an order that
// the block's shape alone decides.
template <class Op, class V> __device__ __forceinline__ V block_reduce(V v) {
  if constexpr (kWarp == 1) return v;  // FAST: one thread
  __shared__ V part[32];
  v = reduce_lanes<Op>(v);
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp, warps = blockDim.x / kWarp;
  if (lane == 0) part[warp] = v;
  __syncthreads();
  v = lane < warps ? part[lane] : Op::identity;
  v = reduce_lanes<Op>(v);
  __syncthreads();  // `part` may be reused immediately
  return v;
}

}  // namespace
