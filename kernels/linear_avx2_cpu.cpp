// linear() on AVX2 + FMA + F16C: fp32 activations against bf16, f16 or f32 weights.
#include <immintrin.h>

#include "kernels/core/dtype.h"
#include "kernels/linear_cpu.h"

#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")

#include "kernels/linear_vector_cpu.h"

namespace kvarn::cpu {
namespace {

struct Avx2Base {
  using Acc = __m256;
  using X = float;
  using XReg = __m256;
  static constexpr int kRows = 3, kColumns = 4;  // 12 accumulators + 3 x + 1 w of 16 registers

  static KVARN_ALWAYS Acc zero() { return _mm256_setzero_ps(); }
  static KVARN_ALWAYS XReg load_x(const X* x, int phase) { return _mm256_loadu_ps(x + 8 * phase); }
  static KVARN_ALWAYS Acc multiply_add(XReg w, XReg x, Acc acc) {
    return _mm256_fmadd_ps(w, x, acc);
  }
  static KVARN_ALWAYS __m128 fold(__m256 v) {
    return _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
  }
  static KVARN_ALWAYS __m128 reduce4(Acc a, Acc b, Acc c, Acc d) {
    const __m128 a4 = fold(a), b4 = fold(b), c4 = fold(c), d4 = fold(d);
    const __m128 ab = _mm_add_ps(_mm_movelh_ps(a4, b4), _mm_movehl_ps(b4, a4));
    const __m128 cd = _mm_add_ps(_mm_movelh_ps(c4, d4), _mm_movehl_ps(d4, c4));
    return _mm_add_ps(_mm_shuffle_ps(ab, cd, 0x88), _mm_shuffle_ps(ab, cd, 0xdd));
  }
};

// 16 bf16 are 8 words: the low halves (even elements) and the high halves (odd ones) widen with one
// instruction each, so x is packed evens first.
struct Avx2Bf16Weights : Avx2Base {
  using W = bf16;
  static constexpr int kStep = 16, kPhases = 2;
  static KVARN_ALWAYS XReg load_w(const W* w, int phase) {
    const __m256i words = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(w));
    return _mm256_castsi256_ps(
        phase == 0 ? _mm256_slli_epi32(words, 16)
                   : _mm256_and_si256(words, _mm256_set1_epi32(static_cast<int>(0xffff0000u))));
  }
  static KVARN_ALWAYS void pack_step(const float* from, X* to) {
    const __m256 low = _mm256_loadu_ps(from), high = _mm256_loadu_ps(from + 8);
    const __m256i order = _mm256_setr_epi32(0, 1, 4, 5, 2, 3, 6, 7);  // undoes the 128-bit lanes
    const __m256 even = _mm256_shuffle_ps(low, high, 0x88),
                 odd = _mm256_shuffle_ps(low, high, 0xdd);
    _mm256_storeu_ps(to, _mm256_permutevar8x32_ps(even, order));
    _mm256_storeu_ps(to + 8, _mm256_permutevar8x32_ps(odd, order));
  }
};

struct Avx2F32Weights : Avx2Base {
  using W = float;
  static constexpr int kStep = 8, kPhases = 1;
  static KVARN_ALWAYS XReg load_w(const W* w, int /*phase*/) { return _mm256_loadu_ps(w); }
  static KVARN_ALWAYS void pack_step(const float* from, X* to) {
    _mm256_storeu_ps(to, _mm256_loadu_ps(from));
  }
};

struct Avx2F16Weights : Avx2F32Weights {
  using W = half;
  static KVARN_ALWAYS XReg load_w(const W* w, int /*phase*/) {
    return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(w)));
  }
};

constexpr LinearKernel kBf16 = make_kernel<Avx2Bf16Weights>("avx2, bf16 weights");
constexpr LinearKernel kF16 = make_kernel<Avx2F16Weights>("avx2, f16 weights");
constexpr LinearKernel kF32 = make_kernel<Avx2F32Weights>("avx2, f32 weights");

}  // namespace

#pragma GCC pop_options

const LinearKernel& linear_kernel_avx2(DType dtype) {
  switch (dtype) {
    case DType::kBF16:
      return kBf16;
    case DType::kF16:
      return kF16;
    case DType::kF32:
      return kF32;
    default:
      break;
  }
  check_failed(__FILE__, __LINE__, "dtype", "linear weights are bf16, f16 or f32");
}

}  // namespace kvarn::cpu
