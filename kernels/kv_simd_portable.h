// Sixteen floats as four vectors of four, in compiler vector extensions: the vocabulary of the KV
// kernels for any processor (SSE2 and NEON have such registers). See kv_simd_avx512.h for the
// meaning of each operation and of its lanes.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "kernels/core/dtype.h"

#define KV_SIMD static inline __attribute__((always_inline))

namespace kvarn::cpu {

struct Portable {
  typedef float F4 __attribute__((vector_size(16)));
  typedef int32_t I4 __attribute__((vector_size(16)));
  typedef uint32_t U4 __attribute__((vector_size(16)));
  struct F {
    F4 v[4];
  };
  struct Codes {
    U4 v[4];
  };

  static constexpr int kLanes = 16;
  static constexpr int kAccumulators = 2;  // of at least 16 registers, 8
  static constexpr int kGemmRows = 2, kGemmVectors = 1;

  KV_SIMD F zero() { return set1(0.0f); }
  KV_SIMD F set1(float x) {
    const F4 v = F4{} + x;
    return {{v, v, v, v}};
  }
  KV_SIMD F load(const float* p) {
    F x;
    for (int i = 0; i < 4; ++i) std::memcpy(&x.v[i], p + 4 * i, sizeof(F4));
    return x;
  }
  KV_SIMD void store(float* p, F x) {
    for (int i = 0; i < 4; ++i) std::memcpy(p + 4 * i, &x.v[i], sizeof(F4));
  }
  KV_SIMD F load(const half* p) {
    F x;
    for (int i = 0; i < 4; ++i) {
      uint16_t bits[4];
      std::memcpy(bits, p + 4 * i, sizeof(bits));
      const U4 h = {bits[0], bits[1], bits[2], bits[3]};
      // The exponent is off by 112: one exact multiply corrects it, subnormals included. Infinity
      // and NaN get the largest exponent.
      const U4 magnitude = (h & 0x7fffu) << 13;
      const U4 special = as<U4>((h & 0x7c00u) == 0x7c00u) & 0x7f800000u;
      const U4 value = as<U4>(as<F4>(magnitude) * 0x1p112f) | special;
      x.v[i] = as<F4>(value | (h & 0x8000u) << 16);
    }
    return x;
  }
  KV_SIMD void store(half* p, F x) {
    for (int i = 0; i < kLanes; ++i) p[i] = to_half(x.v[i / 4][i % 4]);
  }
  KV_SIMD void store(uint8_t* p, F x) {
    for (int i = 0; i < 4; ++i) {
      const I4 n = __builtin_convertvector(round(x.v[i]), I4);
      for (int j = 0; j < 4; ++j) p[4 * i + j] = static_cast<uint8_t>(n[j]);
    }
  }

  KV_SIMD F add(F a, F b) {
    for (int i = 0; i < 4; ++i) a.v[i] += b.v[i];
    return a;
  }
  KV_SIMD F sub(F a, F b) {
    for (int i = 0; i < 4; ++i) a.v[i] -= b.v[i];
    return a;
  }
  KV_SIMD F mul(F a, F b) {
    for (int i = 0; i < 4; ++i) a.v[i] *= b.v[i];
    return a;
  }
  KV_SIMD F div(F a, F b) {
    for (int i = 0; i < 4; ++i) a.v[i] /= b.v[i];
    return a;
  }
  KV_SIMD F sqrt(F a) {
    for (int i = 0; i < kLanes; ++i) a.v[i / 4][i % 4] = std::sqrt(a.v[i / 4][i % 4]);
    return a;
  }
  // Two roundings: there is no fused multiply-add to rely on.
  KV_SIMD F fma(F a, F b, F c) {
    for (int i = 0; i < 4; ++i) c.v[i] = a.v[i] * b.v[i] + c.v[i];
    return c;
  }
  KV_SIMD F max(F a, F b) {
    for (int i = 0; i < 4; ++i) a.v[i] = a.v[i] > b.v[i] ? a.v[i] : b.v[i];
    return a;
  }
  KV_SIMD F min(F a, F b) {
    for (int i = 0; i < 4; ++i) a.v[i] = a.v[i] < b.v[i] ? a.v[i] : b.v[i];
    return a;
  }
  KV_SIMD F round(F a) {
    for (int i = 0; i < 4; ++i) a.v[i] = round(a.v[i]);
    return a;
  }
  KV_SIMD F scale2(F x, F n) {
    for (int i = 0; i < 4; ++i) x.v[i] *= as<F4>((__builtin_convertvector(n.v[i], I4) + 127) << 23);
    return x;
  }
  KV_SIMD F keep_unless_less(F x, F a, F b) {
    for (int i = 0; i < 4; ++i) x.v[i] = a.v[i] < b.v[i] ? F4{} : x.v[i];
    return x;
  }
  KV_SIMD F mantissa(F x) {
    for (int i = 0; i < 4; ++i) x.v[i] = as<F4>((as<U4>(x.v[i]) & 0x007fffffu) | 0x3f800000u);
    return x;
  }
  KV_SIMD F exponent(F x) {
    for (int i = 0; i < 4; ++i)
      x.v[i] = __builtin_convertvector(as<I4>(as<U4>(x.v[i]) >> 23) - 127, F4);
    return x;
  }

  KV_SIMD float reduce_add(F x) {
    const F4 s = (x.v[0] + x.v[2]) + (x.v[1] + x.v[3]);
    return (s[0] + s[2]) + (s[1] + s[3]);
  }
  KV_SIMD float reduce_max(F x) {
    float top = x.v[0][0];
    for (int i = 1; i < kLanes; ++i) top = x.v[i / 4][i % 4] > top ? x.v[i / 4][i % 4] : top;
    return top;
  }
  KV_SIMD float reduce_min(F x) {
    float low = x.v[0][0];
    for (int i = 1; i < kLanes; ++i) low = x.v[i / 4][i % 4] < low ? x.v[i / 4][i % 4] : low;
    return low;
  }
  KV_SIMD F reduce_rows(const float* rows) {
    float sums[kLanes];
    for (int r = 0; r < kLanes; ++r) sums[r] = reduce_add(load(rows + kLanes * r));
    return load(sums);
  }
  KV_SIMD void transpose(const half* const* from, int column, float* to, int stride) {
    float block[kLanes][kLanes];
    for (int r = 0; r < kLanes; ++r) store(block[r], load(from[r] + column));
    for (int c = 0; c < kLanes; ++c)
      for (int r = 0; r < kLanes; ++r) to[c * stride + r] = block[r][c];
  }

  template <int kHalf>
  KV_SIMD F butterfly(F x) {
    if constexpr (kHalf == 8) {
      return {{x.v[0] + x.v[2], x.v[1] + x.v[3], x.v[0] - x.v[2], x.v[1] - x.v[3]}};
    } else if constexpr (kHalf == 4) {
      return {{x.v[0] + x.v[1], x.v[0] - x.v[1], x.v[2] + x.v[3], x.v[2] - x.v[3]}};
    } else {
      for (F4& v : x.v) {
        if constexpr (kHalf == 2) {
          v = F4{v[0] + v[2], v[1] + v[3], v[0] - v[2], v[1] - v[3]};
        } else {
          v = F4{v[0] + v[1], v[0] - v[1], v[2] + v[3], v[2] - v[3]};
        }
      }
      return x;
    }
  }

  // The top bit of each code flipped, a code is its value minus half the range in two's complement.
  KV_SIMD Codes load_nibbles(const uint8_t* p) { return load_codes(p, 0x88888888u); }
  KV_SIMD F nibble(Codes c) { return low_bits<4>(c); }
  KV_SIMD Codes load_crumbs(const uint8_t* p) { return load_codes(p, 0xaaaaaaaau); }
  KV_SIMD F crumb(Codes c) { return low_bits<2>(c); }
  template <int kBits>
  KV_SIMD Codes shift(Codes c) {
    for (int i = 0; i < 4; ++i) c.v[i] >>= kBits;
    return c;
  }
  KV_SIMD Codes skip(Codes c, int bits) {
    for (int i = 0; i < 4; ++i) c.v[i] >>= static_cast<uint32_t>(bits);
    return c;
  }

  KV_SIMD F pair(const float* p) {
    const F4 a = F4{} + p[0], b = F4{} + p[1];
    return {{a, a, b, b}};
  }
  KV_SIMD F add_halves(F a, F b) {
    return {{a.v[0] + a.v[2], a.v[1] + a.v[3], b.v[0] + b.v[2], b.v[1] + b.v[3]}};
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
  template <typename To, typename From>
  KV_SIMD To as(From from) {
    static_assert(sizeof(To) == sizeof(From));
    To to;
    std::memcpy(&to, &from, sizeof(to));
    return to;
  }
  // |a| < 2^22: adding 1.5 * 2^23 leaves no bits for a fraction.
  KV_SIMD F4 round(F4 a) { return (a + 0x1.8p23f) - 0x1.8p23f; }
  KV_SIMD Codes load_codes(const uint8_t* p, uint32_t flip) {
    Codes c;
    for (int i = 0; i < 4; ++i) {
      std::memcpy(&c.v[i], p + 16 * i, sizeof(U4));
      c.v[i] ^= flip;
    }
    return c;
  }
  template <int kBits>
  KV_SIMD F low_bits(Codes c) {
    F x;
    for (int i = 0; i < 4; ++i)
      x.v[i] = __builtin_convertvector(as<I4>(c.v[i] << (32 - kBits)) >> (32 - kBits), F4);
    return x;
  }
};

}  // namespace kvarn::cpu
