#include "models/rope.h"

#include <gtest/gtest.h>

#include <cmath>
#include <utility>
#include <vector>

namespace kvarn {
namespace {

ModelConfig config_with(double theta, int head_dim, std::optional<YarnScaling> yarn = {}) {
  ModelConfig config;
  config.rope_theta = theta;
  config.head_dim = head_dim;
  config.max_position_embeddings = 4096;
  config.yarn = yarn;
  return config;
}

YarnScaling yarn_by_4() {
  YarnScaling yarn;
  yarn.factor = 4;
  yarn.original_max_position_embeddings = 32768;
  return yarn;
}

TEST(RopeTest, FrequenciesFallGeometricallyFromOne) {
  const std::vector<float> inv_freq = rope_inverse_frequencies(config_with(1e6, 128));
  ASSERT_EQ(inv_freq.size(), 64u);
  EXPECT_EQ(inv_freq[0], 1.f);
  for (size_t j = 0; j < inv_freq.size(); ++j) {
    const double exact = std::pow(1e6, -static_cast<double>(j) / 64);
    EXPECT_NEAR(inv_freq[j] / exact, 1.0, 1e-6) << j;  // a few fp32 roundings
  }
}

TEST(RopeTest, TablesHoldCosAndSinOfPositionTimesFrequency) {
  const RopeArrays arrays = make_rope_arrays(config_with(10000, 64), 3000);
  const std::vector<float> inv_freq = rope_inverse_frequencies(config_with(10000, 64));
  const auto* cos = reinterpret_cast<const float*>(arrays.cos.data());
  const auto* sin = reinterpret_cast<const float*>(arrays.sin.data());
  ASSERT_GE(arrays.cos.bytes(), 3000 * 32 * sizeof(float));
  for (const int position : {0, 1, 127, 128, 2999}) {
    for (size_t j = 0; j < 32; ++j) {
      const float angle = static_cast<float>(position) * inv_freq[j];
      const size_t at = static_cast<size_t>(position) * 32 + j;
      EXPECT_FLOAT_EQ(cos[at], std::cos(angle));
      EXPECT_FLOAT_EQ(sin[at], std::sin(angle));
    }
  }
}

// Expected values printed by transformers 5.17 for head_dim 128, theta 1e6, yarn factor 4 over
// 32768 positions (inv_freq of Qwen3RotaryEmbedding).
TEST(RopeTest, YarnKeepsFastPairsStretchesSlowOnesAndScalesTheTables) {
  const ModelConfig plain = config_with(1e6, 128);
  const ModelConfig scaled = config_with(1e6, 128, yarn_by_4());
  const std::vector<float> before = rope_inverse_frequencies(plain);
  const std::vector<float> after = rope_inverse_frequencies(scaled);
  EXPECT_EQ(after[0], before[0]);
  EXPECT_FLOAT_EQ(after[63], before[63] / 4);
  const std::vector<std::pair<size_t, double>> expected = {{24, 0.00537532149},
                                                           {28, 0.00184827659},
                                                           {32, 0.000602941145},
                                                           {40, 4.44569851e-05},
                                                           {63, 3.10234441e-07}};
  for (const auto& [pair, value] : expected) {
    EXPECT_NEAR(after[pair] / value, 1.0, 1e-6) << pair;  // a few fp32 roundings
  }
  EXPECT_NEAR(rope_attention_factor(scaled), 0.1 * std::log(4.0) + 1.0, 1e-12);
  const RopeArrays arrays = make_rope_arrays(scaled, 1);
  EXPECT_FLOAT_EQ(*reinterpret_cast<const float*>(arrays.cos.data()), 1.1386294f);
}

TEST(RopeTest, AGivenAttentionFactorReplacesTheFormula) {
  YarnScaling yarn = yarn_by_4();
  yarn.attention_factor = 1.25;
  EXPECT_EQ(rope_attention_factor(config_with(1e6, 128, yarn)), 1.25);
}

}  // namespace
}  // namespace kvarn
