// The products of many query vectors with an unpacked block, in the orders of attention_impl.h:
// every output element is a chain of fused multiply-adds (or a tree of chains) of its own, so tiles
// of any size give the same bits.
#pragma once

namespace kvarn::cpu {

template <class S>
class ChainGemm {
  using F = typename S::F;

 public:
  // c[q][n] = chain over k = first, first + step, ... < end of a[q][k] * b[k][n], from 0 (kStart),
  // from c (kContinue), or added to c (kAdd). kTree: chains first + j, j in [0, 16), with step 16,
  // added in the tree of kv_simd_avx512.h.
  enum Mode { kStart, kContinue, kAdd, kTree };

  // Columns [0, 16 kGemmVectors), or fewer: `width` columns in steps of 16.
  template <Mode kMode>
  static void run(const float* a, int lda, int n, const float* b, int ldb, int first, int end,
                  int step, float* c, int ldc, int width = 16 * S::kGemmVectors) {
    if (width >= 16 * S::kGemmVectors) {
      gemm_rows<kMode, S::kGemmVectors>(a, lda, n, b, ldb, first, end, step, c, ldc);
      return;
    }
    for (int v = 0; v < width; v += 16)
      gemm_rows<kMode, 1>(a, lda, n, b + v, ldb, first, end, step, c + v, ldc);
  }

 private:
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
