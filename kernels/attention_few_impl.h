// Attention of up to four query vectors to one block read in place: codes are unpacked in
// registers, rows converted, and shared by the queries. The order of operations is that of
// attention_impl.h.
#pragma once

#include "kernels/attention_softmax_impl.h"

namespace kvarn::cpu {

template <class S>
class FewQueries {
  using F = typename S::F;
  using Codes = typename S::Codes;
  using Softmax = BlockSoftmax<S>;
  using Scales = typename Softmax::Scales;
  static constexpr int kN = kBlockTokens;

 public:
  template <int kQ>
  static void attend(const AttendShape& shape, const Block& block, const Scales& scales,
                     const float* q, const Partials& out) {
    alignas(64) float w[kQ][kN];
    if (block.record != nullptr) {
      alignas(64) float a[kQ][kN], sums[kQ][kN];
      const auto* codes = reinterpret_cast<const uint8_t*>(block.record);
      float zeta[kQ], beta[kQ];
      for (int i = 0; i < kQ; ++i) beta[i] = Softmax::fold_query(scales, q + i * kN, a[i]);
      nibble_products<kQ, &prefetch_k>(shape, codes + shape.tile.k_codes, a, sums, block.next);
      for (int i = 0; i < kQ; ++i)
        zeta[i] = Softmax::fold_scores(scales, sums[i], beta[i], w[i], out.m[i], out.l[i]);
      if (shape.tile.v_bits == 2) {
        crumb_products<kQ>(shape, codes + shape.tile.v_codes, w, sums, block.next);
      } else {
        nibble_products<kQ, &prefetch_v>(shape, codes + shape.tile.v_codes, w, sums, block.next);
      }
      for (int i = 0; i < kQ; ++i)
        Softmax::fold_values(scales, shape.tile.v_bits, sums[i], zeta[i], out.acc + i * kN);
      return;
    }
    if (shape.head_dim == 128) {
      row_scores<kQ, 8>(shape, block, q, w);
    } else {
      row_scores<kQ, 0>(shape, block, q, w);
    }
    for (int i = 0; i < kQ; ++i)
      Softmax::exact_softmax(shape.scale, w[i], block.tokens, out.m[i], out.l[i]);
    row_values<kQ>(shape, block, w, out.acc);
  }

  // x[0, 16) of a row whose remaining length is `left`: zeros after the end.
  static F load_row(const half* x, int left) {
    if (left >= 16) return S::load(x);
    alignas(32) half padded[16] = {};
    __builtin_memcpy(padded, x, sizeof(half) * static_cast<size_t>(left));
    return S::load(padded);
  }

 private:
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

  // How many vectors of a row fit in registers for so many queries: 8, 4, 2 or 1.
  static constexpr int sweep(int queries) {
    int vectors = 1;
    while (vectors < 8 && 2 * vectors * queries <= S::kAccumulators) vectors *= 2;
    return vectors;
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
};

}  // namespace kvarn::cpu
