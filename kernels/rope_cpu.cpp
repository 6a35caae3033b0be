// QK norm, rotary embedding and the Hadamard rotation in one pass over a row's heads, in registers
// and L1. The rotation is a fast Walsh-Hadamard transform in natural order; its factor
// 1/sqrt(head_dim) is applied last (KVarN, arXiv 2606.03458).
#include <algorithm>
#include <cmath>

#include "kernels/hadamard.h"
#include "kernels/ops_cpu.h"
#include "kernels/simd_cpu.h"

namespace kvarn::cpu {
namespace {

constexpr int kMaxHeadDim = 512;

template <typename W>
KVARN_INLINE void norm_head(float* x, const W* weight, int head_dim, float eps) {
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

KVARN_INLINE void norm_head(float* x, Tensor weight, int head_dim, float eps) {
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
KVARN_INLINE void rope_head(float* x, const float* cosines, const float* sines, int half_dim) {
  for (int i = 0; i < half_dim; ++i) {
    const float a = x[i], b = x[i + half_dim];
    x[i] = a * cosines[i] - b * sines[i];
    x[i + half_dim] = b * cosines[i] + a * sines[i];
  }
}

enum class Part { kQuery, kKey, kValue };

template <Part kPart>
KVARN_INLINE void transform_head(const QkvParams& p, const float* source, int64_t position,
                                 float* x) {
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

KVARN_INLINE void transform_rows(const QkvParams& p, int64_t begin, int64_t end) {
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
KVARN_TARGET_AVX512 void transform_rows_avx512(const QkvParams& p, int64_t begin, int64_t end) {
  transform_rows(p, begin, end);
}
KVARN_TARGET_AVX2 void transform_rows_avx2(const QkvParams& p, int64_t begin, int64_t end) {
  transform_rows(p, begin, end);
}
void transform_rows_scalar(const QkvParams& p, int64_t begin, int64_t end) {
  transform_rows(p, begin, end);
}

}  // namespace

void qk_norm_rope_rotate(const QkvParams& params, ThreadPool& pool, CpuIsa isa) {
  CHECK(params.head_dim <= kMaxHeadDim && params.head_dim % 2 == 0,
        "head_dim is even, at most 512");
  CHECK(!params.rotate || (params.head_dim & (params.head_dim - 1)) == 0,
        "a rotated head_dim is a power of two");
  const auto fn = isa >= CpuIsa::kAvx512 ? transform_rows_avx512
                  : isa >= CpuIsa::kAvx2 ? transform_rows_avx2
                                         : transform_rows_scalar;
  for (int64_t row = 0; row < params.qkv.dim(0); ++row) {
    CHECK(params.positions[row] >= 0 && params.positions[row] < params.rope.cos.dim(0),
          "position outside the RoPE table");
  }
  pool.parallel_for(params.qkv.dim(0), 4,
                    [&](int64_t begin, int64_t end, int) { fn(params, begin, end); });
}

}  // namespace kvarn::cpu
