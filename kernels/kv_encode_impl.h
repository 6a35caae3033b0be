// Encodes one tile with the vectors of S (kv_simd_*.h). Nothing is fused and every sum has one
// order, so all instruction sets write the same record.
//
// The tile is never rewritten while its scales are sought: the deviations of X / column / row are
// those of X / row (or X / column) divided by the other scale, so a half pass is one sweep.
#pragma once

#include <cstddef>

#include "kernels/kv_encode_cpu.h"
#include "kernels/kv_math_impl.h"

namespace kvarn::cpu {

// The 128 x 128 values of K (rows are channels, columns tokens) or V (rows are tokens, columns
// channels): rows are the axis that carries the rounding step.
template <class S>
class TileEncoder {
  using F = typename S::F;
  static constexpr int kN = 128;
  static constexpr int kVectors = kN / 16;
  static_assert(kN == kBlockTokens && kN == kCodedHeadDim);
  static constexpr int kPasses = 8;
  static constexpr float kStdMin = 1e-3f, kStdMax = 1e3f;     // of a measured deviation
  static constexpr float kLogMin = -0.3f, kLogMax = 10.0f;    // of an accumulated log scale
  static constexpr float kMinStd = 1e-8f, kMinStep = 1e-10f;  // guards of divisions
  static constexpr float kGain = 1.0f - 1e-4f;  // a pass must be better by this to be kept

 public:
  // Writes the codes, and fp16 step[row], zero[row] and scale[column].
  static void encode(float* x, int bits, std::byte* codes, std::byte* step, std::byte* zero,
                     std::byte* column) {
    Scales s;
    normalise(x, s);
    for (int i = 0; i < kN; i += 16) {
      S::store(reinterpret_cast<half*>(column) + i, S::load(s.best_col + i));
      S::store(s.col_inv + i, S::div(S::set1(1.0f), S::load(s.best_col + i)));
      S::store(s.row_inv + i, S::div(S::set1(1.0f), S::load(s.best_row + i)));
    }
    const float top = static_cast<float>((1 << bits) - 1);
    alignas(64) float steps[kN], zeros[kN];
    const size_t row_bytes = static_cast<size_t>(kN * bits / 8);
    for (int r = 0; r < kN; ++r) {
      round_row(x + r * kN, s.col_inv, s.row_inv[r], top, bits, codes + row_bytes * r, &steps[r],
                &zeros[r]);
    }
    for (int i = 0; i < kN; i += 16) {  // the scale of a row is absorbed into its step and zero
      const F row = S::load(s.best_row + i);
      S::store(reinterpret_cast<half*>(step) + i, S::mul(row, S::load(steps + i)));
      S::store(reinterpret_cast<half*>(zero) + i, S::mul(row, S::load(zeros + i)));
    }
  }

 private:
  struct Scales {
    alignas(64) float col_log[kN], row_log[kN], col_inv[kN], row_inv[kN];
    alignas(64) float best_col[kN], best_row[kN];
  };

  static void normalise(const float* x, Scales& s) {
    for (int i = 0; i < kN; i += 16) {
      for (float* p : {s.col_log, s.row_log}) S::store(p + i, S::zero());
      for (float* p : {s.col_inv, s.row_inv, s.best_col, s.best_row})
        S::store(p + i, S::set1(1.0f));
    }
    alignas(64) float col_dev[kN], row_dev[kN];  // of X / row and of X / column
    column_deviations(x, s.row_inv, col_dev);
    row_deviations(x, s.col_inv, row_dev);
    float best = spread(col_dev, s.col_inv) + spread(row_dev, s.row_inv);
    for (int pass = 0; pass < kPasses; ++pass) {
      update(col_dev, s.col_log, s.col_inv);
      row_deviations(x, s.col_inv, row_dev);
      update(row_dev, s.row_log, s.row_inv);
      column_deviations(x, s.row_inv, col_dev);
      const float now = spread(col_dev, s.col_inv) + spread(row_dev, s.row_inv);
      if (now < best * kGain) {
        best = now;
        for (int i = 0; i < kN; i += 16) {
          S::store(s.best_col + i, exp_of<S, false>(S::load(s.col_log + i)));
          S::store(s.best_row + i, exp_of<S, false>(S::load(s.row_log + i)));
        }
      }
    }
  }

  // One half pass: adds the logarithm of the present deviations to the scales.
  static void update(const float* dev, float* log_scale, float* inv) {
    for (int i = 0; i < kN; i += 16) {
      F d = S::mul(S::load(dev + i), S::load(inv + i));
      d = S::min(S::max(d, S::set1(kStdMin)), S::set1(kStdMax));
      F l = S::add(S::load(log_scale + i), log_of<S>(d));
      l = S::min(S::max(l, S::set1(kLogMin)), S::set1(kLogMax));
      S::store(log_scale + i, l);
      S::store(inv + i, S::div(S::set1(1.0f), exp_of<S, false>(l)));
    }
  }

  // The largest deviation over the smallest.
  static float spread(const float* dev, const float* inv) {
    F low = S::mul(S::load(dev), S::load(inv)), high = low;
    for (int i = 16; i < kN; i += 16) {
      const F d = S::mul(S::load(dev + i), S::load(inv + i));
      low = S::min(low, d);
      high = S::max(high, d);
    }
    const float smallest = S::reduce_min(low);
    return S::reduce_max(high) / (smallest > kMinStd ? smallest : kMinStd);
  }

  static F deviation(F sum_sq) { return S::sqrt(S::mul(sum_sq, S::set1(1.0f / (kN - 1)))); }

  // Sample deviation of each column of X * row_inv, about its own mean.
  static void column_deviations(const float* x, const float* row_inv, float* dev) {
    constexpr int kBlock = 4;  // vectors of columns at a time
    for (int c = 0; c < kN; c += 16 * kBlock) {
      F mean[kBlock], sq[kBlock];
      for (int i = 0; i < kBlock; ++i) mean[i] = sq[i] = S::zero();
      for (int r = 0; r < kN; ++r) {
        const F scale = S::set1(row_inv[r]);
        for (int i = 0; i < kBlock; ++i)
          mean[i] = S::add(mean[i], S::mul(S::load(x + r * kN + c + 16 * i), scale));
      }
      for (int i = 0; i < kBlock; ++i) mean[i] = S::mul(mean[i], S::set1(1.0f / kN));
      for (int r = 0; r < kN; ++r) {
        const F scale = S::set1(row_inv[r]);
        for (int i = 0; i < kBlock; ++i) {
          const F d = S::sub(S::mul(S::load(x + r * kN + c + 16 * i), scale), mean[i]);
          sq[i] = S::add(sq[i], S::mul(d, d));
        }
      }
      for (int i = 0; i < kBlock; ++i) S::store(dev + c + 16 * i, deviation(sq[i]));
    }
  }

  // Sample deviation of each row of X * col_inv, about its own mean.
  static void row_deviations(const float* x, const float* col_inv, float* dev) {
    alignas(64) float lanes[16 * 16], mean[16];
    for (int r0 = 0; r0 < kN; r0 += 16) {
      for (int r = 0; r < 16; ++r) {
        F sum = S::zero();
        for (int i = 0; i < kN; i += 16)
          sum = S::add(sum, S::mul(S::load(x + (r0 + r) * kN + i), S::load(col_inv + i)));
        S::store(lanes + 16 * r, sum);
      }
      S::store(mean, S::mul(S::reduce_rows(lanes), S::set1(1.0f / kN)));
      for (int r = 0; r < 16; ++r) {
        F sq = S::zero();
        const F about = S::set1(mean[r]);
        for (int i = 0; i < kN; i += 16) {
          const F y = S::mul(S::load(x + (r0 + r) * kN + i), S::load(col_inv + i));
          const F d = S::sub(y, about);
          sq = S::add(sq, S::mul(d, d));
        }
        S::store(lanes + 16 * r, sq);
      }
      S::store(dev + r0, deviation(S::reduce_rows(lanes)));
    }
  }

  static void round_row(const float* x, const float* col_inv, float row_inv, float top, int bits,
                        std::byte* codes, float* step, float* zero) {
    F y[kVectors];
    for (int i = 0; i < kVectors; ++i)
      y[i] = S::mul(S::mul(S::load(x + 16 * i), S::load(col_inv + 16 * i)), S::set1(row_inv));
    F low = y[0], high = y[0];
    for (int i = 1; i < kVectors; ++i) {
      low = S::min(low, y[i]);
      high = S::max(high, y[i]);
    }
    const float lo = S::reduce_min(low), hi = S::reduce_max(high);
    const float width = (hi - lo) / top;
    *step = width > kMinStep ? width : kMinStep;
    *zero = lo;
    const F inv_step = S::set1(1.0f / *step);
    alignas(64) uint8_t q[kN];
    for (int i = 0; i < kVectors; ++i) {  // ties to even; NaN becomes code 0
      const F scaled = S::mul(S::sub(y[i], S::set1(lo)), inv_step);
      S::store(q + 16 * i, S::min(S::max(scaled, S::zero()), S::set1(top)));
    }
    auto* out = reinterpret_cast<uint8_t*>(codes);
    if (bits == 4) {
      for (int i = 0; i < kN / 2; ++i) out[i] = static_cast<uint8_t>(q[2 * i] | q[2 * i + 1] << 4);
    } else {
      for (int i = 0; i < kN / 4; ++i)
        out[i] = static_cast<uint8_t>(q[4 * i] | q[4 * i + 1] << 2 | q[4 * i + 2] << 4 |
                                      q[4 * i + 3] << 6);
    }
  }
};

template <class S>
void encode_tile_with(const TileRows& rows, const TileLayout& tile, std::byte* record) {
  constexpr int kN = kBlockTokens;
  alignas(64) float x[kN * kN];  // 64 KiB of stack: L2 holds it
  for (int t = 0; t < kN; t += 16)
    for (int d = 0; d < kN; d += 16) S::transpose(rows.k + t, d, x + d * kN + t, kN);
  TileEncoder<S>::encode(x, tile.k_bits, record + tile.k_codes, record + tile.k_step,
                         record + tile.k_zero, record + tile.k_token);
  for (int t = 0; t < kN; ++t)
    for (int d = 0; d < kN; d += 16) S::store(x + t * kN + d, S::load(rows.v[t] + d));
  TileEncoder<S>::encode(x, tile.v_bits, record + tile.v_codes, record + tile.v_step,
                         record + tile.v_zero, record + tile.v_channel);
}

}  // namespace kvarn::cpu
