// Sixteen floats in two registers: the vocabulary of the KV kernels for AVX2, FMA and F16C. See
// kv_simd_avx512.h for the meaning of each operation and of its lanes. Included only by a file
// compiled with these flags.
#pragma once

#include <immintrin.h>

#include <cstdint>

#include "kernels/core/dtype.h"

#define KV_SIMD static inline __attribute__((always_inline))

namespace kvarn::cpu {

struct Avx2 {
  struct F {
    __m256 lo, hi;  // lanes 0-7, 8-15
  };
  struct Codes {
    __m256i lo, hi;
  };

  static constexpr int kAccumulators = 4;  // of the 16 registers, 8
  static constexpr int kGemmRows = 3, kGemmVectors = 2;

  KV_SIMD F zero() { return {_mm256_setzero_ps(), _mm256_setzero_ps()}; }
  KV_SIMD F set1(float x) {
    const __m256 v = _mm256_set1_ps(x);
    return {v, v};
  }
  KV_SIMD F load(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
  KV_SIMD void store(float* p, F x) {
    _mm256_storeu_ps(p, x.lo);
    _mm256_storeu_ps(p + 8, x.hi);
  }
  KV_SIMD F load(const half* p) {
    const __m128i* q = reinterpret_cast<const __m128i*>(p);
    return {_mm256_cvtph_ps(_mm_loadu_si128(q)), _mm256_cvtph_ps(_mm_loadu_si128(q + 1))};
  }
  KV_SIMD void store(half* p, F x) {
    x = min(max(x, set1(-65504.0f)), set1(65504.0f));
    __m128i* q = reinterpret_cast<__m128i*>(p);
    _mm_storeu_si128(q, _mm256_cvtps_ph(x.lo, _MM_FROUND_TO_NEAREST_INT));
    _mm_storeu_si128(q + 1, _mm256_cvtps_ph(x.hi, _MM_FROUND_TO_NEAREST_INT));
  }
  KV_SIMD void store(uint8_t* p, F x) {
    const __m256i both = _mm256_permute4x64_epi64(
        _mm256_packus_epi32(_mm256_cvtps_epi32(x.lo), _mm256_cvtps_epi32(x.hi)), 0xd8);
    _mm_storeu_si128(
        reinterpret_cast<__m128i*>(p),
        _mm_packus_epi16(_mm256_castsi256_si128(both), _mm256_extracti128_si256(both, 1)));
  }

  KV_SIMD F add(F a, F b) { return {_mm256_add_ps(a.lo, b.lo), _mm256_add_ps(a.hi, b.hi)}; }
  KV_SIMD F sub(F a, F b) { return {_mm256_sub_ps(a.lo, b.lo), _mm256_sub_ps(a.hi, b.hi)}; }
  KV_SIMD F mul(F a, F b) { return {_mm256_mul_ps(a.lo, b.lo), _mm256_mul_ps(a.hi, b.hi)}; }
  KV_SIMD F div(F a, F b) { return {_mm256_div_ps(a.lo, b.lo), _mm256_div_ps(a.hi, b.hi)}; }
  KV_SIMD F sqrt(F a) { return {_mm256_sqrt_ps(a.lo), _mm256_sqrt_ps(a.hi)}; }
  KV_SIMD F fma(F a, F b, F c) {
    return {_mm256_fmadd_ps(a.lo, b.lo, c.lo), _mm256_fmadd_ps(a.hi, b.hi, c.hi)};
  }
  KV_SIMD F max(F a, F b) { return {_mm256_max_ps(a.lo, b.lo), _mm256_max_ps(a.hi, b.hi)}; }
  KV_SIMD F min(F a, F b) { return {_mm256_min_ps(a.lo, b.lo), _mm256_min_ps(a.hi, b.hi)}; }
  KV_SIMD F round(F a) {
    constexpr int kNearest = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
    return {_mm256_round_ps(a.lo, kNearest), _mm256_round_ps(a.hi, kNearest)};
  }
  KV_SIMD F scale2(F x, F n) { return {scale2(x.lo, n.lo), scale2(x.hi, n.hi)}; }
  KV_SIMD F keep_unless_less(F x, F a, F b) {
    return {_mm256_and_ps(x.lo, _mm256_cmp_ps(a.lo, b.lo, _CMP_NLT_UQ)),
            _mm256_and_ps(x.hi, _mm256_cmp_ps(a.hi, b.hi, _CMP_NLT_UQ))};
  }
  KV_SIMD F mantissa(F x) { return {mantissa(x.lo), mantissa(x.hi)}; }
  KV_SIMD F exponent(F x) { return {exponent(x.lo), exponent(x.hi)}; }

  KV_SIMD float reduce_add(F x) {
    const __m256 a = _mm256_add_ps(x.lo, x.hi);
    const __m128 b = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
    const __m128 c = _mm_add_ps(b, _mm_movehl_ps(b, b));
    return _mm_cvtss_f32(_mm_add_ss(c, _mm_movehdup_ps(c)));
  }
  KV_SIMD float reduce_max(F x) {
    const __m256 a = _mm256_max_ps(x.lo, x.hi);
    const __m128 b = _mm_max_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
    const __m128 c = _mm_max_ps(b, _mm_movehl_ps(b, b));
    return _mm_cvtss_f32(_mm_max_ss(c, _mm_movehdup_ps(c)));
  }
  KV_SIMD float reduce_min(F x) {
    const __m256 a = _mm256_min_ps(x.lo, x.hi);
    const __m128 b = _mm_min_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
    const __m128 c = _mm_min_ps(b, _mm_movehl_ps(b, b));
    return _mm_cvtss_f32(_mm_min_ss(c, _mm_movehdup_ps(c)));
  }
  KV_SIMD F reduce_rows(const float* rows) {
    return {reduce_8_rows(rows), reduce_8_rows(rows + 8 * 16)};
  }
  KV_SIMD void transpose(const half* const* from, int column, float* to, int stride) {
    alignas(32) float block[16][16];
    for (int r = 0; r < 16; ++r) store(block[r], load(from[r] + column));
    for (int c = 0; c < 16; ++c)
      for (int r = 0; r < 16; ++r) to[c * stride + r] = block[r][c];
  }

  template <int kHalf>
  KV_SIMD F butterfly(F x) {
    if constexpr (kHalf == 8) {
      return {_mm256_add_ps(x.lo, x.hi), _mm256_sub_ps(x.lo, x.hi)};
    } else {
      return {butterfly_8<kHalf>(x.lo), butterfly_8<kHalf>(x.hi)};
    }
  }

  // The top bit of each 4-bit code flipped, a code is code - 8 in two's complement.
  KV_SIMD Codes load_nibbles(const uint8_t* p) {
    const __m256i flip = _mm256_set1_epi32(static_cast<int>(0x88888888u));
    const Codes c = load_crumbs(p);
    return {_mm256_xor_si256(c.lo, flip), _mm256_xor_si256(c.hi, flip)};
  }
  KV_SIMD F nibble(Codes c) {
    return {
        _mm256_cvtepi32_ps(_mm256_srai_epi32(_mm256_slli_epi32(c.lo, 28), 28)),
        _mm256_cvtepi32_ps(_mm256_srai_epi32(_mm256_slli_epi32(c.hi, 28), 28)),
    };
  }
  KV_SIMD Codes load_crumbs(const uint8_t* p) {
    const __m256i* q = reinterpret_cast<const __m256i*>(p);
    return {_mm256_loadu_si256(q), _mm256_loadu_si256(q + 1)};
  }
  KV_SIMD F crumb(Codes c) {
    const __m256 table = _mm256_setr_ps(-2, -1, 0, 1, -2, -1, 0, 1);
    return {_mm256_permutevar8x32_ps(table, c.lo), _mm256_permutevar8x32_ps(table, c.hi)};
  }
  template <int kBits>
  KV_SIMD Codes shift(Codes c) {
    return {_mm256_srli_epi32(c.lo, kBits), _mm256_srli_epi32(c.hi, kBits)};
  }
  KV_SIMD Codes skip(Codes c, int bits) {
    const __m128i count = _mm_cvtsi32_si128(bits);
    return {_mm256_srl_epi32(c.lo, count), _mm256_srl_epi32(c.hi, count)};
  }

  KV_SIMD F pair(const float* p) { return {_mm256_set1_ps(p[0]), _mm256_set1_ps(p[1])}; }
  KV_SIMD F add_halves(F a, F b) { return {_mm256_add_ps(a.lo, a.hi), _mm256_add_ps(b.lo, b.hi)}; }
  KV_SIMD void unpermute_nibbles(const float* from, float* to) {
    for (int j = 0; j < 16; ++j)
      for (int i = 0; i < 8; ++i) to[8 * j + i] = from[16 * i + j];
  }
  KV_SIMD void unpermute_crumbs(const float* from, float* to) {
    for (int j = 0; j < 8; ++j)
      for (int i = 0; i < 16; ++i) to[16 * j + i] = from[8 * i + j];
  }

 private:
  template <int kHalf>
  KV_SIMD __m256 butterfly_8(__m256 x) {
    __m256 partner;
    if constexpr (kHalf == 1) partner = _mm256_permute_ps(x, 0xb1);
    if constexpr (kHalf == 2) partner = _mm256_permute_ps(x, 0x4e);
    if constexpr (kHalf == 4) partner = _mm256_permute2f128_ps(x, x, 0x01);
    constexpr int kUpper = kHalf == 1 ? 0xaa : kHalf == 2 ? 0xcc : 0xf0;
    return _mm256_blend_ps(_mm256_add_ps(x, partner), _mm256_sub_ps(partner, x), kUpper);
  }
  KV_SIMD __m256 scale2(__m256 x, __m256 n) {
    const __m256i e = _mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127));
    return _mm256_mul_ps(x, _mm256_castsi256_ps(_mm256_slli_epi32(e, 23)));
  }
  KV_SIMD __m256 mantissa(__m256 x) {
    const __m256i bits = _mm256_castps_si256(x);
    return _mm256_castsi256_ps(_mm256_or_si256(
        _mm256_and_si256(bits, _mm256_set1_epi32(0x007fffff)), _mm256_set1_epi32(0x3f800000)));
  }
  KV_SIMD __m256 exponent(__m256 x) {
    return _mm256_cvtepi32_ps(
        _mm256_sub_epi32(_mm256_srli_epi32(_mm256_castps_si256(x), 23), _mm256_set1_epi32(127)));
  }
  KV_SIMD __m256 reduce_8_rows(const float* rows) {
    __m256 two[4];  // rows r and r + 4, four partial sums each
    for (int r = 0; r < 4; ++r) {
      const F x = load(rows + 16 * r), y = load(rows + 16 * (r + 4));
      const __m256 a = _mm256_add_ps(x.lo, x.hi), b = _mm256_add_ps(y.lo, y.hi);
      two[r] =
          _mm256_add_ps(_mm256_permute2f128_ps(a, b, 0x20), _mm256_permute2f128_ps(a, b, 0x31));
    }
    const __m256 r = _mm256_add_ps(_mm256_shuffle_ps(two[0], two[1], 0x44),
                                   _mm256_shuffle_ps(two[0], two[1], 0xee));
    const __m256 s = _mm256_add_ps(_mm256_shuffle_ps(two[2], two[3], 0x44),
                                   _mm256_shuffle_ps(two[2], two[3], 0xee));
    return _mm256_add_ps(_mm256_shuffle_ps(r, s, 0x88), _mm256_shuffle_ps(r, s, 0xdd));
  }
};

}  // namespace kvarn::cpu
