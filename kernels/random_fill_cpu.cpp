#include <algorithm>

#include "kernels/ops_cpu.h"
#include "kernels/random_fill.h"

namespace kvarn::cpu {

void fill_normal(Tensor out, float stddev, uint64_t seed, ThreadPool& pool) {
  const std::vector<bf16> quantiles = normal_quantiles(stddev);
  bf16* const values = out.data<bf16>();
  const int64_t count = out.size();
  constexpr int64_t kGrain =
      1 << 14;  // groups of four; below this a thread costs more than it saves
  pool.parallel_for((count + 3) / 4, kGrain, [&](int64_t begin, int64_t end, int) {
    for (int64_t group = begin; group < end; ++group) {
      uint64_t bits = mix_bits(seed + static_cast<uint64_t>(4 * group));
      for (int64_t i = 4 * group; i < std::min(4 * group + 4, count); ++i, bits >>= 16) {
        values[i] = quantiles[bits & 0xffff];
      }
    }
  });
}

}  // namespace kvarn::cpu
