// mma.h: the instructions of kernels/mma.cuh for the FAITHFUL form, where the lanes of a warp are
// fibers.
//
// idea      What an instruction reads of other lanes, each lane lays down, waits for its warp, and
//           reads what it is to have: element by element as the hardware spreads them, so that a
//           kernel that takes one lane's numbers for another's computes what it would on a GPU.
// stricter  A copy leaves NaN where it will arrive, and arrives when its thread waits for it, at
//           the latest moment that CUDA allows. A thread may not end with copies under way.
// test      tests/test_cpu.cpp
#pragma once
#include <cuda_bf16.h>

#include <deque>
#include <vector>

namespace cpu {

inline void must_be_aligned(const void* p, size_t bytes, Site site) {
  if (reinterpret_cast<uintptr_t>(p) % bytes) report("an address that is not aligned", site);
}
inline unsigned bits_of(const __nv_bfloat16* p) { return p->bits; }
inline float low_half(unsigned pair) { return bits_as<float>(pair << 16); }
inline float high_half(unsigned pair) { return bits_as<float>(pair & 0xffff0000u); }

// What the lanes of a warp lay down for mma, and for the next one, which some may reach earlier
struct Operands {
  unsigned a[32][4], b[32][2];
};
inline Operands operands[32][2];
inline unsigned char products[1024];  // that a thread has come by

struct Copy {
  void* to;
  const void* from;
  size_t bytes, read;
};
using Copies = std::vector<Copy>;
struct AsyncCopies {  // of one thread
  std::deque<Copies> groups;
  Copies open;
};
inline AsyncCopies async_copies[1024];
inline bool copies_under_way() {  // of a thread that ends
  auto& [groups, open] = async_copies[running_thread];
  bool any = !open.empty();
  for (const Copies& group : groups) any |= !group.empty();
  groups.clear();
  return any;
}

}  // namespace cpu

template <bool kTranspose> void ldmatrix(unsigned (&v)[4], const __nv_bfloat16* row, CPU_PLACE) {
  const cpu::Site site{"ldmatrix", file, line};
  cpu::must_be_aligned(row, 16, site);
  const uint64_t* rows = cpu::exchange_in_warp(~0u, reinterpret_cast<uint64_t>(row), site);
  const int g = cpu::lane_index() / 4, t = cpu::lane_index() % 4 * 2;
  const auto at = [&](int matrix, int row, int column) {
    return cpu::bits_of(reinterpret_cast<const __nv_bfloat16*>(rows[matrix * 8 + row]) + column);
  };
  for (int i = 0; i < 4; i++)
    v[i] = kTranspose ? at(i, t, g) | at(i, t + 1, g) << 16 : at(i, g, t) | at(i, g, t + 1) << 16;
}

inline void mma(float (&c)[4], const unsigned (&a)[4], unsigned b0, unsigned b1, CPU_PLACE) {
  const int lane = cpu::lane_index(), g = lane / 4, t = lane % 4;
  auto& [left, right] = cpu::operands[cpu::warp_index()][cpu::products[cpu::running_thread]++ % 2];
  for (int i = 0; i < 4; i++) left[lane][i] = a[i];
  right[lane][0] = b0;
  right[lane][1] = b1;
  cpu::exchange_in_warp(~0u, 0, {"mma", file, line});
  for (int e = 0; e < 4; e++) {
    const int row = g, column = t * 2 + e % 2;
    for (int k = 0; k < 16; k += 2) {
      const unsigned x = left[row * 4 + k / 2 % 4][k / 8 * 2 + e / 2],
                     y = right[column * 4 + k / 2 % 4][k / 8];
      c[e] += cpu::low_half(x) * cpu::low_half(y) + cpu::high_half(x) * cpu::high_half(y);
    }
  }
}

template <int kBytes> void copy_async(void* to, const void* from, int bytes, CPU_PLACE) {
  static_assert(kBytes == 4 || kBytes == 8 || kBytes == 16);
  const cpu::Site site{"copy_async", file, line};
  cpu::must_be_aligned(to, kBytes, site);
  if (bytes) cpu::must_be_aligned(from, kBytes, site);
  if (bytes < 0 || bytes > kBytes) cpu::report("a copy of too many bytes", site);
  memset(to, 0xff, kBytes);
  cpu::async_copies[cpu::running_thread].open.push_back({to, from, kBytes, size_t(bytes)});
}
inline void close_copies() {
  auto& [groups, open] = cpu::async_copies[cpu::running_thread];
  groups.push_back(std::move(open));
  open.clear();
}
template <int kOpen> void wait_for_copies() {
  auto& groups = cpu::async_copies[cpu::running_thread].groups;
  for (; groups.size() > kOpen; groups.pop_front())
    for (const auto& [to, from, bytes, read] : groups.front()) {
      memset(to, 0, bytes);
      memcpy(to, from, read);
    }
}
inline unsigned pair(float a, float b) {
  return __bfloat16_as_ushort(__float2bfloat16(a)) |
         unsigned(__bfloat16_as_ushort(__float2bfloat16(b))) << 16;
}
