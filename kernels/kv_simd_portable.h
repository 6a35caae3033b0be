// Sixteen floats in compiler vector extensions: the vocabulary of the KV kernels without any
// instruction set. See kv_simd_avx512.h for the meaning of each operation and of its lanes.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "kernels/core/dtype.h"

#define KV_SIMD static inline __attribute__((always_inline))

// Vectors are only passed between always-inlined functions: no ABI is involved.
#pragma GCC diagnostic ignored "-Wpsabi"

namespace kvarn::cpu {

struct Portable {
  typedef float F __attribute__((vector_size(64)));
  typedef uint32_t Codes __attribute__((vector_size(64)));
  typedef int32_t I __attribute__((vector_size(64)));

  static constexpr int kLanes = 16;
  static constexpr int kAccumulators = 2;
  static constexpr int kGemmRows = 1, kGemmVectors = 2;

  KV_SIMD F zero() { return F{}; }
  KV_SIMD F set1(float x) { return F{} + x; }
  KV_SIMD F load(const float* p) {
    F x;
    std::memcpy(&x, p, sizeof(x));
    return x;
  }
  KV_SIMD void store(float* p, F x) { std::memcpy(p, &x, sizeof(x)); }
  KV_SIMD F load(const half* p) {
    F x;
    for (int i = 0; i < kLanes; ++i) x[i] = to_float(p[i]);
    return x;
  }
  KV_SIMD void store(half* p, F x) {
    for (int i = 0; i < kLanes; ++i) p[i] = to_half(x[i]);
  }
  KV_SIMD void store(uint8_t* p, F x) {
    const I n = __builtin_convertvector(round(x), I);
    for (int i = 0; i < kLanes; ++i) p[i] = static_cast<uint8_t>(n[i]);
  }

  KV_SIMD F add(F a, F b) { return a + b; }
  KV_SIMD F sub(F a, F b) { return a - b; }
  KV_SIMD F mul(F a, F b) { return a * b; }
  KV_SIMD F div(F a, F b) { return a / b; }
  KV_SIMD F sqrt(F a) {
    for (int i = 0; i < kLanes; ++i) a[i] = std::sqrt(a[i]);
    return a;
  }
  KV_SIMD F fma(F a, F b, F c) { return a * b + c; }  // two roundings: there is no fused multiply
  KV_SIMD F max(F a, F b) { return a > b ? a : b; }
  KV_SIMD F min(F a, F b) { return a < b ? a : b; }
  // |a| < 2^22: adding 1.5 * 2^23 leaves no bits for a fraction.
  KV_SIMD F round(F a) {
    const F magic = set1(0x1.8p23f);
    return (a + magic) - magic;
  }
  KV_SIMD F scale2(F x, F n) {
    const I e = (__builtin_convertvector(n, I) + 127) << 23;
    F factor;
    std::memcpy(&factor, &e, sizeof(e));
    return x * factor;
  }
  KV_SIMD F keep_unless_less(F x, F a, F b) { return a < b ? F{} : x; }
  KV_SIMD F mantissa(F x) {
    const Codes bits = (as_bits(x) & 0x007fffffu) | 0x3f800000u;
    std::memcpy(&x, &bits, sizeof(x));
    return x;
  }
  KV_SIMD F exponent(F x) {
    return __builtin_convertvector(__builtin_convertvector(as_bits(x) >> 23, I) - 127, F);
  }

  KV_SIMD float reduce_add(F x) {
    for (int width = 8; width > 0; width /= 2)
      for (int i = 0; i < width; ++i) x[i] += x[i + width];
    return x[0];
  }
  KV_SIMD float reduce_max(F x) {
    float top = x[0];
    for (int i = 1; i < kLanes; ++i) top = x[i] > top ? x[i] : top;
    return top;
  }
  KV_SIMD float reduce_min(F x) {
    float low = x[0];
    for (int i = 1; i < kLanes; ++i) low = x[i] < low ? x[i] : low;
    return low;
  }
  KV_SIMD F reduce_rows(const float* rows) {
    F sums;
    for (int r = 0; r < kLanes; ++r) sums[r] = reduce_add(load(rows + kLanes * r));
    return sums;
  }
  KV_SIMD void transpose(const half* const* from, int column, float* to, int stride) {
    for (int r = 0; r < kLanes; ++r)
      for (int c = 0; c < kLanes; ++c) to[c * stride + r] = to_float(from[r][column + c]);
  }

  // The top bit of each code flipped, a code is its value minus half the range in two's complement.
  KV_SIMD Codes load_nibbles(const uint8_t* p) { return load_codes(p) ^ 0x88888888u; }
  KV_SIMD F nibble(Codes c) { return low_bits<4>(c); }
  KV_SIMD Codes load_crumbs(const uint8_t* p) { return load_codes(p) ^ 0xaaaaaaaau; }
  KV_SIMD F crumb(Codes c) { return low_bits<2>(c); }
  template <int kBits>
  KV_SIMD Codes shift(Codes c) {
    return c >> kBits;
  }
  KV_SIMD Codes skip(Codes c, int bits) { return c >> static_cast<uint32_t>(bits); }

  KV_SIMD F pair(const float* p) {
    F x;
    for (int i = 0; i < kLanes; ++i) x[i] = p[i / 8];
    return x;
  }
  KV_SIMD F add_halves(F a, F b) {
    F x;
    for (int i = 0; i < 8; ++i) {
      x[i] = a[i] + a[i + 8];
      x[i + 8] = b[i] + b[i + 8];
    }
    return x;
  }
  KV_SIMD void unpermute_nibbles(const float* from, float* to) {
    for (int j = 0; j < 16; ++j)
      for (int i = 0; i < 8; ++i) to[8 * j + i] = from[16 * i + j];
  }
  KV_SIMD void unpermute_crumbs(const float* from, float* to) {
    for (int j = 0; j < 8; ++j)
      for (int i = 0; i < 16; ++i) to[16 * j + i] = from[8 * i + j];
  }

 private:
  KV_SIMD Codes as_bits(F x) {
    Codes bits;
    std::memcpy(&bits, &x, sizeof(x));
    return bits;
  }
  KV_SIMD Codes load_codes(const uint8_t* p) {
    Codes c;
    std::memcpy(&c, p, sizeof(c));
    return c;
  }
  template <int kBits>
  KV_SIMD F low_bits(Codes c) {
    c = c << (32 - kBits);
    I n;
    std::memcpy(&n, &c, sizeof(c));
    return __builtin_convertvector(n >> (32 - kBits), F);
  }
};

}  // namespace kvarn::cpu
