// linear() on AVX-512: fp32 activations against bf16, f16 or f32 weights, and bf16 activations
// against bf16 weights where the processor multiplies those (AVX512_BF16: pairs are added to the
// fp32 accumulator by the instruction, subnormals count as zero).
#include <immintrin.h>

#include "kernels/core/dtype.h"
#include "kernels/linear_cpu.h"

#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,avx2,fma,f16c")

#include "kernels/linear_vector_cpu.h"

namespace kvarn::cpu {
namespace {

struct Avx512Base {
  using Acc = __m512;
  static constexpr int kRows = 3, kColumns = 8;  // 24 accumulators + 3 x + 1 w of 32 registers

  static KVARN_ALWAYS Acc zero() { return _mm512_setzero_ps(); }
  static KVARN_ALWAYS __m128 fold(__m512 v) {
    const __m256 s8 = _mm256_add_ps(_mm512_castps512_ps256(v), _mm512_extractf32x8_ps(v, 1));
    return _mm_add_ps(_mm256_castps256_ps128(s8), _mm256_extractf128_ps(s8, 1));
  }
  static KVARN_ALWAYS __m128 reduce4(Acc a, Acc b, Acc c, Acc d) {
    const __m128 a4 = fold(a), b4 = fold(b), c4 = fold(c), d4 = fold(d);
    const __m128 ab = _mm_add_ps(_mm_movelh_ps(a4, b4), _mm_movehl_ps(b4, a4));
    const __m128 cd = _mm_add_ps(_mm_movelh_ps(c4, d4), _mm_movehl_ps(d4, c4));
    return _mm_add_ps(_mm_shuffle_ps(ab, cd, 0x88), _mm_shuffle_ps(ab, cd, 0xdd));
  }
};

struct Avx512F32Base : Avx512Base {
  using X = float;
  using XReg = __m512;
  static KVARN_ALWAYS XReg load_x(const X* x, int phase) { return _mm512_loadu_ps(x + 16 * phase); }
  static KVARN_ALWAYS Acc multiply_add(XReg w, XReg x, Acc acc) {
    return _mm512_fmadd_ps(w, x, acc);
  }
};

// 32 bf16 are 16 words: the low halves (even elements) and the high halves (odd ones) widen with
// one instruction each, so x is packed evens first.
struct Avx512Bf16Weights : Avx512F32Base {
  using W = bf16;
  static constexpr int kStep = 32, kPhases = 2;
  static KVARN_ALWAYS XReg load_w(const W* w, int phase) {
    const __m512i words = _mm512_loadu_si512(w);
    return _mm512_castsi512_ps(
        phase == 0 ? _mm512_slli_epi32(words, 16)
                   : _mm512_and_si512(words, _mm512_set1_epi32(static_cast<int>(0xffff0000u))));
  }
  static KVARN_ALWAYS void pack_step(const float* from, X* to) {
    const __m512i even =
        _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
    const __m512i odd = _mm512_add_epi32(even, _mm512_set1_epi32(1));
    const __m512 low = _mm512_loadu_ps(from), high = _mm512_loadu_ps(from + 16);
    _mm512_storeu_ps(to, _mm512_permutex2var_ps(low, even, high));
    _mm512_storeu_ps(to + 16, _mm512_permutex2var_ps(low, odd, high));
  }
};

struct Avx512F32Weights : Avx512F32Base {
  using W = float;
  static constexpr int kStep = 16, kPhases = 1;
  static KVARN_ALWAYS XReg load_w(const W* w, int /*phase*/) { return _mm512_loadu_ps(w); }
  static KVARN_ALWAYS void pack_step(const float* from, X* to) {
    _mm512_storeu_ps(to, _mm512_loadu_ps(from));
  }
};

struct Avx512F16Weights : Avx512F32Weights {
  using W = half;
  static KVARN_ALWAYS XReg load_w(const W* w, int /*phase*/) {
    return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(w)));
  }
};

struct Avx512Bf16Dot : Avx512Base {
  using W = bf16;
  using X = bf16;
  using XReg = __m512bh;
  static constexpr int kStep = 32, kPhases = 1;
  static KVARN_ALWAYS XReg load(const bf16* p) {
    const __m512i bits = _mm512_loadu_si512(p);
    return reinterpret_cast<__m512bh>(bits);
  }
  static KVARN_ALWAYS XReg load_x(const X* x, int /*phase*/) { return load(x); }
  static KVARN_ALWAYS XReg load_w(const W* w, int /*phase*/) { return load(w); }
  static KVARN_ALWAYS Acc multiply_add(XReg w, XReg x, Acc acc) {
    return _mm512_dpbf16_ps(acc, w, x);
  }
  static KVARN_ALWAYS void pack_step(const float* from, X* to) {
    const __m512bh pairs = _mm512_cvtne2ps_pbh(_mm512_loadu_ps(from + 16), _mm512_loadu_ps(from));
    _mm512_storeu_si512(to, reinterpret_cast<__m512i>(pairs));
  }
};

constexpr LinearKernel kBf16Dot = make_kernel<Avx512Bf16Dot>("avx512_bf16");
constexpr LinearKernel kBf16 = make_kernel<Avx512Bf16Weights>("avx512, bf16 weights");
constexpr LinearKernel kF16 = make_kernel<Avx512F16Weights>("avx512, f16 weights");
constexpr LinearKernel kF32 = make_kernel<Avx512F32Weights>("avx512, f32 weights");

}  // namespace

#pragma GCC pop_options

const LinearKernel& linear_kernel_avx512_bf16() { return kBf16Dot; }

const LinearKernel& linear_kernel_avx512(DType dtype) {
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
