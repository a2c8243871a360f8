// block_product.cuh: what matmul.cu and attention_flash.cu have in common: a block brings tiles to
// shared memory, multiplies two, writes the result.
//
// idea      c (I,J) += a (I,K) b (K,J). The tile of c stays in registers: 16 x 16 threads own a
//           micro-tile of it each, so that the 8 + 8 numbers that a thread reads from shared memory
//           feed 64 multiply-adds.
// CPU       FAST finds cpu/cuda/block_product.cuh in this one's place: one thread, vector
//           registers, the same names
// cost      K I J multiply-adds; reads of shared memory: 2 K I J / 8 elements for a micro-tile of 8
//           x 8
// order     each element of c is summed over k from first to last
// test      tests/test_matmul.cpp, tests/test_attention.cpp
#pragma once
#include "kernels/common.cuh"

namespace {

constexpr int kProductThreads = 256;
constexpr int kSliceDepth = 8;  // of the two slices that matmul.cu multiplies at a time
// tiles are padded, so that threads side by side touch different banks
constexpr int kPad = 1;

// tile = the rows of x (rows, width) * scale, zero beyond them, as (row, d), or kTransposed as (d,
// row): kRows rows of kD. packs: rows of x begin at multiples of 16 bytes.
template <int kRows, int kD, bool kTransposed, class T, class A>
__device__ __forceinline__ void load_tile(A* tile, int ld, const T* x, int64_t x_ld, int rows,
                                          int width, bool packs, A scale) {
  // kBeside runs of 16 bytes belong to one row before the next thread turns to the next row: all,
  // or when the tile is transposed so few that a warp writes to different banks.
  constexpr int kRun = 16 / int(sizeof(T)), kRuns = kD / kRun, kFew = sizeof(T) == 2 ? 1 : 2,
                kBeside = kTransposed ? kFew : kRuns;
  for (int i = threadIdx.x; i < kRows * kRuns; i += kProductThreads) {
    const int row = i / kBeside % kRows, d = (i % kBeside + i / kBeside / kRows * kBeside) * kRun;
    const auto run = load_run<kRun>(x + row * x_ld + d, row < rows ? width - d : 0, packs);
    UNROLL for (int e = 0; e < kRun; e++)
        tile[kTransposed ? (d + e) * ld + row : row * ld + d + e] = load(run[e]) * scale;
  }
}

// p[e] = value(e), for as many of kRun elements as lie inside; packs: p begins at a multiple of 16
// bytes, if kRun elements are 16 bytes
template <int kRun, class T, class F>
__device__ __forceinline__ void write_run(T* p, int inside, bool packs, F value) {
  if (packs && inside >= kRun) {
    Pack<T, kRun> run;
    for (int e = 0; e < kRun; e++) run[e] = store<T>(value(e));
    store_pack<kRun>(p, run);
  } else {  // `value` reads registers, which have no index: a turn for each
    UNROLL for (int e = 0; e < kRun; e++) if (e < inside) p[e] = store<T>(value(e));
  }
}

template <class A, int kI, int kJ> class BlockProduct {
  static constexpr int kRows = kI / 16, kColumns = kJ / 16, kRun = 16 / int(sizeof(A)),
                       kRowRun = kRows < kRun ? kRows : kRun;
  A sum[kRows][kColumns];

  // A micro-tile's rows lie in runs of kRowRun, 16 * kRowRun rows apart, so that threads side by
  // side read 16 bytes side by side; columns too.
  __device__ static int row(int r) {
    return threadIdx.x / 16 * kRowRun + r / kRowRun * 16 * kRowRun + r % kRowRun;
  }
  __device__ static int column(int c) {
    return threadIdx.x % 16 * kColumnRun + c / kColumnRun * 16 * kColumnRun + c % kColumnRun;
  }

 public:
  static constexpr int kColumnRun = kColumns < kRun ? kColumns : kRun;

  // sum = 0; c is used up to so many rows and columns, and may stay 0 beyond: FAST then has less to
  // do for a sequence shorter than a tile
  __device__ __forceinline__ void clear(int = kI, int = kJ) {
    UNROLL for (int r = 0; r < kRows; r++) UNROLL for (int c = 0; c < kColumns; c++) sum[r][c] = 0;
  }

  // f(row, first column, kColumnRun sums side by side, and those of other products) for everything
  // that this thread owns
  template <class F, class... Others>
  __device__ __forceinline__ void for_each_run(F f, Others&... others) {
    UNROLL for (int r = 0; r < kRows; r++) UNROLL for (int c = 0; c < kColumns; c += kColumnRun)
        f(row(r), column(c), &sum[r][c], &others.sum[r][c]...);
  }

  // sum (I,J) += a (I,K) b (K,J). Element (i,k) of a lies at a[k * lda + i], or with kRowMajor at
  // a[i * lda + k]; (k,j) of b at b[k * ldb + j]. In reads of 16 bytes: row-major tiles of a are
  // read in runs along k, others in runs along i.
  template <bool kRowMajor>
  __device__ __forceinline__ void add(const A* a, int lda, const A* b, int ldb, int depth) {
    constexpr int kStep = kRowMajor ? kRun : 1;
    // as far as nvcc unrolls without spilling registers
    [[maybe_unused]] constexpr int kTurns = 4 / kStep;
#pragma unroll kTurns
    for (int k = 0; k < depth; k += kStep) {
      A x[kStep][kRows];
      if constexpr (kRowMajor) {
        UNROLL for (int r = 0; r < kRows; r++) {
          const auto run = load_pack<kRun>(a + row(r) * lda + k);
          UNROLL for (int e = 0; e < kStep; e++) x[e][r] = run[e];
        }
      } else {
        UNROLL for (int r = 0; r < kRows; r += kRowRun) {
          const auto run = load_pack<kRowRun>(a + k * lda + row(r));
          UNROLL for (int e = 0; e < kRowRun; e++) x[0][r + e] = run[e];
        }
      }
      UNROLL for (int e = 0; e < kStep; e++) UNROLL for (int c = 0; c < kColumns; c += kColumnRun) {
        const auto y = load_pack<kColumnRun>(b + (k + e) * ldb + column(c));
        UNROLL for (int r = 0; r < kRows; r++) UNROLL for (int d = 0; d < kColumnRun; d++)
            sum[r][c + d] += x[e][r] * y[d];
      }
    }
  }
};

}  // namespace
