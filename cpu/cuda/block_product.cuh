// block_product.cuh: in FAST the tiles and their product for matmul.cu and attention_flash.cu, in
// the place of kernels/block_product.cuh, which says what each name here does.
//
// idea      a FAST block has one thread, which owns the whole tile of c, in micro-tiles. One
//           micro-tile fills the CPU's vector registers while it is summed; the others wait in the
//           cache.
// test      tests/test_matmul.cpp, tests/test_attention.cpp
#pragma once
#include "kernels/common.cuh"

namespace {

constexpr int kProductThreads = 1;
constexpr int kSliceDepth = 64;
constexpr int kPad = 0;  // a cache has no banks, and rows of whole cache lines are best
#ifdef __AVX512F__
constexpr int kMicroRows = 8;  // of a micro-tile: 8 rows of 64 bytes are 8 registers of the 32
#else
constexpr int kMicroRows = 4;  // 4 rows of 64 bytes are 8 registers of the 16
#endif

template <int kRows, int kD, bool kTransposed, class T, class A>
void load_tile(A* tile, int ld, const T* x, int64_t x_ld, int rows, int width, bool, A scale) {
  for (int row = 0; row < kRows; row++) {
    A* to = tile + row * (kTransposed ? 1 : ld);
    const int step = kTransposed ? ld : 1, inside = row < rows ? width : 0;
    INDEPENDENT
    for (int d = 0; d < inside; d++) to[d * step] = load(x[row * x_ld + d]) * scale;
    for (int d = inside; d < kD; d++) to[d * step] = 0;
  }
}

template <int kRun, class T, class F>
__forceinline__ void write_run(T* p, int inside, bool, F value) {
  const int end = inside < kRun ? inside : kRun;
  INDEPENDENT
  for (int e = 0; e < end; e++) p[e] = store<T>(value(e));
}

// sum (kRows, kColumns) += a b over `depth`, a and b as in BlockProduct::add. One copy for all
// kernels: it is small, and all are made of it.
template <bool kRowMajor, int kRows, int kColumns, class A>
__attribute__((noinline)) void add_micro_tile(A (&sum)[kRows][kColumns], const A* a, int64_t lda,
                                              const A* b, int64_t ldb, int depth) {
  A s[kRows][kColumns];  // in vector registers
  for (int r = 0; r < kRows; r++)
    for (int c = 0; c < kColumns; c++) s[r][c] = sum[r][c];
  for (int k = 0; k < depth; k++)
#pragma GCC unroll 16
    for (int r = 0; r < kRows; r++)
#pragma GCC unroll 1
      for (int c = 0; c < kColumns; c++)
        s[r][c] += a[kRowMajor ? r * lda + k : k * lda + r] * b[k * ldb + c];
  for (int r = 0; r < kRows; r++)
    for (int c = 0; c < kColumns; c++) sum[r][c] = s[r][c];
}

template <class A, int kI, int kJ> class BlockProduct {
 public:
  static constexpr int kColumnRun = 64 / int(sizeof(A));

  void clear(int rows = kI, int columns = kJ) {
    used_rows = rows, used_columns = columns;
    memset(sum, 0, sizeof sum);
  }

  template <class F, class... Others> __forceinline__ void for_each_run(F f, Others&... others) {
    UNROLL for (int t = 0; t < kTiles; t++) UNROLL for (int r = 0; r < kMicroRows; r++)
        f(row(t) + r, column(t), sum[t][r], others.sum[t][r]...);
  }

  template <bool kRowMajor>
  __forceinline__ void add(const A* a, int lda, const A* b, int ldb, int depth) {
    cpu::multiply_adds.fetch_add(int64_t(kI) * kJ * depth, std::memory_order_relaxed);
    UNROLL for (int t = 0; t < kTiles; t++) if (row(t) < used_rows && column(t) < used_columns)
        add_micro_tile<kRowMajor>(sum[t], a + row(t) * (kRowMajor ? lda : 1), lda, b + column(t),
                                  ldb, depth);
  }

 private:
  static constexpr int kAcross = kJ / kColumnRun, kTiles = kAcross * kI / kMicroRows;
  static_assert(kAcross * kColumnRun == kJ && kTiles * kMicroRows == kAcross * kI);
  A sum[kTiles][kMicroRows][kColumnRun];
  int used_rows = kI, used_columns = kJ;  // micro-tiles beyond are not summed

  static int row(int tile) { return tile / kAcross * kMicroRows; }
  static int column(int tile) { return tile % kAcross * kColumnRun; }
};

}  // namespace
