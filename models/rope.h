// Rotary embedding tables: the angle of pair j at position p is p * inv_freq[j]; cos and sin are
// multiplied by YaRN's attention factor. fp32 products as in training, so that long positions get
// the same angles. Pure functions.
#pragma once

#include <vector>

#include "kernels/core/buffer.h"
#include "models/model_config.h"

namespace kvarn {

// Inverse frequencies of the head_dim / 2 pairs, scaled by YaRN where the config asks for it.
std::vector<float> rope_inverse_frequencies(const ModelConfig& config);
// 1 without YaRN.
double rope_attention_factor(const ModelConfig& config);

struct RopeArrays {
  Buffer cos, sin;  // host, f32 [max_positions, head_dim / 2]
};
RopeArrays make_rope_arrays(const ModelConfig& config, int max_positions);

}  // namespace kvarn
