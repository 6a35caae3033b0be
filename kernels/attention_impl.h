// Attention of query vectors to one block with the vectors of S (kv_simd_*.h).
//
// The order of operations, which every path below keeps (chains are fused multiply-adds from 0):
//   coded K   score[t]: one chain over channels 0..127 of (q*step)[d] * (code[d][t] - 8)
//   coded V   acc[d]: one chain over tokens of (p*step)[t] * (code[t][d] - half); 2-bit codes: one
//             chain over the even tokens plus one over the odd ones
//   exact K   score[t]: chain j over channels j, j+16, ...; the 16 chains are added in the tree of
//             kv_simd_avx512.h
//   exact V   acc[d]: one chain over tokens
// So a row's result does not depend on how many queries are processed together.
// Folding of the scales: docs/kvarn.md, from arXiv 2606.03458.
#pragma once

#include "kernels/attention_few_impl.h"
#include "kernels/attention_gemm_impl.h"
#include "kernels/attention_softmax_impl.h"

namespace kvarn::cpu {

template <class S>
class BlockAttention {
  using F = typename S::F;
  using Codes = typename S::Codes;
  using Softmax = BlockSoftmax<S>;
  using Scales = typename Softmax::Scales;
  using Gemm = ChainGemm<S>;
  static constexpr int kN = kBlockTokens;
  static constexpr int kFused = 4;  // query vectors that share one unpacking of a block

 public:
  static void attend(const AttendShape& shape, const Block& block, const float* q, int n,
                     const Partials& out) {
    Scales scales;
    if (block.record != nullptr) Softmax::load_scales(shape, block.record, scales);
    const int groups = (n + kFused - 1) / kFused;
    for (int g = 0, first = 0; g < groups; ++g) {  // sizes differ by at most one
      const int count = (n - first + groups - g - 1) / (groups - g);
      const float* group_q = q + first * shape.padded_dim;
      const Partials to{out.m + first, out.l + first, out.acc + first * shape.padded_dim};
      Block b = block;
      if (g > 0) b.next = nullptr;
      switch (count) {
        case 1:
          FewQueries<S>::template attend<1>(shape, b, scales, group_q, to);
          break;
        case 2:
          FewQueries<S>::template attend<2>(shape, b, scales, group_q, to);
          break;
        case 3:
          FewQueries<S>::template attend<3>(shape, b, scales, group_q, to);
          break;
        default:
          FewQueries<S>::template attend<4>(shape, b, scales, group_q, to);
      }
      first += count;
    }
  }

  static void expand(const AttendShape& shape, const Block& block, const ExpandedBlock& out) {
    if (block.record != nullptr) {
      expand_record(shape.tile, block.record, out);
    } else {
      expand_rows(shape, block, out);
    }
  }

  static void attend_expanded(const AttendShape& shape, const Block& block,
                              const ExpandedBlock& expanded, const float* q, int n,
                              const int* limits, const Partials& out) {
    alignas(64) float weights[kMaxQueries * kN];  // scores, then softmax weights
    if (block.record != nullptr) {
      Scales scales;
      Softmax::load_scales(shape, block.record, scales);
      alignas(64) float a[kMaxQueries * kN], sums[kMaxQueries * kN], beta[kMaxQueries],
          zeta[kMaxQueries];
      for (int i = 0; i < n; ++i) beta[i] = Softmax::fold_query(scales, q + i * kN, a + i * kN);
      for (int c = 0; c < kN; c += 16 * S::kGemmVectors)
        Gemm::template run<Gemm::kStart>(a, kN, n, expanded.k + c, kN, 0, kN, 1, sums + c, kN);
      for (int i = 0; i < n; ++i) {
        zeta[i] = Softmax::fold_scores(scales, sums + i * kN, beta[i], weights + i * kN, out.m[i],
                                       out.l[i]);
      }
      const int chains = shape.tile.v_bits == 2 ? 2 : 1;
      for (int c = 0; c < kN; c += 16 * S::kGemmVectors) {
        Gemm::template run<Gemm::kStart>(weights, kN, n, expanded.v + c, kN, 0, kN, chains,
                                         sums + c, kN);
        if (chains == 2)
          Gemm::template run<Gemm::kAdd>(weights, kN, n, expanded.v + c, kN, 1, kN, 2, sums + c,
                                         kN);
      }
      for (int i = 0; i < n; ++i)
        Softmax::fold_values(scales, shape.tile.v_bits, sums + i * kN, zeta[i], out.acc + i * kN);
      return;
    }
    const int stride = shape.padded_dim;
    const int most = limits == nullptr ? block.tokens : limits[n - 1];
    for (int c = 0; c < most; c += 16 * S::kGemmVectors)
      Gemm::template run<Gemm::kTree>(q, stride, n, expanded.k + c, kN, 0, stride, 16, weights + c,
                                      kN);
    for (int i = 0; i < n; ++i) {
      const int limit = limits == nullptr ? block.tokens : limits[i];
      Softmax::exact_softmax(shape.scale, weights + i * kN, limit, out.m[i], out.l[i]);
    }
    for (int i = 0; i < n; i += S::kGemmRows) {
      const int count = n - i < S::kGemmRows ? n - i : S::kGemmRows;
      const int common = limits == nullptr ? block.tokens : limits[i];
      for (int c = 0; c < stride; c += 16 * S::kGemmVectors) {
        const int width = stride - c;
        Gemm::template run<Gemm::kStart>(weights + i * kN, kN, count, expanded.v + c, stride, 0,
                                         common, 1, out.acc + i * stride + c, stride, width);
        if (limits == nullptr) continue;
        for (int j = i + 1; j < i + count; ++j) {
          if (limits[j] == common) continue;
          Gemm::template run<Gemm::kContinue>(weights + j * kN, kN, 1, expanded.v + c, stride,
                                              common, limits[j], 1, out.acc + j * stride + c,
                                              stride, width);
        }
      }
    }
  }

  static void merge(int n, int padded_dim, const Partials& from, const Partials& into) {
    for (int i = 0; i < n; ++i) {
      const float m0 = into.m[i], m1 = from.m[i];
      const float top = m0 > m1 ? m0 : m1;
      const F a = exp_of<S>(S::set1(m0 - top)), b = exp_of<S>(S::set1(m1 - top));
      float *x = into.acc + i * padded_dim, *y = from.acc + i * padded_dim;
      for (int d = 0; d < padded_dim; d += 16)
        S::store(x + d, S::fma(S::load(y + d), b, S::mul(S::load(x + d), a)));
      alignas(64) float l[16];
      S::store(l, S::fma(S::set1(from.l[i]), b, S::mul(S::set1(into.l[i]), a)));
      into.m[i] = top;
      into.l[i] = l[0];
    }
  }

  static void finish(const AttendShape& shape, bool rotate, const float* acc, float l, float* out) {
    if (!rotate) {
      for (int d = 0; d < shape.head_dim; ++d) out[d] = acc[d] / l;
      return;
    }
    constexpr int kVectors = kN / 16;
    F x[kVectors];
    for (int i = 0; i < kVectors; ++i) {
      x[i] = S::div(S::load(acc + 16 * i), S::set1(l));
      x[i] = S::template butterfly<2>(S::template butterfly<1>(x[i]));
      x[i] = S::template butterfly<8>(S::template butterfly<4>(x[i]));
    }
    for (int half = 1; half < kVectors; half *= 2) {
      for (int i = 0; i < kVectors; ++i) {
        if ((i & half) != 0) continue;
        const F a = x[i], b = x[i + half];
        x[i] = S::add(a, b);
        x[i + half] = S::sub(a, b);
      }
    }
    for (int i = 0; i < kVectors; ++i)
      S::store(out + 16 * i, S::mul(x[i], S::set1(0.08838834764831845f)));  // 1 / sqrt(128)
  }

 private:
  static void expand_record(const TileLayout& tile, const std::byte* record,
                            const ExpandedBlock& out) {
    const auto* codes = reinterpret_cast<const uint8_t*>(record);
    expand_nibbles(codes + tile.k_codes, out.k);
    if (tile.v_bits == 4) {
      expand_nibbles(codes + tile.v_codes, out.v);
      return;
    }
    for (int t = 0; t < kN; t += 2) {
      Codes c = S::load_crumbs(codes + tile.v_codes + 32 * t);
      for (int v = 0; v < 16; v += 2) {
        const F x = S::crumb(c);
        const F y = S::crumb(S::template shift<2>(c));
        c = S::template shift<4>(c);
        alignas(64) float a[16], b[16];
        S::store(a, x);
        S::store(b, y);
        for (int i = 0; i < 2; ++i) {  // lanes 8i.. belong to token t + i
          float* to = out.v + (t + i) * kN + 8 * v;
          __builtin_memcpy(to, a + 8 * i, 32);
          __builtin_memcpy(to + 8, b + 8 * i, 32);
        }
      }
    }
  }
  static void expand_nibbles(const uint8_t* codes, float* to) {
    for (int r = 0; r < kN; ++r) {
      Codes c = S::load_nibbles(codes + 64 * r);
      for (int v = 0; v < 8; ++v) {
        S::store(to + r * kN + 16 * v, S::nibble(c));
        c = S::template shift<4>(c);
      }
    }
  }

  static void expand_rows(const AttendShape& shape, const Block& block, const ExpandedBlock& out) {
    const int stride = shape.padded_dim;
    for (int t = 0; t < block.tokens; ++t)
      for (int d = 0; d < shape.head_dim; d += 16)
        S::store(out.v + t * stride + d,
                 FewQueries<S>::load_row(block.rows->v[t] + d, shape.head_dim - d));
    for (int t0 = 0; t0 < block.tokens; t0 += 16) {
      const half* rows[16];
      for (int r = 0; r < 16; ++r)  // columns past the last token repeat it and are never read
        rows[r] = block.rows->k[t0 + r < block.tokens ? t0 + r : block.tokens - 1];
      int d = 0;
      for (; d + 16 <= shape.head_dim; d += 16) S::transpose(rows, d, out.k + d * kN + t0, kN);
      if (d == stride) continue;
      half padded[16][16] = {};
      for (int r = 0; r < 16; ++r) {
        __builtin_memcpy(padded[r], rows[r] + d,
                         sizeof(half) * static_cast<size_t>(shape.head_dim - d));
        rows[r] = padded[r];
      }
      S::transpose(rows, 0, out.k + d * kN + t0, kN);
    }
  }
};

}  // namespace kvarn::cpu
