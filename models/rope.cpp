#include "models/rope.h"

#include <algorithm>
#include <cmath>
#include <numbers>

namespace kvarn {
namespace {

// Pair (as a real number) whose wave turns `rotations` times over the original context.
double correction_pair(double rotations, const ModelConfig& config, const YarnScaling& yarn) {
  const double context = yarn.original_max_position_embeddings;
  return config.head_dim * std::log(context / (rotations * 2 * std::numbers::pi)) /
         (2 * std::log(config.rope_theta));
}

}  // namespace

double rope_attention_factor(const ModelConfig& config) {
  if (!config.yarn) return 1.0;
  return config.yarn->attention_factor.value_or(0.1 * std::log(config.yarn->factor) + 1.0);
}

// YaRN (arXiv 2309.00071): pairs that turn often keep their frequency (extrapolation), slow ones
// are stretched by `factor` (interpolation), a linear ramp lies between. fp32 where the training
// code is.
std::vector<float> rope_inverse_frequencies(const ModelConfig& config) {
  const int pairs = config.head_dim / 2;
  std::vector<float> inv_freq(static_cast<size_t>(pairs));
  double low = 0, high = 0;
  if (config.yarn) {
    low = std::max(std::floor(correction_pair(config.yarn->beta_fast, config, *config.yarn)), 0.0);
    high = std::min(std::ceil(correction_pair(config.yarn->beta_slow, config, *config.yarn)),
                    config.head_dim - 1.0);
    if (low == high) high += 0.001;  // a ramp of no width
  }
  for (int j = 0; j < pairs; ++j) {
    const float exponent = static_cast<float>(2 * j) / static_cast<float>(config.head_dim);
    const auto wavelength = static_cast<float>(std::pow(config.rope_theta, double{exponent}));
    const float plain = 1.f / wavelength;
    float& out = inv_freq[static_cast<size_t>(j)];
    out = plain;
    if (config.yarn) {
      const float stretched = 1.f / (static_cast<float>(config.yarn->factor) * wavelength);
      const float ramp =
          (static_cast<float>(j) - static_cast<float>(low)) / static_cast<float>(high - low);
      const float keep = 1.f - std::clamp(ramp, 0.f, 1.f);
      out = stretched * (1.f - keep) + plain * keep;
    }
  }
  return inv_freq;
}

RopeArrays make_rope_arrays(const ModelConfig& config, int max_positions) {
  const std::vector<float> inv_freq = rope_inverse_frequencies(config);
  const double factor = rope_attention_factor(config);
  const size_t pairs = inv_freq.size();
  const size_t bytes = static_cast<size_t>(max_positions) * pairs * sizeof(float);
  RopeArrays arrays{allocate_host(bytes), allocate_host(bytes)};
  auto* cos = reinterpret_cast<float*>(arrays.cos.data());
  auto* sin = reinterpret_cast<float*>(arrays.sin.data());
  for (int position = 0; position < max_positions; ++position) {
    for (size_t j = 0; j < pairs; ++j) {
      const float angle = static_cast<float>(position) * inv_freq[j];
      *cos++ = static_cast<float>(std::cos(double{angle}) * factor);
      *sin++ = static_cast<float>(std::sin(double{angle}) * factor);
    }
  }
  return arrays;
}

}  // namespace kvarn
