// Scores to softmax weights, and the folding of a coded tile's scales into the query, the weights
// and the result (docs/kvarn.md), with the vectors of S (kv_simd_*.h). Shared by every path of
// attention_impl.h: the arithmetic of a query vector is here once.
#pragma once

#include "kernels/kv_kernels.h"
#include "kernels/kv_math_impl.h"

namespace kvarn::cpu {

template <class S>
class BlockSoftmax {
  using F = typename S::F;
  static constexpr int kN = kBlockTokens;

 public:
  struct Scales {
    alignas(64) float k_step[kN], k_mid[kN];  // mid: the value of the code whose signed form is 0
    alignas(64) float k_token[kN];            // times the softmax scale
    alignas(64) float v_step[kN], v_mid[kN], v_channel[kN];
  };

  static void load_scales(const AttendShape& shape, const std::byte* record, Scales& s) {
    const auto at = [&](int offset, int i) __attribute__((always_inline)) {
      return S::load(reinterpret_cast<const half*>(record + offset) + i);
    };
    const TileLayout& tile = shape.tile;
    const F k_half = S::set1(static_cast<float>(1 << (tile.k_bits - 1)));
    const F v_half = S::set1(static_cast<float>(1 << (tile.v_bits - 1)));
    for (int i = 0; i < kN; i += 16) {
      const F k_step = at(tile.k_step, i), v_step = at(tile.v_step, i);
      S::store(s.k_step + i, k_step);
      S::store(s.k_mid + i, S::add(S::mul(k_step, k_half), at(tile.k_zero, i)));
      S::store(s.k_token + i, S::mul(at(tile.k_token, i), S::set1(shape.scale)));
      S::store(s.v_step + i, v_step);
      S::store(s.v_mid + i, S::add(S::mul(v_step, v_half), at(tile.v_zero, i)));
      S::store(s.v_channel + i, at(tile.v_channel, i));
    }
  }

  // a = q * step; returns the part of every score that the codes do not change.
  static float fold_query(const Scales& s, const float* q, float* a) {
    F beta = S::zero();
    for (int d = 0; d < kN; d += 16) {
      const F x = S::load(q + d);
      S::store(a + d, S::mul(x, S::load(s.k_step + d)));
      beta = S::fma(x, S::load(s.k_mid + d), beta);
    }
    return S::reduce_add(beta);
  }

  // sums (in code order) -> softmax over the tile; w[t] = p[t] * step[t]. Returns sum p * mid.
  static float fold_scores(const Scales& s, const float* sums, float beta, float* w, float& m,
                           float& l) {
    S::unpermute_nibbles(sums, w);
    F top = S::set1(-__builtin_inff());
    for (int t = 0; t < kN; t += 16) {
      const F score = S::mul(S::add(S::load(w + t), S::set1(beta)), S::load(s.k_token + t));
      S::store(w + t, score);
      top = S::max(top, score);
    }
    m = S::reduce_max(top);
    F sum = S::zero(), zeta = S::zero();
    for (int t = 0; t < kN; t += 16) {
      const F p = exp_of<S>(S::sub(S::load(w + t), S::set1(m)));
      sum = S::add(sum, p);
      zeta = S::fma(p, S::load(s.v_mid + t), zeta);
      S::store(w + t, S::mul(p, S::load(s.v_step + t)));
    }
    l = S::reduce_add(sum);
    return S::reduce_add(zeta);
  }

  // sums (in code order) -> acc, in the rotated frame.
  static void fold_values(const Scales& s, int bits, const float* sums, float zeta, float* acc) {
    if (bits == 2) {
      S::unpermute_crumbs(sums, acc);
    } else {
      S::unpermute_nibbles(sums, acc);
    }
    for (int d = 0; d < kN; d += 16)
      S::store(acc + d, S::mul(S::add(S::load(acc + d), S::set1(zeta)), S::load(s.v_channel + d)));
  }

  // w: scores without the softmax scale -> p over the first `limit` tokens.
  static void exact_softmax(float scale, float* w, int limit, float& m, float& l) {
    const int padded = (limit + 15) / 16 * 16;
    F top = S::set1(-__builtin_inff());
    for (int t = limit; t < padded; ++t) w[t] = -__builtin_inff();
    for (int t = 0; t < padded; t += 16) {
      const F score = S::mul(S::load(w + t), S::set1(scale));
      S::store(w + t, score);
      top = S::max(top, score);
    }
    m = S::reduce_max(top);
    F sum = S::zero();
    for (int t = 0; t < padded; t += 16) {
      const F p = exp_of<S>(S::sub(S::load(w + t), S::set1(m)));
      S::store(w + t, p);
      sum = S::add(sum, p);
    }
    l = S::reduce_add(sum);
  }
};

}  // namespace kvarn::cpu
