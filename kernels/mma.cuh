// mma.cuh: products of bf16 matrices by a warp, in tensor cores, and the copies that feed them
// (sm_80 and newer).
//
// idea      The 32 lanes of a warp hold the matrices together, and one instruction multiplies:
//           c (16,8) += a (16,16) b (16,8), bf16 to f32. Who holds what is fixed. With
//           lane = 4 g + t, a pair of numbers beside each other in each register:
//
//               a (16,16)        columns 2t, 2t+1    columns 2t+8, 2t+9
//                   row g             v[0]                v[2]
//                   row g+8           v[1]                v[3]
//
//               b (16,8)         rows 2t, 2t+1       rows 2t+8, 2t+9
//                   column g          v[0]                v[1]
//
//               c (16,8)         columns 2t, 2t+1
//                   row g          v[0], v[1]
//                   row g+8        v[2], v[3]
//
//           So c becomes a by rounding: two neighbours of c, columns 0 to 7 and 8 to 15, are one a,
//           and no number changes its lane (`as_left`). Attention lives on that.
// loads     ldmatrix brings four matrices of 8 x 8 from shared memory; lane i says where row i % 8
//           of matrix i / 8 begins. It can transpose each, so that operands may lie either way.
//           Eight rows must lie in different banks: attention pads its tiles' rows by 16 bytes,
//           matmul.cu orders the runs of a row anew (`place`).
// copies    cp.async brings 16 bytes from memory to shared memory, while its thread goes on, until
//           the thread waits. Others see them after that wait and a barrier.
// CPU       FAITHFUL: cpu/faithful/mma.h has these instructions for fibers; FAST has no warps
// test      tests/test_cpu.cpp, tests/test_matmul.cpp, tests/test_attention.cpp
#pragma once
#include "kernels/common.cuh"
#ifdef CPU_FAITHFUL
#include <cpu/faithful/mma.h>  // stands in for the instructions
#endif

using bf16 = __nv_bfloat16;

namespace {

// (the field's A, B and accumulator fragments)
struct Left {
  unsigned v[4];
};  // a (16,16)
struct Right {
  unsigned v[4];
};                                                                   // b (16,16), two of (16,8)
template <int kColumns> struct Strip { float v[kColumns / 8][4]; };  // c (16,kColumns)

// ---- the instructions

#ifdef __CUDACC__
template <bool kTranspose>
__device__ __forceinline__ void ldmatrix(unsigned (&v)[4], const bf16* row) {
  const unsigned at = unsigned(__cvta_generic_to_shared(row));
  if constexpr (kTranspose)
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(v[0]), "=r"(v[1]), "=r"(v[2]), "=r"(v[3])
                 : "r"(at)
                 : "memory");
  else
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(v[0]), "=r"(v[1]), "=r"(v[2]), "=r"(v[3])
                 : "r"(at)
                 : "memory");
}
__device__ __forceinline__ void mma(float (&c)[4], const unsigned (&a)[4], unsigned b0,
                                    unsigned b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
      "{%8, %9}, {%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
// kBytes (4 or 16) at `to` = the first `bytes` at `from`, zeros after them
template <int kBytes>
__device__ __forceinline__ void copy_async(void* to, const void* from, int bytes) {
  const unsigned at = unsigned(__cvta_generic_to_shared(to));
  if constexpr (kBytes == 16)
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(at), "l"(from), "r"(bytes)
                 : "memory");
  else
    asm volatile("cp.async.ca.shared.global [%0], [%1], %3, %2;" ::"r"(at), "l"(from), "r"(bytes),
                 "n"(kBytes)
                 : "memory");
}
// The copies since the last call are a group (commit group).
__device__ __forceinline__ void close_copies() {
  asm volatile("cp.async.commit_group;" ::: "memory");
}
// This thread's groups have arrived, all but the last kOpen.
template <int kOpen> __device__ __forceinline__ void wait_for_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kOpen) : "memory");
}
__device__ __forceinline__ unsigned pair(float a, float b) {
  const __nv_bfloat162 both = __floats2bfloat162_rn(a, b);
  return *reinterpret_cast<const unsigned*>(&both);
}
#endif

// ---- operands in tiles

// 16 x 16 numbers (x, k), x a row of a or a column of b: at(x, k) is where the eight begin that lie
// side by side along k, or with kAlongK = false along x.
template <bool kAlongK, class F> __device__ __forceinline__ Left load_left(F at) {
  const int lane = threadIdx.x % kWarp;
  Left a;
  if constexpr (kAlongK) ldmatrix<false>(a.v, at(lane % 16, lane / 16 * 8));
  else ldmatrix<true>(a.v, at(lane / 8 % 2 * 8, lane % 8 + lane / 16 * 8));
  return a;
}
template <bool kAlongK, class F> __device__ __forceinline__ Right load_right(F at) {
  const int lane = threadIdx.x % kWarp;
  Right b;
  if constexpr (kAlongK) ldmatrix<false>(b.v, at(lane % 8 + lane / 16 * 8, lane / 8 % 2 * 8));
  else ldmatrix<true>(b.v, at(lane / 16 * 8, lane % 16));
  return b;
}

// ---- strips

// f(j, e, element e of c.v[j]) for all that this lane holds, and where that lies in the strip
template <int kColumns, class F> __device__ __forceinline__ void each(Strip<kColumns>& c, F f) {
  UNROLL for (int j = 0; j < kColumns / 8; j++) {
    UNROLL for (int e = 0; e < 4; e++) f(j, e, c.v[j][e]);
  }
}
__device__ __forceinline__ int strip_row(int e) { return threadIdx.x % kWarp / 4 + e / 2 * 8; }
__device__ __forceinline__ int strip_column(int j, int e) {
  return j * 8 + threadIdx.x % 4 * 2 + e % 2;
}

template <int kColumns> __device__ __forceinline__ void clear(Strip<kColumns>& c) {
  each(c, [](int, int, float& x) { x = 0; });
}

// c's columns j to j + 15 += a b
template <int kColumns>
__device__ __forceinline__ void add(Strip<kColumns>& c, int j, const Left& a, const Right& b) {
  mma(c.v[j / 8], a.v, b.v[0], b.v[1]);
  mma(c.v[j / 8 + 1], a.v, b.v[2], b.v[3]);
}

// c (16,kColumns) += a (16,kK) b (kK,kColumns): left(k) returns columns k to k + 15 of a; b lies in
// a tile from p on, (k, column), or with kAlongK (column, k)
template <int kK, bool kAlongK, int kColumns, class F>
__device__ __forceinline__ void add_product(Strip<kColumns>& c, F left, const bf16* p, int ld) {
  UNROLL for (int k0 = 0; k0 < kK; k0 += 16) {
    const Left a = left(k0);
    UNROLL for (int j = 0; j < kColumns; j += 16)
        add(c, j, a, load_right<kAlongK>([=](int x, int k) {
              return p + (kAlongK ? (j + x) * ld + k0 + k : (k0 + k) * ld + j + x);
            }));
  }
}

// Columns k to k + 15 of c, rounded, as the left operand of another product
template <int kColumns> __device__ __forceinline__ Left as_left(const Strip<kColumns>& c, int k) {
  const auto &low = c.v[k / 8], &high = c.v[k / 8 + 1];
  return {
      {pair(low[0], low[1]), pair(low[2], low[3]), pair(high[0], high[1]), pair(high[2], high[3])}};
}

}  // namespace
