// silu(gate) * up, the middle of the SwiGLU MLP.
#include "kernels/ops_cpu.h"
#include "kernels/simd_cpu.h"

namespace kvarn::cpu {
namespace {

using simd::f32x16;
using simd::kLanes;

KVARN_INLINE f32x16 silu_times(f32x16 gate, f32x16 up) {
  return gate / (1.f + simd::exp(-gate)) * up;
}

// Units are blocks of 16 columns of a row; the last of a row may be shorter.
struct SiluArgs {
  const float* gate_up;  // [rows, 2 * ffn]
  float* y;              // [rows, ffn]
  int64_t ffn, blocks;   // blocks per row
};

KVARN_INLINE void silu_blocks(const SiluArgs& a, int64_t begin, int64_t end) {
  int64_t row = begin / a.blocks, block = begin % a.blocks;
  for (int64_t unit = begin; unit < end; ++unit) {
    const int64_t column = block * kLanes;
    const float* gate = a.gate_up + row * 2 * a.ffn + column;
    const float* up = gate + a.ffn;
    float* y = a.y + row * a.ffn + column;
    if (column + kLanes <= a.ffn) {
      simd::store(y, silu_times(simd::load(gate), simd::load(up)));
    } else {
      const int64_t rest = a.ffn - column;
      simd::store_first(y, silu_times(simd::load_first(gate, rest), simd::load_first(up, rest)),
                        rest);
    }
    if (++block == a.blocks) {
      block = 0;
      ++row;
    }
  }
}
KVARN_TARGET_AVX512 void silu_avx512(const SiluArgs& a, int64_t begin, int64_t end) {
  silu_blocks(a, begin, end);
}
KVARN_TARGET_AVX2 void silu_avx2(const SiluArgs& a, int64_t begin, int64_t end) {
  silu_blocks(a, begin, end);
}
void silu_scalar(const SiluArgs& a, int64_t begin, int64_t end) { silu_blocks(a, begin, end); }

}  // namespace

void silu_mul(Tensor gate_up, Tensor y, ThreadPool& pool, CpuIsa isa) {
  const int64_t ffn = y.row_size();
  const SiluArgs args{gate_up.data<float>(), y.data<float>(), ffn, (ffn + kLanes - 1) / kLanes};
  const auto fn = isa >= CpuIsa::kAvx512 ? silu_avx512
                  : isa >= CpuIsa::kAvx2 ? silu_avx2
                                         : silu_scalar;
  pool.parallel_for(y.dim(0) * args.blocks, 256,
                    [&](int64_t begin, int64_t end, int) { fn(args, begin, end); });
}

}  // namespace kvarn::cpu
