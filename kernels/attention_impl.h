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

#include "kernels/kv_kernels.h"
#include "kernels/kv_math_impl.h"

namespace kvarn::cpu {

template <class S>
class BlockAttention {
  using F = typename S::F;
  using Codes = typename S::Codes;
  static constexpr int kN = kBlockTokens;
  static constexpr int kFused = 4;  // query vectors that share one unpacking of a block

 public:
  static void attend(const AttendShape& shape, const Block& block, const float* q, int n,
                     const Partials& out) {
    Scales scales;
    if (block.record != nullptr) load_scales(shape, block.record, scales);
    const int groups = (n + kFused - 1) / kFused;
    for (int g = 0, first = 0; g < groups; ++g) {  // sizes differ by at most one
      const int count = (n - first + groups - g - 1) / (groups - g);
      const float* group_q = q + first * shape.padded_dim;
      const Partials to{out.m + first, out.l + first, out.acc + first * shape.padded_dim};
      Block b = block;
      if (g > 0) b.next = nullptr;
      switch (count) {
        case 1:
          attend_group<1>(shape, b, scales, group_q, to);
          break;
        case 2:
          attend_group<2>(shape, b, scales, group_q, to);
          break;
        case 3:
          attend_group<3>(shape, b, scales, group_q, to);
          break;
        default:
          attend_group<4>(shape, b, scales, group_q, to);
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
      load_scales(shape, block.record, scales);
      alignas(64) float a[kMaxQueries * kN], sums[kMaxQueries * kN], beta[kMaxQueries],
          zeta[kMaxQueries];
      for (int i = 0; i < n; ++i) beta[i] = fold_query(scales, q + i * kN, a + i * kN);
      for (int c = 0; c < kN; c += 16 * S::kGemmVectors)
        gemm<kStart>(a, kN, n, expanded.k + c, kN, 0, kN, 1, sums + c, kN);
      for (int i = 0; i < n; ++i) {
        zeta[i] = fold_scores(scales, sums + i * kN, beta[i], weights + i * kN, out.m[i], out.l[i]);
      }
      const int chains = shape.tile.v_bits == 2 ? 2 : 1;
      for (int c = 0; c < kN; c += 16 * S::kGemmVectors) {
        gemm<kStart>(weights, kN, n, expanded.v + c, kN, 0, kN, chains, sums + c, kN);
        if (chains == 2) gemm<kAdd>(weights, kN, n, expanded.v + c, kN, 1, kN, 2, sums + c, kN);
      }
      for (int i = 0; i < n; ++i)
        fold_values(scales, shape.tile.v_bits, sums + i * kN, zeta[i], out.acc + i * kN);
      return;
    }
    const int stride = shape.padded_dim;
    const int most = limits == nullptr ? block.tokens : limits[n - 1];
    for (int c = 0; c < most; c += 16 * S::kGemmVectors)
      gemm<kTree>(q, stride, n, expanded.k + c, kN, 0, stride, 16, weights + c, kN);
    for (int i = 0; i < n; ++i) {
      const int limit = limits == nullptr ? block.tokens : limits[i];
      exact_softmax(shape.scale, weights + i * kN, limit, out.m[i], out.l[i]);
    }
    for (int i = 0; i < n; i += S::kGemmRows) {
      const int count = n - i < S::kGemmRows ? n - i : S::kGemmRows;
      const int common = limits == nullptr ? block.tokens : limits[i];
      for (int c = 0; c < stride; c += 16 * S::kGemmVectors) {
        const int width = stride - c;
        gemm<kStart>(weights + i * kN, kN, count, expanded.v + c, stride, 0, common, 1,
                     out.acc + i * stride + c, stride, width);
        if (limits == nullptr) continue;
        for (int j = i + 1; j < i + count; ++j) {
          if (limits[j] == common) continue;
          gemm<kContinue>(weights + j * kN, kN, 1, expanded.v + c, stride, common, limits[j], 1,
                          out.acc + j * stride + c, stride, width);
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

 private:
  // ---- coded blocks: the scales are folded into the query, the weights and the result ----
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

  // Blocks lie anywhere in memory, so the hardware cannot guess the next one. Step i of 128 of the
  // K pass, and of the V pass, asks for its share of it: into L2, since the lines that L1 can wait
  // for are too few to hide the latency of memory.
  static constexpr int kIntoL2 = 2;
  static inline __attribute__((always_inline)) void prefetch_k(const AttendShape& shape,
                                                               const Block* next, int i) {
    if (next == nullptr) return;
    if (next->record != nullptr) {
      __builtin_prefetch(next->record + 64 * i, 0, kIntoL2);
    } else if (i < next->tokens) {
      prefetch_row(next->rows->k[i], shape.head_dim);
    }
  }
  static inline __attribute__((always_inline)) void prefetch_v(const AttendShape& shape,
                                                               const Block* next, int i) {
    if (next == nullptr) return;
    if (next->record != nullptr) {
      for (int at = 64 * (kN + i); at < shape.tile.bytes; at += 64 * kN)
        __builtin_prefetch(next->record + at, 0, kIntoL2);
    } else if (i < next->tokens) {
      prefetch_row(next->rows->v[i], shape.head_dim);
    }
  }
  static inline __attribute__((always_inline)) void prefetch_row(const half* row, int head_dim) {
    const auto* line = reinterpret_cast<const std::byte*>(row);
    for (int at = 0; at < 2 * head_dim; at += 64) __builtin_prefetch(line + at, 0, kIntoL2);
  }

  // How many vectors of a row fit in registers for kQ queries: 16, 8, 4, 2 or 1.
  static constexpr int sweep(int queries) {
    int vectors = 1;
    while (vectors < 8 && 2 * vectors * queries <= S::kAccumulators) vectors *= 2;
    return vectors;
  }

  template <int kQ>
  static void attend_group(const AttendShape& shape, const Block& block, const Scales& scales,
                           const float* q, const Partials& out) {
    alignas(64) float w[kQ][kN];
    if (block.record != nullptr) {
      alignas(64) float a[kQ][kN], sums[kQ][kN];
      const auto* codes = reinterpret_cast<const uint8_t*>(block.record);
      float zeta[kQ], beta[kQ];
      for (int i = 0; i < kQ; ++i) beta[i] = fold_query(scales, q + i * kN, a[i]);
      nibble_products<kQ, &prefetch_k>(shape, codes + shape.tile.k_codes, a, sums, block.next);
      for (int i = 0; i < kQ; ++i)
        zeta[i] = fold_scores(scales, sums[i], beta[i], w[i], out.m[i], out.l[i]);
      if (shape.tile.v_bits == 2) {
        crumb_products<kQ>(shape, codes + shape.tile.v_codes, w, sums, block.next);
      } else {
        nibble_products<kQ, &prefetch_v>(shape, codes + shape.tile.v_codes, w, sums, block.next);
      }
      for (int i = 0; i < kQ; ++i)
        fold_values(scales, shape.tile.v_bits, sums[i], zeta[i], out.acc + i * kN);
      return;
    }
    if (shape.head_dim == 128) {
      row_scores<kQ, 8>(shape, block, q, w);
    } else {
      row_scores<kQ, 0>(shape, block, q, w);
    }
    for (int i = 0; i < kQ; ++i) exact_softmax(shape.scale, w[i], block.tokens, out.m[i], out.l[i]);
    row_values<kQ>(shape, block, w, out.acc);
  }

  // sums[i][16 v + j] = chain over the 128 rows r of a[i][r] * (code[r][8 j + v] - 8).
  template <int kQ, auto kPrefetch>
  static void nibble_products(const AttendShape& shape, const uint8_t* codes, const float (*a)[kN],
                              float (*sums)[kN], const Block* next) {
    constexpr int kV = sweep(kQ);
    for (int v0 = 0; v0 < 8; v0 += kV) {
      F acc[kQ][kV];
      for (int i = 0; i < kQ; ++i)
        for (int v = 0; v < kV; ++v) acc[i][v] = S::zero();
      for (int r = 0; r < kN; ++r) {
        Codes c = S::load_nibbles(codes + 64 * r);
        if constexpr (kV < 8) c = S::skip(c, 4 * v0);
        if (v0 == 0) kPrefetch(shape, next, r);
#pragma GCC unroll 8
        for (int v = 0; v < kV; ++v) {
          const F x = S::nibble(c);
          c = S::template shift<4>(c);
#pragma GCC unroll 4
          for (int i = 0; i < kQ; ++i) acc[i][v] = S::fma(x, S::set1(a[i][r]), acc[i][v]);
        }
      }
      for (int i = 0; i < kQ; ++i)
        for (int v = 0; v < kV; ++v) S::store(sums[i] + 16 * (v0 + v), acc[i][v]);
    }
  }

  // sums[i][8 v + j] = sum over tokens t of w[i][t] * (code[t][16 j + v] - 2): even + odd tokens.
  template <int kQ>
  static void crumb_products(const AttendShape& shape, const uint8_t* codes, const float (*w)[kN],
                             float (*sums)[kN], const Block* next) {
    constexpr int kV = sweep(kQ) < 2 ? 2 : sweep(kQ);
    for (int v0 = 0; v0 < 16; v0 += kV) {
      F acc[kQ][kV];
      for (int i = 0; i < kQ; ++i)
        for (int v = 0; v < kV; ++v) acc[i][v] = S::zero();
      for (int t = 0; t < kN; t += 2) {
        Codes c = S::skip(S::load_crumbs(codes + 32 * t), 2 * v0);
        if (v0 == 0) {
          prefetch_v(shape, next, t);
          prefetch_v(shape, next, t + 1);
        }
        F both[kQ];
        for (int i = 0; i < kQ; ++i) both[i] = S::pair(w[i] + t);
#pragma GCC unroll 8
        for (int v = 0; v < kV; ++v) {
          const F x = S::crumb(c);
          c = S::template shift<2>(c);
#pragma GCC unroll 4
          for (int i = 0; i < kQ; ++i) acc[i][v] = S::fma(x, both[i], acc[i][v]);
        }
      }
      for (int i = 0; i < kQ; ++i)
        for (int v = 0; v < kV; v += 2)
          S::store(sums[i] + 8 * (v0 + v), S::add_halves(acc[i][v], acc[i][v + 1]));
    }
  }

  // ---- exact blocks ----

  // x[0, 16) of a row whose remaining length is `left`: zeros after the end.
  static F load_row(const half* x, int left) {
    if (left >= 16) return S::load(x);
    alignas(32) half padded[16] = {};
    __builtin_memcpy(padded, x, sizeof(half) * static_cast<size_t>(left));
    return S::load(padded);
  }

  // w[i][t] = q_i . k_t. kVectors: head_dim / 16, or 0 for any head_dim.
  template <int kQ, int kVectors>
  static void row_scores(const AttendShape& shape, const Block& block, const float* q,
                         float (*w)[kN]) {
    const int vectors = kVectors > 0 ? kVectors : shape.padded_dim / 16;
    alignas(64) float lanes[kQ][16 * 16];
    for (int t0 = 0; t0 < block.tokens; t0 += 16) {
      const int count = block.tokens - t0 < 16 ? block.tokens - t0 : 16;
      for (int r = 0; r < count; ++r) {
        const half* k = block.rows->k[t0 + r];
        prefetch_k(shape, block.next, t0 + r);
        F acc[kQ];
        for (int i = 0; i < kQ; ++i) acc[i] = S::zero();
#pragma GCC unroll 8
        for (int v = 0; v < vectors; ++v) {
          F x;
          if constexpr (kVectors > 0) {
            x = S::load(k + 16 * v);
          } else {
            x = load_row(k + 16 * v, shape.head_dim - 16 * v);
          }
#pragma GCC unroll 4
          for (int i = 0; i < kQ; ++i)
            acc[i] = S::fma(x, S::load(q + i * 16 * vectors + 16 * v), acc[i]);
        }
        for (int i = 0; i < kQ; ++i) S::store(lanes[i] + 16 * r, acc[i]);
      }
      for (int i = 0; i < kQ; ++i) {
        for (int r = count; r < 16; ++r) S::store(lanes[i] + 16 * r, S::zero());
        S::store(w[i] + t0, S::reduce_rows(lanes[i]));
      }
    }
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

  template <int kQ>
  static void row_values(const AttendShape& shape, const Block& block, const float (*w)[kN],
                         float* acc) {
    constexpr int kV = sweep(kQ);
    const int stride = shape.padded_dim;
    int v0 = 0;
    for (; 16 * (v0 + kV) <= shape.head_dim; v0 += kV)
      value_sweep<kQ, kV, false>(shape, block, w, 16 * v0, acc, stride);
    for (; 16 * v0 < shape.head_dim; ++v0)
      value_sweep<kQ, 1, true>(shape, block, w, 16 * v0, acc, stride);
  }

  // Channels d0 .. d0 + 16 kV of acc; the last of them may lie past head_dim if kTail.
  template <int kQ, int kV, bool kTail>
  static void value_sweep(const AttendShape& shape, const Block& block, const float (*w)[kN],
                          int d0, float* out, int stride) {
    F acc[kQ][kV];
    for (int i = 0; i < kQ; ++i)
      for (int v = 0; v < kV; ++v) acc[i][v] = S::zero();
    for (int t = 0; t < block.tokens; ++t) {
      const half* row = block.rows->v[t] + d0;
      if (d0 == 0) prefetch_v(shape, block.next, t);
#pragma GCC unroll 8
      for (int v = 0; v < kV; ++v) {
        F x;
        if constexpr (kTail) {
          x = load_row(row, shape.head_dim - d0);
        } else {
          x = S::load(row + 16 * v);
        }
#pragma GCC unroll 4
        for (int i = 0; i < kQ; ++i) acc[i][v] = S::fma(x, S::set1(w[i][t]), acc[i][v]);
      }
    }
    for (int i = 0; i < kQ; ++i)
      for (int v = 0; v < kV; ++v) S::store(out + i * stride + d0 + 16 * v, acc[i][v]);
  }

  // ---- blocks unpacked for many queries ----

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
        S::store(out.v + t * stride + d, load_row(block.rows->v[t] + d, shape.head_dim - d));
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

  // c[q][n] = chain over k = first, first + step, ... < end of a[q][k] * b[k][n], from 0 (kStart),
  // from c (kContinue), or added to c (kAdd). kTree: chains first + j, j in [0, 16), with step 16,
  // added in the tree of kv_simd_avx512.h.
  enum Mode { kStart, kContinue, kAdd, kTree };

  // Columns [0, 16 kGemmVectors), or fewer: `width` columns in steps of 16.
  template <Mode kMode>
  static void gemm(const float* a, int lda, int n, const float* b, int ldb, int first, int end,
                   int step, float* c, int ldc, int width = 16 * S::kGemmVectors) {
    if (width >= 16 * S::kGemmVectors) {
      gemm_rows<kMode, S::kGemmVectors>(a, lda, n, b, ldb, first, end, step, c, ldc);
      return;
    }
    for (int v = 0; v < width; v += 16)
      gemm_rows<kMode, 1>(a, lda, n, b + v, ldb, first, end, step, c + v, ldc);
  }
  template <Mode kMode, int kV>
  static void gemm_rows(const float* a, int lda, int n, const float* b, int ldb, int first, int end,
                        int step, float* c, int ldc) {
    int i = 0;
    for (; i + S::kGemmRows <= n; i += S::kGemmRows)
      gemm_block<kMode, S::kGemmRows, kV>(a + i * lda, lda, b, ldb, first, end, step, c + i * ldc,
                                          ldc);
    if constexpr (S::kGemmRows > 2) {
      for (; i + 2 <= n; i += 2)
        gemm_block<kMode, 2, kV>(a + i * lda, lda, b, ldb, first, end, step, c + i * ldc, ldc);
    }
    for (; i < n; ++i)
      gemm_block<kMode, 1, kV>(a + i * lda, lda, b, ldb, first, end, step, c + i * ldc, ldc);
  }

  template <int kQ, int kV>
  static inline __attribute__((always_inline)) void chain(const float* a, int lda, const float* b,
                                                          int ldb, int first, int end, int step,
                                                          F (&acc)[kQ][kV]) {
    for (int k = first; k < end; k += step) {
      F x[kV];
#pragma GCC unroll 4
      for (int v = 0; v < kV; ++v) x[v] = S::load(b + k * ldb + 16 * v);
#pragma GCC unroll 8
      for (int i = 0; i < kQ; ++i) {
        const F y = S::set1(a[i * lda + k]);
#pragma GCC unroll 4
        for (int v = 0; v < kV; ++v) acc[i][v] = S::fma(x[v], y, acc[i][v]);
      }
    }
  }

  template <Mode kMode, int kQ, int kV>
  static void gemm_block(const float* a, int lda, const float* b, int ldb, int first, int end,
                         int step, float* c, int ldc) {
    F acc[kQ][kV];
    if constexpr (kMode == kTree) {
      alignas(64) float stack[4][kQ * kV * 16];  // sums that wait for their sibling
      int depth = 0;
      for (int leaf = 0; leaf < 16; ++leaf) {
        const int lane = (leaf & 1) << 3 | (leaf & 2) << 1 | (leaf & 4) >> 1 | (leaf & 8) >> 3;
        for (int i = 0; i < kQ; ++i)
          for (int v = 0; v < kV; ++v) acc[i][v] = S::zero();
        chain<kQ, kV>(a, lda, b, ldb, lane, end, 16, acc);
        for (int done = leaf; (done & 1) != 0; done >>= 1) {
          --depth;
          for (int i = 0; i < kQ; ++i)
            for (int v = 0; v < kV; ++v)
              acc[i][v] = S::add(S::load(stack[depth] + 16 * (i * kV + v)), acc[i][v]);
        }
        if (leaf == 15) break;
        for (int i = 0; i < kQ; ++i)
          for (int v = 0; v < kV; ++v) S::store(stack[depth] + 16 * (i * kV + v), acc[i][v]);
        ++depth;
      }
    } else {
      for (int i = 0; i < kQ; ++i)
        for (int v = 0; v < kV; ++v)
          acc[i][v] = kMode == kContinue ? S::load(c + i * ldc + 16 * v) : S::zero();
      chain<kQ, kV>(a, lda, b, ldb, first, end, step, acc);
    }
    for (int i = 0; i < kQ; ++i) {
      for (int v = 0; v < kV; ++v) {
        float* to = c + i * ldc + 16 * v;
        S::store(to, kMode == kAdd ? S::add(S::load(to), acc[i][v]) : acc[i][v]);
      }
    }
  }
};

}  // namespace kvarn::cpu
