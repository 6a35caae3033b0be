// Seeded random data for tests: a fixed generator, so a failure is the same on every machine.
#pragma once

#include <cstdint>
#include <random>
#include <vector>

#include "kernels/core/dtype.h"

namespace kvarn::test {

// Uniform in [low, high); std::mt19937_64 is specified bit for bit, the distribution is ours.
inline std::vector<float> random_floats(size_t count, uint64_t seed, float low = -1.f,
                                        float high = 1.f) {
  std::mt19937_64 engine(seed);
  std::vector<float> values(count);
  for (float& value : values) {
    const auto unit = static_cast<float>(engine() >> 40) * 0x1p-24f;
    value = low + (high - low) * unit;
  }
  return values;
}

inline std::vector<bf16> random_bf16(size_t count, uint64_t seed, float low = -1.f,
                                     float high = 1.f) {
  std::vector<bf16> values(count);
  const std::vector<float> source = random_floats(count, seed, low, high);
  for (size_t i = 0; i < count; ++i) values[i] = to_bf16(source[i]);
  return values;
}

inline std::vector<int32_t> random_tokens(size_t count, int vocab, uint64_t seed) {
  std::mt19937_64 engine(seed);
  std::vector<int32_t> tokens(count);
  for (int32_t& token : tokens) {
    token = static_cast<int32_t>(engine() % static_cast<uint64_t>(vocab));
  }
  return tokens;
}

}  // namespace kvarn::test
