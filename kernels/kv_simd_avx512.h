// Sixteen floats in one register: the vocabulary of the KV kernels (kv_encode_impl.h,
// attention_impl.h) for AVX-512 F, BW, VL and DQ. Included only by a file compiled with these
// flags.
//
// Every type of this family has the same operations with the same lane order, and sums lanes in one
// tree: i and i+8, then i+4, i+2, i+1.
#pragma once

#include <immintrin.h>

#include <cstdint>

#include "kernels/core/dtype.h"

#define KV_SIMD static inline __attribute__((always_inline))

namespace kvarn::cpu {

struct Avx512 {
  using F = __m512;
  using Codes = __m512i;  // 64 bytes of packed codes: 16 lanes of 32 bits

  static constexpr int kAccumulators = 24;  // vectors that a loop keeps in registers
  static constexpr int kGemmRows = 4, kGemmVectors = 4;

  KV_SIMD F zero() { return _mm512_setzero_ps(); }
  KV_SIMD F set1(float x) { return _mm512_set1_ps(x); }
  KV_SIMD F load(const float* p) { return _mm512_loadu_ps(p); }
  KV_SIMD void store(float* p, F x) { _mm512_storeu_ps(p, x); }
  KV_SIMD F load(const half* p) {
    return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  }
  // Rounds to nearest even and saturates to +-65504.
  KV_SIMD void store(half* p, F x) {
    x = _mm512_min_ps(_mm512_max_ps(x, set1(-65504.0f)), set1(65504.0f));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p),
                        _mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT));
  }
  // Bytes of integers 0..255.
  KV_SIMD void store(uint8_t* p, F x) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtepi32_epi8(_mm512_cvtps_epi32(x)));
  }

  KV_SIMD F add(F a, F b) { return _mm512_add_ps(a, b); }
  KV_SIMD F sub(F a, F b) { return _mm512_sub_ps(a, b); }
  KV_SIMD F mul(F a, F b) { return _mm512_mul_ps(a, b); }
  KV_SIMD F div(F a, F b) { return _mm512_div_ps(a, b); }
  KV_SIMD F sqrt(F a) { return _mm512_sqrt_ps(a); }
  KV_SIMD F fma(F a, F b, F c) { return _mm512_fmadd_ps(a, b, c); }
  KV_SIMD F max(F a, F b) { return _mm512_max_ps(a, b); }  // b where either is NaN
  KV_SIMD F min(F a, F b) { return _mm512_min_ps(a, b); }
  KV_SIMD F round(F a) { return _mm512_roundscale_ps(a, _MM_FROUND_TO_NEAREST_INT); }
  // x * 2^n for an integral n in [-126, 127].
  KV_SIMD F scale2(F x, F n) {
    const __m512i e = _mm512_add_epi32(_mm512_cvtps_epi32(n), _mm512_set1_epi32(127));
    return _mm512_mul_ps(x, _mm512_castsi512_ps(_mm512_slli_epi32(e, 23)));
  }
  // x where a >= b or either is NaN, else 0.
  KV_SIMD F keep_unless_less(F x, F a, F b) {
    return _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(a, b, _CMP_NLT_UQ), x);
  }
  // x > 0 and normal: x = mantissa * 2^exponent with the mantissa in [1, 2).
  KV_SIMD F mantissa(F x) {
    const __m512i bits = _mm512_castps_si512(x);
    return _mm512_castsi512_ps(_mm512_or_epi32(
        _mm512_and_epi32(bits, _mm512_set1_epi32(0x007fffff)), _mm512_set1_epi32(0x3f800000)));
  }
  KV_SIMD F exponent(F x) {
    return _mm512_cvtepi32_ps(
        _mm512_sub_epi32(_mm512_srli_epi32(_mm512_castps_si512(x), 23), _mm512_set1_epi32(127)));
  }

  KV_SIMD float reduce_add(F x) {
    const __m256 a = _mm256_add_ps(_mm512_castps512_ps256(x), _mm512_extractf32x8_ps(x, 1));
    const __m128 b = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
    const __m128 c = _mm_add_ps(b, _mm_movehl_ps(b, b));
    return _mm_cvtss_f32(_mm_add_ss(c, _mm_movehdup_ps(c)));
  }
  KV_SIMD float reduce_max(F x) {
    const __m256 a = _mm256_max_ps(_mm512_castps512_ps256(x), _mm512_extractf32x8_ps(x, 1));
    const __m128 b = _mm_max_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
    const __m128 c = _mm_max_ps(b, _mm_movehl_ps(b, b));
    return _mm_cvtss_f32(_mm_max_ss(c, _mm_movehdup_ps(c)));
  }
  KV_SIMD float reduce_min(F x) {
    const __m256 a = _mm256_min_ps(_mm512_castps512_ps256(x), _mm512_extractf32x8_ps(x, 1));
    const __m128 b = _mm_min_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
    const __m128 c = _mm_min_ps(b, _mm_movehl_ps(b, b));
    return _mm_cvtss_f32(_mm_min_ss(c, _mm_movehdup_ps(c)));
  }

  // Lane r of the result is reduce_add of rows[16 r, 16 r + 16).
  KV_SIMD F reduce_rows(const float* rows) {
    F quad[4];  // lane group L of quad[e]: row 4 L + e, four partial sums
    for (int e = 0; e < 4; ++e) {
      const F a = load(rows + 16 * e), b = load(rows + 16 * (4 + e));
      const F c = load(rows + 16 * (8 + e)), d = load(rows + 16 * (12 + e));
      const F ab = add(_mm512_shuffle_f32x4(a, b, 0x44), _mm512_shuffle_f32x4(a, b, 0xee));
      const F cd = add(_mm512_shuffle_f32x4(c, d, 0x44), _mm512_shuffle_f32x4(c, d, 0xee));
      quad[e] = add(_mm512_shuffle_f32x4(ab, cd, 0x88), _mm512_shuffle_f32x4(ab, cd, 0xdd));
    }
    const F r =
        add(_mm512_shuffle_ps(quad[0], quad[1], 0x44), _mm512_shuffle_ps(quad[0], quad[1], 0xee));
    const F s =
        add(_mm512_shuffle_ps(quad[2], quad[3], 0x44), _mm512_shuffle_ps(quad[2], quad[3], 0xee));
    return add(_mm512_shuffle_ps(r, s, 0x88), _mm512_shuffle_ps(r, s, 0xdd));
  }

  // to[c][r] = from[r] + c for 16 rows of 16 fp16 values.
  KV_SIMD void transpose(const half* const* from, int column, float* to, int stride) {
    F a[16], b[16];
    for (int r = 0; r < 16; ++r) a[r] = load(from[r] + column);
    for (int r = 0; r < 16; r += 2) {
      b[r] = _mm512_unpacklo_ps(a[r], a[r + 1]);
      b[r + 1] = _mm512_unpackhi_ps(a[r], a[r + 1]);
    }
    for (int r = 0; r < 16; r += 4) {  // a[r + c]: columns 4 L + c of rows r .. r+3
      a[r] = unpack_lo64(b[r], b[r + 2]);
      a[r + 1] = unpack_hi64(b[r], b[r + 2]);
      a[r + 2] = unpack_lo64(b[r + 1], b[r + 3]);
      a[r + 3] = unpack_hi64(b[r + 1], b[r + 3]);
    }
    for (int c = 0; c < 4; ++c) transpose_groups(a[c], a[4 + c], a[8 + c], a[12 + c]);
    for (int c = 0; c < 4; ++c)
      for (int group = 0; group < 4; ++group)
        store(to + (4 * group + c) * stride, a[4 * group + c]);
  }

  // x[i] + x[i + kHalf] in the lanes i whose bit kHalf is 0, x[i] - x[i + kHalf] in the others.
  template <int kHalf>
  KV_SIMD F butterfly(F x) {
    F partner;
    if constexpr (kHalf == 1) partner = _mm512_permute_ps(x, 0xb1);
    if constexpr (kHalf == 2) partner = _mm512_permute_ps(x, 0x4e);
    if constexpr (kHalf == 4) partner = _mm512_shuffle_f32x4(x, x, 0xb1);
    if constexpr (kHalf == 8) partner = _mm512_shuffle_f32x4(x, x, 0x4e);
    constexpr __mmask16 kUpper = kHalf == 1   ? 0xaaaa
                                 : kHalf == 2 ? 0xcccc
                                 : kHalf == 4 ? 0xf0f0
                                              : 0xff00;
    return _mm512_mask_sub_ps(add(x, partner), kUpper, partner, x);
  }

  // 4-bit codes: lane j holds elements 8j .. 8j+7, the first in its lowest bits. Values are code
  // - 8.
  KV_SIMD Codes load_nibbles(const uint8_t* p) { return _mm512_loadu_si512(p); }
  KV_SIMD F nibble(Codes c) {
    const F table = _mm512_setr_ps(-8, -7, -6, -5, -4, -3, -2, -1, 0, 1, 2, 3, 4, 5, 6, 7);
    return _mm512_permutexvar_ps(c, table);
  }
  // 2-bit codes of two rows of 128: lane j holds elements 16(j%8) .. +15 of row j/8. code - 2.
  KV_SIMD Codes load_crumbs(const uint8_t* p) { return _mm512_loadu_si512(p); }
  KV_SIMD F crumb(Codes c) {
    const F table = _mm512_setr_ps(-2, -1, 0, 1, -2, -1, 0, 1, -2, -1, 0, 1, -2, -1, 0, 1);
    return _mm512_permutexvar_ps(c, table);
  }
  template <int kBits>
  KV_SIMD Codes shift(Codes c) {
    return _mm512_srli_epi32(c, kBits);
  }
  KV_SIMD Codes skip(Codes c, int bits) { return _mm512_srl_epi32(c, _mm_cvtsi32_si128(bits)); }

  // Lanes 0-7: p[0], lanes 8-15: p[1].
  KV_SIMD F pair(const float* p) {
    return _mm512_mask_blend_ps(0xff00, _mm512_set1_ps(p[0]), _mm512_set1_ps(p[1]));
  }
  // Lanes 0-7: a[j] + a[j+8], lanes 8-15: b[j] + b[j+8].
  KV_SIMD F add_halves(F a, F b) {
    return add(_mm512_shuffle_f32x4(a, b, 0x44), _mm512_shuffle_f32x4(a, b, 0xee));
  }

  // to[8 j + i] = from[16 i + j]: the order of nibbles to the order of elements.
  KV_SIMD void unpermute_nibbles(const float* from, float* to) {
    F a[8], b[8];
    for (int i = 0; i < 8; ++i) a[i] = load(from + 16 * i);
    for (int i = 0; i < 8; i += 2) {
      b[i] = _mm512_unpacklo_ps(a[i], a[i + 1]);
      b[i + 1] = _mm512_unpackhi_ps(a[i], a[i + 1]);
    }
    for (int i = 0; i < 8; i += 4) {  // a[i + c]: lane group L is j = 4 L + c, rows i .. i+3
      a[i] = unpack_lo64(b[i], b[i + 2]);
      a[i + 1] = unpack_hi64(b[i], b[i + 2]);
      a[i + 2] = unpack_lo64(b[i + 1], b[i + 3]);
      a[i + 3] = unpack_hi64(b[i + 1], b[i + 3]);
    }
    transpose_groups(a[0], a[4], a[1], a[5]);
    transpose_groups(a[2], a[6], a[3], a[7]);
    const F even[4] = {a[0], a[4], a[1], a[5]}, odd[4] = {a[2], a[6], a[3], a[7]};
    for (int group = 0; group < 4; ++group) {
      store(to + 32 * group, even[group]);
      store(to + 32 * group + 16, odd[group]);
    }
  }
  // to[16 j + i] = from[8 i + j].
  KV_SIMD void unpermute_crumbs(const float* from, float* to) {
    F a[8], b[8];
    for (int i = 0; i < 8; ++i)
      a[i] = _mm512_insertf32x8(_mm512_castps256_ps512(_mm256_loadu_ps(from + 8 * i)),
                                _mm256_loadu_ps(from + 8 * (i + 8)), 1);
    for (int i = 0; i < 8; i += 2) {
      b[i] = _mm512_unpacklo_ps(a[i], a[i + 1]);
      b[i + 1] = _mm512_unpackhi_ps(a[i], a[i + 1]);
    }
    for (int i = 0; i < 8; i += 4) {  // lane group 2h + g of a[i + c]: j = 4 g + c, rows 8h + i ..
      a[i] = unpack_lo64(b[i], b[i + 2]);
      a[i + 1] = unpack_hi64(b[i], b[i + 2]);
      a[i + 2] = unpack_lo64(b[i + 1], b[i + 3]);
      a[i + 3] = unpack_hi64(b[i + 1], b[i + 3]);
    }
    const __m512i low = _mm512_setr_epi64(0, 1, 8, 9, 4, 5, 12, 13);
    const __m512i high = _mm512_setr_epi64(2, 3, 10, 11, 6, 7, 14, 15);
    for (int c = 0; c < 4; ++c) {
      const __m512d x = _mm512_castps_pd(a[c]), y = _mm512_castps_pd(a[4 + c]);
      store(to + 16 * c, _mm512_castpd_ps(_mm512_permutex2var_pd(x, low, y)));
      store(to + 16 * (4 + c), _mm512_castpd_ps(_mm512_permutex2var_pd(x, high, y)));
    }
  }

 private:
  KV_SIMD F unpack_lo64(F a, F b) {
    return _mm512_castpd_ps(_mm512_unpacklo_pd(_mm512_castps_pd(a), _mm512_castps_pd(b)));
  }
  KV_SIMD F unpack_hi64(F a, F b) {
    return _mm512_castpd_ps(_mm512_unpackhi_pd(_mm512_castps_pd(a), _mm512_castps_pd(b)));
  }
  // A 4x4 transpose of groups of four lanes.
  KV_SIMD void transpose_groups(F& a, F& b, F& c, F& d) {
    const F ab_lo = _mm512_shuffle_f32x4(a, b, 0x44), ab_hi = _mm512_shuffle_f32x4(a, b, 0xee);
    const F cd_lo = _mm512_shuffle_f32x4(c, d, 0x44), cd_hi = _mm512_shuffle_f32x4(c, d, 0xee);
    a = _mm512_shuffle_f32x4(ab_lo, cd_lo, 0x88);
    b = _mm512_shuffle_f32x4(ab_lo, cd_lo, 0xdd);
    c = _mm512_shuffle_f32x4(ab_hi, cd_hi, 0x88);
    d = _mm512_shuffle_f32x4(ab_hi, cd_hi, 0xdd);
  }
};

}  // namespace kvarn::cpu
