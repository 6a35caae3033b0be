// Vectorised passes over one row of logits. Results are kept per block of 256, so that a search
// afterwards looks only into blocks that matter. The same bits on every ISA.
#pragma once

#include <cstdint>
#include <vector>

namespace kvarn::cpu {

constexpr int64_t kScanBlock = 256;

struct LogitScan {
  float max;     // over the row, NaN ignored
  bool has_nan;  // anywhere in the row
};
// Fills block_max[ceil(n / kScanBlock)].
LogitScan scan_logits(const float* logits, int64_t n, std::vector<float>& block_max);

// weights[i] = e^((logits[i] - max) * inverse_temperature) where logits[i] >= floor, else 0.
void softmax_weights(const float* logits, int64_t n, float max, float inverse_temperature,
                     float floor, float* weights);
// The sums of those weights per block, and their total.
double softmax_block_sums(const float* logits, int64_t n, float max, float inverse_temperature,
                          float floor, std::vector<double>& block_sums);

}  // namespace kvarn::cpu
