// cuda_bf16.h: bfloat16, the upper half of a float; rounding is to nearest, ties to even, as on the
// GPU.
//
// Conversions are explicit and there is no arithmetic: kernels compute in float. NaN is found by
// integers, because kernels are compiled with -ffinite-math-only and uninitialised memory (NaN in
// the tests) must stay NaN.
#pragma once
#include <cuda_runtime.h>

struct __attribute__((may_alias)) __nv_bfloat16 {
  unsigned short bits;
  __nv_bfloat16() = default;
  explicit inline __nv_bfloat16(float x);
  explicit inline __nv_bfloat16(double x);
  explicit inline operator float() const;
  explicit inline operator double() const;
};
struct __attribute__((may_alias, aligned(4))) __nv_bfloat162 {
  __nv_bfloat16 x, y;
};

inline unsigned short __bfloat16_as_ushort(__nv_bfloat16 x) { return x.bits; }
inline __nv_bfloat16 __ushort_as_bfloat16(unsigned short bits) {
  __nv_bfloat16 x;
  x.bits = bits;
  return x;
}
inline float __bfloat162float(__nv_bfloat16 x) {
  return cpu::bits_as<float>(unsigned(x.bits) << 16);
}
inline __nv_bfloat16 __float2bfloat16(float x) {
  const unsigned u = cpu::bits_as<unsigned>(x);
  const unsigned rounded = (u + 0x7fff + (u >> 16 & 1)) >> 16;
  return __ushort_as_bfloat16(
      static_cast<unsigned short>((u & 0x7fffffff) > 0x7f800000 ? 0x7fff : rounded));
}
// Rounded once: the step through float rounds to odd.
inline __nv_bfloat16 __double2bfloat16(double x) {
  const float nearest = static_cast<float>(x);
  unsigned u = cpu::bits_as<unsigned>(nearest);
  if (double(nearest) != x) {
    if (std::abs(double(nearest)) > std::abs(x)) u--;
    u |= 1;
  }
  return __float2bfloat16(cpu::bits_as<float>(u));
}
inline __nv_bfloat16::__nv_bfloat16(float x) : bits(__float2bfloat16(x).bits) {}
inline __nv_bfloat16::__nv_bfloat16(double x) : bits(__double2bfloat16(x).bits) {}
inline __nv_bfloat16::operator float() const { return __bfloat162float(*this); }
inline __nv_bfloat16::operator double() const { return __bfloat162float(*this); }

inline __nv_bfloat162 __floats2bfloat162_rn(float x, float y) {
  return {__float2bfloat16(x), __float2bfloat16(y)};
}
