// RMS norm and residual addition. The sum is fp32 in 16 lanes whatever the ISA, so a row's bits
// depend on its values alone.
#include <algorithm>
#include <cmath>

#include "kernels/ops_cpu.h"
#include "kernels/simd_cpu.h"

namespace kvarn::cpu {
namespace {

using simd::f32x16;
using simd::kLanes;

// Rows per thread at least: a row of 1024 takes about 0.1 us, a wake-up 1 us.
int64_t row_grain(int64_t hidden) {
  return std::max<int64_t>(1, 16384 / std::max<int64_t>(1, hidden));
}

template <typename W, bool kAdd>
KVARN_INLINE void norm_row(float* x, const float* delta, const W* weight, int64_t hidden, float eps,
                           float* y) {
  f32x16 squares = {};
  int64_t i = 0;
  for (; i + kLanes <= hidden; i += kLanes) {
    f32x16 v = simd::load(x + i);
    if constexpr (kAdd) {
      v += simd::load(delta + i);
      simd::store(x + i, v);
    }
    squares += v * v;
  }
  const int64_t rest = hidden - i;
  if (rest > 0) {
    f32x16 v = simd::load_first(x + i, rest);
    if constexpr (kAdd) {
      v += simd::load_first(delta + i, rest);
      simd::store_first(x + i, v, rest);
    }
    squares += v * v;
  }
  const float scale = 1.f / std::sqrt(simd::sum(squares) / static_cast<float>(hidden) + eps);
  for (i = 0; i + kLanes <= hidden; i += kLanes) {
    simd::store(y + i, simd::load(x + i) * scale * simd::load(weight + i));
  }
  if (rest > 0) {
    const f32x16 v = simd::load_first(x + i, rest) * scale * simd::load_first(weight + i, rest);
    simd::store_first(y + i, v, rest);
  }
}

struct NormArgs {
  float* x;
  const float* delta;  // null: plain norm
  const void* weight;
  DType weight_dtype;
  int64_t hidden;
  float eps;
  float* y;
};

template <typename W>
KVARN_INLINE void norm_rows_typed(const NormArgs& a, int64_t begin, int64_t end) {
  const W* weight = static_cast<const W*>(a.weight);
  for (int64_t row = begin; row < end; ++row) {
    float* x = a.x + row * a.hidden;
    float* y = a.y + row * a.hidden;
    if (a.delta != nullptr) {
      norm_row<W, true>(x, a.delta + row * a.hidden, weight, a.hidden, a.eps, y);
    } else {
      norm_row<W, false>(x, nullptr, weight, a.hidden, a.eps, y);
    }
  }
}

KVARN_INLINE void norm_rows(const NormArgs& a, int64_t begin, int64_t end) {
  switch (a.weight_dtype) {
    case DType::kBF16:
      return norm_rows_typed<bf16>(a, begin, end);
    case DType::kF16:
      return norm_rows_typed<half>(a, begin, end);
    case DType::kF32:
      return norm_rows_typed<float>(a, begin, end);
    default:
      CHECK(false, "norm weights are bf16, f16 or f32");
  }
}

KVARN_TARGET_AVX512 void norm_rows_avx512(const NormArgs& a, int64_t begin, int64_t end) {
  norm_rows(a, begin, end);
}
KVARN_TARGET_AVX2 void norm_rows_avx2(const NormArgs& a, int64_t begin, int64_t end) {
  norm_rows(a, begin, end);
}
void norm_rows_scalar(const NormArgs& a, int64_t begin, int64_t end) { norm_rows(a, begin, end); }

void run_norm(const NormArgs& args, int64_t rows, ThreadPool& pool, CpuIsa isa) {
  const auto fn = isa >= CpuIsa::kAvx512 ? norm_rows_avx512
                  : isa >= CpuIsa::kAvx2 ? norm_rows_avx2
                                         : norm_rows_scalar;
  pool.parallel_for(rows, row_grain(args.hidden),
                    [&](int64_t begin, int64_t end, int) { fn(args, begin, end); });
}

KVARN_INLINE void add_range(float* residual, const float* delta, int64_t begin, int64_t end) {
  int64_t i = begin;
  for (; i + kLanes <= end; i += kLanes) {
    simd::store(residual + i, simd::load(residual + i) + simd::load(delta + i));
  }
  for (; i < end; ++i) residual[i] += delta[i];
}
KVARN_TARGET_AVX512 void add_avx512(float* residual, const float* delta, int64_t b, int64_t e) {
  add_range(residual, delta, b, e);
}
KVARN_TARGET_AVX2 void add_avx2(float* residual, const float* delta, int64_t b, int64_t e) {
  add_range(residual, delta, b, e);
}
void add_scalar(float* residual, const float* delta, int64_t b, int64_t e) {
  add_range(residual, delta, b, e);
}

}  // namespace

void rms_norm(Tensor x, Tensor weight, float eps, Tensor y, ThreadPool& pool, CpuIsa isa) {
  run_norm(
      {x.data<float>(), nullptr, weight.raw(), weight.dtype(), x.row_size(), eps, y.data<float>()},
      x.dim(0), pool, isa);
}

void add_rms_norm(Tensor residual, Tensor delta, Tensor weight, float eps, Tensor y,
                  ThreadPool& pool, CpuIsa isa) {
  run_norm({residual.data<float>(), delta.data<float>(), weight.raw(), weight.dtype(),
            residual.row_size(), eps, y.data<float>()},
           residual.dim(0), pool, isa);
}

void add(Tensor residual, Tensor delta, ThreadPool& pool, CpuIsa isa) {
  const auto fn = isa >= CpuIsa::kAvx512 ? add_avx512
                  : isa >= CpuIsa::kAvx2 ? add_avx2
                                         : add_scalar;
  float* r = residual.data<float>();
  const float* d = delta.data<float>();
  pool.parallel_for(residual.size(), 16384,
                    [&](int64_t begin, int64_t end, int) { fn(r, d, begin, end); });
}

}  // namespace kvarn::cpu
