// philox.h: random bits as a pure function of a counter and a key: the counter-based generator
// Philox-4x32-10.
// idea      ten rounds of multiply and exclusive-or turn 128 counter bits and 64 key bits into 128
//           random bits. Nothing is carried from one call to the next, so any rank can compute the
//           bits of any element in any order
// counters  their last word names the use, so that no two uses share bits: 0 initial weights, 1
//           sampling, 2 the batches of training
// source    Salmon, Moraes, Dror and Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC 2011
// cost      20 multiplications of 32 x 32 bits for 128 bits
// not here  streams, state, distributions
// test      tests/test_support.cpp: the known answers published with the paper's Random123 library
#pragma once
#include <cstdint>

#ifdef __CUDACC__
#define PHILOX_HD __host__ __device__
#else
#define PHILOX_HD
#endif

struct Philox4 {
  uint32_t v[4];
};

PHILOX_HD inline Philox4 philox(uint32_t c0, uint32_t c1, uint32_t c2, uint32_t c3, uint32_t k0,
                                uint32_t k1) {
  for (int round = 0; round < 10; round++) {
    const uint64_t a = uint64_t(0xD2511F53u) * c0, b = uint64_t(0xCD9E8D57u) * c2;
    c0 = uint32_t(b >> 32) ^ c1 ^ k0;
    c1 = uint32_t(b);
    c2 = uint32_t(a >> 32) ^ c3 ^ k1;
    c3 = uint32_t(a);
    k0 += 0x9E3779B9u;  // the golden ratio
    k1 += 0xBB67AE85u;  // sqrt(3) - 1
  }
  return Philox4{{c0, c1, c2, c3}};
}
