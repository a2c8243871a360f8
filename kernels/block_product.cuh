// block_product.cuh: what matmul.cu and attention_flash.cu have in common: a block multiplies two tiles that lie in shared memory.
//
// idea      c (I,J) += a (I,K) b (K,J). The tile of c stays in registers, cut in micro-tiles: on a GPU 16 x 16 threads own one each, so that the
//           8 + 8 numbers a thread reads from shared memory feed 64 multiply-adds. A FAST block has one thread, which owns all micro-tiles; one
//           of them fills the CPU's vector registers, and the tile waits in the cache.
// cost      K I J multiply-adds; reads of shared memory: 2 K I J / 8 elements for a micro-tile of 8 x 8
// order     each element of c is summed over k from first to last
// test      tests/test_matmul.cpp, tests/test_attention.cpp
#pragma once
#include "kernels/common.cuh"

// UNROLL: a loop over what a thread holds in registers becomes straight-line code. VECTOR: the same on a GPU; on the CPU the loop is to
// become vector instructions, so g++ is kept from unrolling it before it vectorizes.
#ifdef __CUDACC__
#define UNROLL _Pragma("unroll")
#define VECTOR _Pragma("unroll")
#elif defined(CPU_FAITHFUL)  // for tests: compiles quickly
#define UNROLL
#define VECTOR
#else
#define UNROLL _Pragma("GCC unroll 16")
#define VECTOR _Pragma("GCC unroll 1")
#endif

namespace {

constexpr int kProductThreads = block_threads(256);
#ifdef __AVX512F__
constexpr int kFastRows = 8;  // of a micro-tile in FAST: 8 rows of 64 bytes are 8 registers of the 32
#else
constexpr int kFastRows = 4;  // 4 rows of 64 bytes are 8 registers of the 16
#endif

// p[e] = value(e), for as many of kRun elements as lie inside; packs: p begins at a multiple of 16 bytes, if kRun elements are 16 bytes
template <int kRun, class T, class F> __device__ __forceinline__ void write_run(T* p, int inside, bool packs, F value) {
  if (kWarp > 1 && packs && inside >= kRun) {
    Pack<T, kRun> run;
    for (int e = 0; e < kRun; e++) run.v[e] = store<T>(value(e));
    store_pack<kRun>(p, run);
  } else if constexpr (kWarp > 1) {  // `value` reads registers, which have no index: a turn for each
    UNROLL for (int e = 0; e < kRun; e++)
      if (e < inside) p[e] = store<T>(value(e));
  } else {
    const int end = inside < kRun ? inside : kRun;
    INDEPENDENT
    for (int e = 0; e < end; e++) p[e] = store<T>(value(e));
  }
}

// FAST: sum (kRows, kColumns) += a b over `depth`; a and b as in BlockProduct::add. One copy for all kernels: it is small, and all are made of it.
template <bool kRowMajor, int kRows, int kColumns, class A>
__attribute__((noinline)) void add_fast(A (&sum)[kRows][kColumns], const A* a, int64_t lda, const A* b, int64_t ldb, int depth) {
  A s[kRows][kColumns];  // in vector registers
  for (int r = 0; r < kRows; r++)
    for (int c = 0; c < kColumns; c++) s[r][c] = sum[r][c];
  for (int k = 0; k < depth; k++)
    UNROLL for (int r = 0; r < kRows; r++)
      VECTOR for (int c = 0; c < kColumns; c++) s[r][c] += a[kRowMajor ? r * lda + k : k * lda + r] * b[k * ldb + c];
  for (int r = 0; r < kRows; r++)
    for (int c = 0; c < kColumns; c++) sum[r][c] = s[r][c];
}

template <class A, int kI, int kJ> struct BlockProduct {
  static constexpr bool kFast = kWarp == 1;
  static constexpr int kAcross = kFast ? kJ * int(sizeof(A)) / 64 : 16, kDown = kFast ? kI / kFastRows : 16;  // micro-tiles in the tile
  static constexpr int kRows = kI / kDown, kColumns = kJ / kAcross;                                          // of a micro-tile
  static constexpr int kOwned = kAcross * kDown / kProductThreads;
  // A micro-tile's rows lie in runs of kRowRun, kDown * kRowRun rows apart, so that threads side by side read 16 bytes side by side; columns too.
  static constexpr int kRun = (kFast ? 64 : 16) / int(sizeof(A));
  static constexpr int kRowRun = kRows < kRun ? kRows : kRun, kColumnRun = kColumns < kRun ? kColumns : kRun;
  static_assert(kDown * kRows == kI && kAcross * kColumns == kJ && kOwned * kProductThreads == kAcross * kDown);

  A sum[kOwned][kRows][kColumns];

  __device__ static int micro_tile(int owned) { return int(threadIdx.x) + owned * kProductThreads; }
  __device__ static int row(int tile, int r) { return tile / kAcross * kRowRun + r / kRowRun * kDown * kRowRun + r % kRowRun; }
  __device__ static int column(int tile, int c) {
    return tile % kAcross * kColumnRun + c / kColumnRun * kAcross * kColumnRun + c % kColumnRun;
  }

  __device__ __forceinline__ void clear() {
    VECTOR for (int o = 0; o < kOwned; o++)
      VECTOR for (int r = 0; r < kRows; r++)
        VECTOR for (int c = 0; c < kColumns; c++) sum[o][r][c] = 0;
  }

  // f(row, first column, kColumnRun sums side by side, and those of other products) for everything that this thread owns
  template <class F, class... Others> __device__ __forceinline__ void for_each_run(F f, Others&... others) {
    VECTOR for (int o = 0; o < kOwned; o++)
      VECTOR for (int r = 0; r < kRows; r++)
        VECTOR for (int c = 0; c < kColumns; c += kColumnRun)
          f(row(micro_tile(o), r), column(micro_tile(o), c), &sum[o][r][c], &others.sum[o][r][c]...);
  }

  // sum (I,J) += a (I,K) b (K,J). Element (i,k) of a lies at a[k * lda + i], or with kRowMajor at a[i * lda + k]; (k,j) of b at b[k * ldb + j].
  template <bool kRowMajor> __device__ __forceinline__ void add(const A* a, int lda, const A* b, int ldb, int depth) {
    VECTOR for (int o = 0; o < kOwned; o++) {
      const int tile = micro_tile(o);
      if constexpr (kFast) add_fast<kRowMajor>(sum[o], a + row(tile, 0) * (kRowMajor ? lda : 1), lda, b + column(tile, 0), ldb, depth);
      else add_gpu<kRowMajor>(sum[o], a, lda, b, ldb, depth, tile);
    }
  }

 private:
  // In reads of 16 bytes. Row-major tiles of a are read in runs along k, others in runs along i.
  template <bool kRowMajor>
  static __device__ __forceinline__ void add_gpu(A (&s)[kRows][kColumns], const A* a, int lda, const A* b, int ldb, int depth, int tile) {
    constexpr int kStep = kRowMajor ? kRun : 1;
    [[maybe_unused]] constexpr int kTurns = 4 / kStep;  // as far as nvcc unrolls without spilling registers
#pragma unroll kTurns
    for (int k = 0; k < depth; k += kStep) {
      A x[kStep][kRows];
      if constexpr (kRowMajor) {
        UNROLL for (int r = 0; r < kRows; r++) {
          const auto run = load_pack<kRun>(a + row(tile, r) * lda + k);
          UNROLL for (int e = 0; e < kStep; e++) x[e][r] = run.v[e];
        }
      } else {
        UNROLL for (int r = 0; r < kRows; r += kRowRun) {
          const auto run = load_pack<kRowRun>(a + k * lda + row(tile, r));
          UNROLL for (int e = 0; e < kRowRun; e++) x[0][r + e] = run.v[e];
        }
      }
      UNROLL for (int e = 0; e < kStep; e++)
        UNROLL for (int c = 0; c < kColumns; c += kColumnRun) {
          const auto y = load_pack<kColumnRun>(b + (k + e) * ldb + column(tile, c));
          UNROLL for (int r = 0; r < kRows; r++)
            UNROLL for (int d = 0; d < kColumnRun; d++) s[r][c + d] += x[e][r] * y.v[d];
        }
    }
  }
};

}  // namespace
