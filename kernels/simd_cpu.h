// Sixteen floats at a time in GCC/Clang vector extensions: one source for every instruction set,
// and the same bits on all of them, because nothing is contracted or reassociated. A kernel is
// written once as a KVARN_INLINE body and instantiated per ISA by functions that carry a target
// attribute.
#pragma once

#include <bit>
#include <cstdint>
#include <cstring>

#include "kernels/core/dtype.h"

#define KVARN_INLINE inline __attribute__((always_inline))
#if defined(__x86_64__)
#define KVARN_TARGET_AVX2 __attribute__((target("avx2,fma,f16c")))
#define KVARN_TARGET_AVX512 \
  __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,fma,f16c,prefer-vector-width=512")))
#else
#define KVARN_TARGET_AVX2
#define KVARN_TARGET_AVX512
#endif

namespace kvarn::simd {

constexpr int kLanes = 16;
typedef float f32x16 __attribute__((vector_size(64)));
typedef float f32x8 __attribute__((vector_size(32)));
typedef float f32x4 __attribute__((vector_size(16)));
typedef int32_t i32x16 __attribute__((vector_size(64)));
typedef uint32_t u32x16 __attribute__((vector_size(64)));
typedef uint16_t u16x16 __attribute__((vector_size(32)));

template <typename To, typename From>
KVARN_INLINE To cast(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof(to));
  return to;
}

KVARN_INLINE f32x16 splat(float x) { return f32x16{} + x; }
KVARN_INLINE f32x16 load(const float* p) {
  f32x16 v;
  std::memcpy(&v, p, sizeof(v));
  return v;
}
KVARN_INLINE void store(float* p, f32x16 v) { std::memcpy(p, &v, sizeof(v)); }

KVARN_INLINE f32x16 load(const bf16* p) {
  u16x16 bits;
  std::memcpy(&bits, p, sizeof(bits));
  return cast<f32x16>(__builtin_convertvector(bits, u32x16) << 16);
}
KVARN_INLINE f32x16 load(const half* p) {
  f32x16 v;
  for (int i = 0; i < kLanes; ++i) v[i] = to_float(p[i]);
  return v;
}

// The first `count` (1..15) elements, zeros after them.
template <typename T>
KVARN_INLINE f32x16 load_first(const T* p, int64_t count) {
  T padded[kLanes] = {};
  std::memcpy(padded, p, static_cast<size_t>(count) * sizeof(T));
  return load(padded);
}
KVARN_INLINE void store_first(float* p, f32x16 v, int64_t count) {
  std::memcpy(p, &v, static_cast<size_t>(count) * sizeof(float));
}

// Lanes i and i+8, then i+4, i+2, i+1: the tree that every horizontal sum in kernels/ uses.
KVARN_INLINE float sum(f32x16 v) {
  f32x8 lo8, hi8;
  std::memcpy(&lo8, &v, 32);
  std::memcpy(&hi8, reinterpret_cast<const char*>(&v) + 32, 32);
  const f32x8 s8 = lo8 + hi8;
  f32x4 lo4, hi4;
  std::memcpy(&lo4, &s8, 16);
  std::memcpy(&hi4, reinterpret_cast<const char*>(&s8) + 16, 16);
  const f32x4 s4 = lo4 + hi4;
  return (s4[0] + s4[2]) + (s4[1] + s4[3]);
}

// e^x to about 1.5 ulp. Below -87.3 the result is 0 (no subnormals), above 88.7 infinity; NaN stays
// NaN. x = n ln2 + r with |r| <= ln2/2; the polynomial is Taylor's to r^7/5040 (remainder 5e-9).
KVARN_INLINE f32x16 exp(f32x16 x) {
  constexpr float kLog2E = 1.44269504088896341f;
  constexpr float kLn2Hi = 0.693359375f;  // 9 bits: n * kLn2Hi is exact
  constexpr float kLn2Lo = -2.12194440e-4f;
  constexpr float kRound = 12582912.f;  // 1.5 * 2^23: adding it rounds to an integer
  const f32x16 clamped = x > 89.f ? splat(89.f) : (x < -88.f ? splat(-88.f) : x);
  const f32x16 shifted = clamped * kLog2E + kRound;
  const f32x16 n = shifted - kRound;
  const f32x16 r = (clamped - n * kLn2Hi) - n * kLn2Lo;
  f32x16 p = splat(1.f / 5040.f);
  p = p * r + 1.f / 720.f;
  p = p * r + 1.f / 120.f;
  p = p * r + 1.f / 24.f;
  p = p * r + 1.f / 6.f;
  p = p * r + 0.5f;
  p = (p * r) * r + r + 1.f;
  // 2^n in two factors: n = 128 has no exponent of its own.
  const i32x16 exponent = cast<i32x16>(shifted) - std::bit_cast<int32_t>(kRound);
  const i32x16 half_exponent = exponent >> 1;
  const f32x16 scale1 = cast<f32x16>((half_exponent + 127) << 23);
  const f32x16 scale2 = cast<f32x16>((exponent - half_exponent + 127) << 23);
  const f32x16 y = p * scale1 * scale2;
  const f32x16 low = x < -87.3f ? f32x16{} : y;
  return x > 88.7228f ? splat(__builtin_inff()) : low;
}

}  // namespace kvarn::simd
