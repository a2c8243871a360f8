// attention_merge.cu: attention over several sets of keys, one after the other: what context
// parallelism needs beside attention itself.
//
// idea      Over keys A a row's result is a mean of their values, weighted by exponentials whose
//           sum's logarithm is lse_A; over B likewise. Over both it is the mean of the two results,
//           weighted by exp(lse_A - lse) and exp(lse_B - lse), where exp(lse) = exp(lse_A) +
//           exp(lse_B).
// source    Milakov and Gimelshein, "Online normalizer calculation for softmax", 2018, section 3.1
// test      tests/test_attention.cpp
#include "kernels/common.cuh"

namespace {

constexpr int kThreads = block_threads(256), kRows = kThreads / kWarp;
constexpr int kPiece = 4096;  // columns of a row that a block copies

// a warp owns a row of D elements; reads out and part, writes out
template <class A> __global__ void __launch_bounds__(256)
    merge_kernel(A* out, A* lse, const A* part, const A* part_lse, int T, int H, int D,
                 int64_t rows) {
  const int64_t row = int64_t(blockIdx.x) * kRows + threadIdx.x / kWarp;  // of (B,T,H)
  const bool inside = row < rows;
  const int64_t at = (row / H / T * H + row % H) * T + row / H % T;  // in (B,H,T)
  const A a = inside ? lse[at] : A(0), b = inside ? part_lse[at] : A(0);
  const A most = Max<A>::combine(a, b), both = most + log_of(exp_of(a - most) + exp_of(b - most));
  __syncthreads();  // every lane has read lse
  if (!inside) return;
  if (threadIdx.x % kWarp == 0) lse[at] = both;
  const A of_out = exp_of(a - both), of_part = exp_of(b - both);
  out += row * D;
  part += row * D;
  INDEPENDENT
  for (int d = threadIdx.x % kWarp; d < D; d += kWarp) out[d] = out[d] * of_out + part[d] * of_part;
}

// Grid (rows, pieces of a row); reads and writes the columns once
template <class T, class U> __global__ void __launch_bounds__(256)
    copy_columns_kernel(T* __restrict__ to, int64_t to_ld, const U* __restrict__ from,
                        int64_t from_ld, int columns) {
  to += blockIdx.x * to_ld;
  from += blockIdx.x * from_ld;
  const int first = blockIdx.y * kPiece, left = columns - first;
  const int end = first + (left < kPiece ? left : kPiece);
  INDEPENDENT
  for (int i = first + threadIdx.x; i < end; i += kThreads)
    to[i] = store<T>(acc_t<T>(load(from[i])));
}

}  // namespace

void merge_attention(const Tensor& out, const Tensor& lse, const Tensor& part,
                     const Tensor& part_lse) {
  OP("merge_attention", bytes_of(out, out, lse, lse, part, part_lse));
  const int64_t H = lse.dim(1), T_ = lse.dim(2), rows = lse.numel();
  if (!rows) return;
  ASSERT(part.numel() == out.numel() && part_lse.numel() == rows && out.numel() % rows == 0);
  const unsigned blocks = ceil_div(rows, kRows);
  const int D = out.numel() / rows;
  DISPATCH(out.dtype(), merge_kernel<A>
           <<<blocks, kThreads, 0, device().compute>>>(out.data<A>(), lse.data<A>(), part.data<A>(),
                                                       part_lse.data<A>(), T_, H, D, rows));
}

void copy_columns(const Tensor& to, int64_t to_first, const Tensor& from, int64_t from_first,
                  int64_t columns) {
  OP("copy_columns", double(to.dim(0) * columns * (size_of(to.dtype()) + size_of(from.dtype()))));
  const int64_t rows = to.dim(0), to_ld = to.dim(1), from_ld = from.dim(1);
  ASSERT(from.dim(0) == rows && to_first + columns <= to_ld && from_first + columns <= from_ld);
  if (!rows || !columns) return;
  const auto launch = [&]<class T, class U>(T* target, const U* source) {
    const dim3 grid(rows, ceil_div(columns, kPiece));
    copy_columns_kernel<T, U><<<grid, kThreads, 0, device().compute>>>(target + to_first, to_ld,
                                                                       source + from_first, from_ld,
                                                                       columns);
  };
  DISPATCH(to.dtype(), if (from.dtype() == to.dtype()) launch(to.data<T>(), from.data<T>());
           else launch(to.data<T>(), from.data<A>()));
}
