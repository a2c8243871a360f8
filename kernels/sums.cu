// sums.cu: sums over whole tensors, in f64: of the losses, of the squares of a gradient; and the
// norm of all gradients, which clips them.
//
// idea      a block sums a fixed chunk; a second launch adds the chunks' sums up in the same way.
//           The gradients' chunks are the pieces of the optimizer's table: two launches for all
//           parameters. What comes out stays on the device, so that the step waits for nobody.
// cost      reads n
// test      tests/test_kernels.cpp
#include "kernels/common.cuh"

namespace {

constexpr int kThreads = block_threads(256);
constexpr int64_t kChunk = 1 << 16;

// The sum of the block's `size` elements, or kSquares of their squares, in every thread
template <int N, bool kSquares, class T> __device__ double sum_over_block(const T* x, int size) {
  double sum = 0;
  for_packs<kThreads, N>(size, [&](int i, auto width) {
    const auto p = load_pack<decltype(width)::value>(x + i);
    for (int k = 0; k < decltype(width)::value; k++) {
      const double v = load(p[k]);
      sum += kSquares ? v * v : v;
    }
  });
  return block_reduce<Sum<double>>(sum);
}
// out[chunk] = sum of x's elements of that chunk; `add`: +=. One block a chunk; reads n
template <class T, int N> __global__ void __launch_bounds__(256)
    sum_kernel(double* out, const T* x, int64_t n, bool add) {
  const int64_t begin = int64_t(blockIdx.x) * kChunk;
  const double sum = sum_over_block<N, false>(x + begin, n - begin < kChunk ? n - begin : kChunk);
  if (threadIdx.x == 0) out[blockIdx.x] = add ? out[blockIdx.x] + sum : sum;
}

// sums[piece] = sum of the squares of what the pointer `of` bytes after a piece's begin points to;
// one block a piece
template <class A> __global__ void __launch_bounds__(256)
    squares_kernel(double* sums, const UpdatePiece* pieces, size_t of) {
  const UpdatePiece& piece = pieces[blockIdx.x];
  const A* const x = *reinterpret_cast<A* const*>(reinterpret_cast<const char*>(&piece) + of);
  const double sum = sum_over_block<kPack<A>, true>(x, piece.size);
  if (threadIdx.x == 0) sums[blockIdx.x] = sum;
}

// squares[id] = sum over the pieces of that parameter; one block a piece, and the first one's sums
__global__ void __launch_bounds__(256)
    parameters_kernel(double* squares, const double* sums, const UpdatePiece* pieces) {
  const UpdatePiece& first = pieces[blockIdx.x];
  if (!first.counted_pieces) return;
  const double sum = sum_over_block<1, false>(sums + blockIdx.x, first.counted_pieces);
  if (threadIdx.x == 0) squares[first.id] = sum;
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

}  // namespace

// ---- host side

void add_sum(const Tensor& total, const Tensor& x) {
  OP("add_sum", bytes_of(total, x));
  ASSERT(total.numel() == 1);
  const int64_t n = x.numel(), chunks = std::max(ceil_div(n, kChunk), int64_t(1));
  const Tensor sums = chunks > 1 ? Tensor({chunks}, Dtype::f64, Memory::workspace) : total;
  DISPATCH_PACKS(x.dtype(), in_packs(0, {&x}),
                 sum_kernel<T, N><<<chunks, kThreads, 0, device().compute>>>(
                     sums.data<double>(), x.data<T>(), n, chunks == 1));
  if (chunks > 1) add_sum(total, sums);
}

void sum_of_squares(const Tensor& squares, const UpdateTable& table, size_t of) {
  OP("sum_of_squares", double(table.elements * size_of(master_dtype(table.compute))));
  fill(squares, 0);
  if (!table.size()) return;
  const Tensor sums({table.size()}, Dtype::f64, Memory::workspace);
  double *const parts = sums.data<double>(), *const out = squares.data<double>();
  DISPATCH(table.compute, squares_kernel<A>
           <<<table.size(), kThreads, 0, device().compute>>>(parts, table.data(), of));
  parameters_kernel<<<table.size(), kThreads, 0, device().compute>>>(out, parts, table.data());
  LAUNCHED();
}

void norm_and_clip(const Tensor& norm, const Tensor& clip, const Tensor& squares, double limit) {
  OP("norm_and_clip", bytes_of(squares));
  ASSERT(norm.numel() == 1 && clip.numel() == 1);
  norm_kernel<<<1, block_threads(1), 0, device().compute>>>(
      norm.data<double>(), clip.data<double>(), squares.data<double>(), squares.numel(), limit);
  LAUNCHED();
}
