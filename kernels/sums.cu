// sums.cu: sums over whole tensors, in f64: of the losses, of the squares of a gradient; and the
// norm of all gradients, which clips them.
//
// idea      a block sums a fixed chunk; a second launch adds the chunks' sums up in the same way.
//           What comes out stays on the device, so that the step waits for nobody.
// cost      reads n
// test      tests/test_kernels.cpp
#include "kernels/common.cuh"

namespace {

constexpr int kThreads = block_threads(256);
constexpr int64_t kChunk = 1 << 16;

// out[chunk] = sum of x's elements of that chunk, or kSquares of their squares; `add`: +=. One
// block a chunk; reads n
template <class T, int N, bool kSquares> __global__ void __launch_bounds__(256)
    sum_kernel(double* out, const T* x, int64_t n, bool add) {
  const int64_t begin = int64_t(blockIdx.x) * kChunk;
  const int size = int(n - begin < kChunk ? n - begin : kChunk), packed = size / N * N;
  x += begin;
  double sum = 0;
  const auto take = [&](double v) { sum += kSquares ? v * v : v; };
  for_row<kThreads, N>(packed, [&](int i) {
    const auto p = load_pack<N>(x + i);
    for (int k = 0; k < N; k++) take(load(p[k]));
  });
  if (packed + int(threadIdx.x) < size) take(load(x[packed + threadIdx.x]));
  sum = block_reduce<Sum<double>>(sum);
  if (threadIdx.x == 0) out[blockIdx.x] = add ? out[blockIdx.x] + sum : sum;
}

// norm = sqrt(squares (n), first to last), clip = min(1, limit / norm), or 1 without a limit; one
// thread: n is the number of parameters
__global__ void norm_kernel(double* norm, double* clip, const double* squares, int64_t n,
                            double limit) {
  double sum = 0;
  for (int64_t i = 0; i < n; i++) sum += squares[i];
  *norm = sqrt(sum);
  *clip = limit > 0 && *norm > limit ? limit / *norm : 1;
}

// total = sum of x, or kSquares of its squares; `add`: +=
template <bool kSquares> void sum_into(double* total, const Tensor& x, bool add) {
  const int64_t n = x.numel(), chunks = std::max(ceil_div(n, kChunk), int64_t(1));
  const Tensor sums = chunks > 1 ? Tensor({chunks}, Dtype::f64, Memory::workspace) : Tensor();
  double* const out = chunks > 1 ? sums.data<double>() : total;
  DISPATCH_PACKS(x.dtype(), in_packs(0, {&x}),
                 sum_kernel<T, N, kSquares><<<unsigned(chunks), kThreads, 0, device().compute>>>(
                     out, x.data<T>(), n, add && chunks == 1));
  if (chunks > 1) sum_into<false>(total, sums, add);
}

}  // namespace

// ---- host side

void add_sum(const Tensor& total, const Tensor& x) {
  OP("add_sum", bytes_of(total, x));
  ASSERT(total.numel() == 1);
  sum_into<false>(total.data<double>(), x, true);
}

void sum_of_squares(const Tensor& out, int64_t index, const Tensor& x) {
  OP("sum_of_squares", bytes_of(x));
  ASSERT(index >= 0 && index < out.numel());
  sum_into<true>(out.data<double>() + index, x, false);
}

void norm_and_clip(const Tensor& norm, const Tensor& clip, const Tensor& squares, double limit) {
  OP("norm_and_clip", bytes_of(squares));
  ASSERT(norm.numel() == 1 && clip.numel() == 1);
  norm_kernel<<<1, block_threads(1), 0, device().compute>>>(
      norm.data<double>(), clip.data<double>(), squares.data<double>(), squares.numel(), limit);
  LAUNCHED();
}
