#include "kernels/sampling_scan_cpu.h"

#include <algorithm>
#include <limits>

#include "kernels/backend.h"
#include "kernels/simd_cpu.h"

namespace kvarn::cpu {
namespace {

using simd::f32x16;
using simd::i32x16;
using simd::kLanes;

constexpr float kMinusInf = -std::numeric_limits<float>::infinity();

KVARN_INLINE float max_lane(f32x16 v) {
  float best = v[0];
  for (int i = 1; i < kLanes; ++i) best = v[i] > best ? v[i] : best;
  return best;
}
KVARN_INLINE f32x16 load_padded(const float* p, int64_t count) {
  float padded[kLanes];
  for (int64_t i = 0; i < kLanes; ++i) padded[i] = i < count ? p[i] : kMinusInf;
  return simd::load(padded);
}

KVARN_INLINE bool scan_body(const float* logits, int64_t n, float* block_max) {
  i32x16 nan_lanes = {};
  for (int64_t begin = 0, block = 0; begin < n; begin += kScanBlock, ++block) {
    const int64_t end = std::min(begin + kScanBlock, n);
    f32x16 best = simd::splat(kMinusInf);
    int64_t i = begin;
    for (; i + kLanes <= end; i += kLanes) {
      const f32x16 v = simd::load(logits + i);
      best = v > best ? v : best;
      nan_lanes |= v != v;
    }
    if (i < end) {
      const f32x16 v = load_padded(logits + i, end - i);
      best = v > best ? v : best;
      nan_lanes |= v != v;
    }
    block_max[block] = max_lane(best);
  }
  int any = 0;
  for (int i = 0; i < kLanes; ++i) any |= nan_lanes[i];
  return any != 0;
}

struct WeightArgs {
  const float* logits;
  int64_t n;
  float max, inverse_temperature, floor;
};

KVARN_INLINE f32x16 weights_of(const WeightArgs& a, f32x16 v) {
  const f32x16 w = simd::exp((v - a.max) * a.inverse_temperature);
  return v >= a.floor ? w : f32x16{};
}

KVARN_INLINE void weights_body(const WeightArgs& a, float* weights) {
  int64_t i = 0;
  for (; i + kLanes <= a.n; i += kLanes) {
    simd::store(weights + i, weights_of(a, simd::load(a.logits + i)));
  }
  if (i < a.n) {
    simd::store_first(weights + i, weights_of(a, load_padded(a.logits + i, a.n - i)), a.n - i);
  }
}

KVARN_INLINE void sums_body(const WeightArgs& a, double* block_sums) {
  for (int64_t begin = 0, block = 0; begin < a.n; begin += kScanBlock, ++block) {
    const int64_t end = std::min(begin + kScanBlock, a.n);
    f32x16 sums = {};  // 16 terms of at most 1 each per lane: fp32 is ample
    int64_t i = begin;
    for (; i + kLanes <= end; i += kLanes) sums += weights_of(a, simd::load(a.logits + i));
    if (i < end) sums += weights_of(a, load_padded(a.logits + i, end - i));
    block_sums[block] = static_cast<double>(simd::sum(sums));
  }
}

KVARN_TARGET_AVX512 bool scan_avx512(const float* x, int64_t n, float* m) {
  return scan_body(x, n, m);
}
KVARN_TARGET_AVX2 bool scan_avx2(const float* x, int64_t n, float* m) { return scan_body(x, n, m); }
bool scan_scalar(const float* x, int64_t n, float* m) { return scan_body(x, n, m); }

KVARN_TARGET_AVX512 void weights_avx512(const WeightArgs& a, float* w) { weights_body(a, w); }
KVARN_TARGET_AVX2 void weights_avx2(const WeightArgs& a, float* w) { weights_body(a, w); }
void weights_scalar(const WeightArgs& a, float* w) { weights_body(a, w); }

KVARN_TARGET_AVX512 void sums_avx512(const WeightArgs& a, double* s) { sums_body(a, s); }
KVARN_TARGET_AVX2 void sums_avx2(const WeightArgs& a, double* s) { sums_body(a, s); }
void sums_scalar(const WeightArgs& a, double* s) { sums_body(a, s); }

template <typename Fn>
Fn pick(Fn avx512, Fn avx2, Fn scalar) {
  const CpuIsa isa = best_cpu_isa();
  return isa >= CpuIsa::kAvx512 ? avx512 : isa >= CpuIsa::kAvx2 ? avx2 : scalar;
}

}  // namespace

LogitScan scan_logits(const float* logits, int64_t n, std::vector<float>& block_max) {
  block_max.resize(static_cast<size_t>((n + kScanBlock - 1) / kScanBlock));
  const bool has_nan = pick(scan_avx512, scan_avx2, scan_scalar)(logits, n, block_max.data());
  const float max =
      block_max.empty() ? kMinusInf : *std::max_element(block_max.begin(), block_max.end());
  return {max, has_nan};
}

void softmax_weights(const float* logits, int64_t n, float max, float inverse_temperature,
                     float floor, float* weights) {
  const WeightArgs args{logits, n, max, inverse_temperature, floor};
  pick(weights_avx512, weights_avx2, weights_scalar)(args, weights);
}

double softmax_block_sums(const float* logits, int64_t n, float max, float inverse_temperature,
                          float floor, std::vector<double>& block_sums) {
  block_sums.resize(static_cast<size_t>((n + kScanBlock - 1) / kScanBlock));
  const WeightArgs args{logits, n, max, inverse_temperature, floor};
  pick(sums_avx512, sums_avx2, sums_scalar)(args, block_sums.data());
  double total = 0;
  for (const double sum : block_sums) total += sum;
  return total;
}

}  // namespace kvarn::cpu
