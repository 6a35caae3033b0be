// QK norm, rotary embedding and the Hadamard rotation in one pass over a row's heads, in registers
// and L1. The rotation is a fast Walsh-Hadamard transform in natural order; its factor
// 1/sqrt(head_dim) is applied last (KVarN, arXiv 2606.03458).
#include <algorithm>
#include <cmath>
#include <cstring>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "kernels/hadamard.h"
#include "kernels/ops_cpu.h"
#include "kernels/simd_cpu.h"

namespace kvarn::cpu {
namespace {

constexpr int kMaxHeadDim = 512;

template <typename W>
void norm_head(float* x, const W* weight, int head_dim, float eps) {
  using simd::f32x16;
  using simd::kLanes;
  f32x16 squares = {};
  int i = 0;
  for (; i + kLanes <= head_dim; i += kLanes) {
    const f32x16 v = simd::load(x + i);
    squares += v * v;
  }
  if (i < head_dim) {
    const f32x16 v = simd::load_first(x + i, head_dim - i);
    squares += v * v;
  }
  const float scale = 1.f / std::sqrt(simd::sum(squares) / static_cast<float>(head_dim) + eps);
  for (i = 0; i < head_dim; ++i) x[i] = x[i] * scale * to_float(weight[i]);
}

void norm_head(float* x, Tensor weight, int head_dim, float eps) {
  switch (weight.dtype()) {
    case DType::kBF16:
      return norm_head(x, weight.data<bf16>(), head_dim, eps);
    case DType::kF16:
      return norm_head(x, weight.data<half>(), head_dim, eps);
    case DType::kF32:
      return norm_head(x, weight.data<float>(), head_dim, eps);
    default:
      CHECK(false, "QK norm weights are bf16, f16 or f32");
  }
}

// Pairs are (i, i + head_dim/2), as Qwen lays them out.
void rope_head(float* x, const float* cosines, const float* sines, int half_dim) {
  for (int i = 0; i < half_dim; ++i) {
    const float a = x[i], b = x[i + half_dim];
    x[i] = a * cosines[i] - b * sines[i];
    x[i + half_dim] = b * cosines[i] + a * sines[i];
  }
}

enum class Part { kQuery, kKey, kValue };

template <Part kPart>
void transform_head(const QkvParams& p, const float* source, int64_t position, float* x) {
  std::copy_n(source, p.head_dim, x);
  if constexpr (kPart != Part::kValue) {
    const Tensor& norm = kPart == Part::kQuery ? p.q_norm : p.k_norm;
    if (!norm.empty()) norm_head(x, norm, p.head_dim, p.eps);
    const int half_dim = p.head_dim / 2;
    rope_head(x, p.rope.cos.data<float>() + position * half_dim,
              p.rope.sin.data<float>() + position * half_dim, half_dim);
  }
  if (p.rotate) hadamard_rotate(x, p.head_dim);
}

// Any head_dim, in plain loops.
void transform_rows_any(const QkvParams& p, int64_t begin, int64_t end) {
  const int64_t width = int64_t{p.q_heads + 2 * p.kv_heads} * p.head_dim;
  alignas(64) float x[kMaxHeadDim];
  for (int64_t row = begin; row < end; ++row) {
    const float* source = p.qkv.data<float>() + row * width;
    const int64_t position = p.positions[row];
    float* q = p.q.data<float>() + row * p.q_heads * p.head_dim;
    for (int head = 0; head < p.q_heads; ++head, source += p.head_dim, q += p.head_dim) {
      transform_head<Part::kQuery>(p, source, position, x);
      std::copy_n(x, p.head_dim, q);
    }
    half* k = p.k.data<half>() + row * p.kv_heads * p.head_dim;
    for (int head = 0; head < p.kv_heads; ++head, source += p.head_dim, k += p.head_dim) {
      transform_head<Part::kKey>(p, source, position, x);
      for (int i = 0; i < p.head_dim; ++i) k[i] = to_half(x[i]);
    }
    half* v = p.v.data<half>() + row * p.kv_heads * p.head_dim;
    for (int head = 0; head < p.kv_heads; ++head, source += p.head_dim, v += p.head_dim) {
      transform_head<Part::kValue>(p, source, position, x);
      for (int i = 0; i < p.head_dim; ++i) v[i] = to_half(x[i]);
    }
  }
}

// head_dim 128, every Qwen3 so far: a head is eight vectors that stay in registers. The same
// operations in the same order as above, so the same bits.
constexpr int kDim = 128, kVectors = kDim / simd::kLanes;
using simd::f32x16;
using simd::i32x16;

struct Head {
  f32x16 v[kVectors];
};

// Stage `kHalf` < 16 of the transform: lane i meets lane i ^ kHalf; the upper one takes a - b.
template <int kHalf>
KVARN_INLINE f32x16 butterfly(f32x16 v) {
  constexpr i32x16 kLane = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  const i32x16 sign = ((kLane & kHalf) != 0) & static_cast<int32_t>(0x80000000u);
  const f32x16 partner = __builtin_shuffle(v, kLane ^ kHalf);
  return partner + simd::cast<f32x16>(simd::cast<i32x16>(v) ^ sign);
}

KVARN_INLINE void rotate(Head& x) {
  for (f32x16& v : x.v) v = butterfly<8>(butterfly<4>(butterfly<2>(butterfly<1>(v))));
  for (int step = 1; step < kVectors; step *= 2) {
    for (int i = 0; i < kVectors; ++i) {
      if ((i & step) != 0) continue;
      const f32x16 a = x.v[i], b = x.v[i + step];
      x.v[i] = a + b;
      x.v[i + step] = a - b;
    }
  }
  const auto scale = static_cast<float>(1.0 / std::sqrt(static_cast<double>(kDim)));
  for (f32x16& v : x.v) v *= scale;
}

KVARN_INLINE void normalise(Head& x, const Head& weight, float eps) {
  f32x16 squares = {};
  for (const f32x16& v : x.v) squares += v * v;
  const float scale = 1.f / std::sqrt(simd::sum(squares) / static_cast<float>(kDim) + eps);
  for (int i = 0; i < kVectors; ++i) x.v[i] = x.v[i] * scale * weight.v[i];
}

KVARN_INLINE void apply_rope(Head& x, const float* cosines, const float* sines) {
  for (int i = 0; i < kVectors / 2; ++i) {
    const f32x16 c = simd::load(cosines + i * simd::kLanes),
                 s = simd::load(sines + i * simd::kLanes);
    const f32x16 a = x.v[i], b = x.v[i + kVectors / 2];
    x.v[i] = a * c - b * s;
    x.v[i + kVectors / 2] = b * c + a * s;
  }
}

KVARN_INLINE Head load_head(const float* p) {
  Head x;
  for (int i = 0; i < kVectors; ++i) x.v[i] = simd::load(p + i * simd::kLanes);
  return x;
}

KVARN_INLINE void store_head(float* p, const Head& x) {
  for (int i = 0; i < kVectors; ++i) simd::store(p + i * simd::kLanes, x.v[i]);
}

KVARN_INLINE Head load_norm(Tensor weight) {
  alignas(64) float widened[kDim] = {};
  for (int i = 0; i < kDim && !weight.empty(); ++i) {
    widened[i] = weight.dtype() == DType::kBF16  ? to_float(weight.data<bf16>()[i])
                 : weight.dtype() == DType::kF16 ? to_float(weight.data<half>()[i])
                                                 : weight.data<float>()[i];
  }
  return load_head(widened);
}

// `to_halves` rounds a head to fp16 as to_half() does: a call, as its instructions are the ISA's
// own.
template <void (*to_halves)(const float*, half*)>
KVARN_INLINE void transform_rows_128(const QkvParams& p, int64_t begin, int64_t end) {
  const int64_t width = int64_t{p.q_heads + 2 * p.kv_heads} * kDim;
  const Head q_norm = load_norm(p.q_norm), k_norm = load_norm(p.k_norm);
  alignas(64) float rotated[kDim];
  const bool norm_q = !p.q_norm.empty(), norm_k = !p.k_norm.empty();
  for (int64_t row = begin; row < end; ++row) {
    const float* source = p.qkv.data<float>() + row * width;
    const float* cosines = p.rope.cos.data<float>() + int64_t{p.positions[row]} * (kDim / 2);
    const float* sines = p.rope.sin.data<float>() + int64_t{p.positions[row]} * (kDim / 2);
    float* q = p.q.data<float>() + row * p.q_heads * kDim;
    for (int head = 0; head < p.q_heads; ++head, source += kDim, q += kDim) {
      Head x = load_head(source);
      if (norm_q) normalise(x, q_norm, p.eps);
      apply_rope(x, cosines, sines);
      if (p.rotate) rotate(x);
      store_head(q, x);
    }
    half* k = p.k.data<half>() + row * p.kv_heads * kDim;
    for (int head = 0; head < p.kv_heads; ++head, source += kDim, k += kDim) {
      Head x = load_head(source);
      if (norm_k) normalise(x, k_norm, p.eps);
      apply_rope(x, cosines, sines);
      if (p.rotate) rotate(x);
      store_head(rotated, x);
      to_halves(rotated, k);
    }
    half* v = p.v.data<half>() + row * p.kv_heads * kDim;
    for (int head = 0; head < p.kv_heads; ++head, source += kDim, v += kDim) {
      Head x = load_head(source);
      if (p.rotate) rotate(x);
      store_head(rotated, x);
      to_halves(rotated, v);
    }
  }
}

void to_halves_scalar(const float* from, half* to) {
  for (int i = 0; i < kDim; ++i) to[i] = to_half(from[i]);
}
void rows_128_scalar(const QkvParams& p, int64_t begin, int64_t end) {
  transform_rows_128<to_halves_scalar>(p, begin, end);
}

#if defined(__x86_64__)
// min and max return their second operand where the first is NaN, which stays one.
KVARN_TARGET_AVX2 void to_halves_f16c(const float* from, half* to) {
  const __m256 most = _mm256_set1_ps(65504.f), least = _mm256_set1_ps(-65504.f);
  for (int i = 0; i < kDim; i += 8) {
    const __m256 v = _mm256_max_ps(least, _mm256_min_ps(most, _mm256_loadu_ps(from + i)));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to + i),
                     _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
  }
}
KVARN_TARGET_AVX512 void rows_128_avx512(const QkvParams& p, int64_t begin, int64_t end) {
  transform_rows_128<to_halves_f16c>(p, begin, end);
}
KVARN_TARGET_AVX2 void rows_128_avx2(const QkvParams& p, int64_t begin, int64_t end) {
  transform_rows_128<to_halves_f16c>(p, begin, end);
}
#endif

using TransformRows = void (*)(const QkvParams&, int64_t, int64_t);
TransformRows choose(int head_dim, CpuIsa isa) {
  if (head_dim != kDim) return transform_rows_any;
#if defined(__x86_64__)
  if (isa >= CpuIsa::kAvx512) return rows_128_avx512;
  if (isa >= CpuIsa::kAvx2) return rows_128_avx2;
#endif
  (void)isa;
  return rows_128_scalar;
}

}  // namespace

void qk_norm_rope_rotate(const QkvParams& params, ThreadPool& pool, CpuIsa isa) {
  CHECK(params.head_dim <= kMaxHeadDim && params.head_dim % 2 == 0,
        "head_dim is even, at most 512");
  CHECK(!params.rotate || (params.head_dim & (params.head_dim - 1)) == 0,
        "a rotated head_dim is a power of two");
  const TransformRows fn = choose(params.head_dim, isa);
  for (int64_t row = 0; row < params.qkv.dim(0); ++row) {
    CHECK(params.positions[row] >= 0 && params.positions[row] < params.rope.cos.dim(0),
          "position outside the RoPE table");
  }
  pool.parallel_for(params.qkv.dim(0), 4,
                    [&](int64_t begin, int64_t end, int) { fn(params, begin, end); });
}

}  // namespace kvarn::cpu
