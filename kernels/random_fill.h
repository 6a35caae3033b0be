// Random numbers that depend on (seed, element) alone, the same on every device: dummy weights.
// Element i of a fill takes 16 bits of a hash of its group of four as an index into 65,536
// quantiles of the normal distribution, so one hash gives four samples by lookup, about as fast as
// memory can be written.
#pragma once

#include <cstdint>
#include <vector>

#include "kernels/core/dtype.h"

namespace kvarn {

// splitmix64's finaliser (Steele, Lea, Flood 2014).
constexpr uint64_t mix_bits(uint64_t x) {
  x += 0x9e3779b97f4a7c15u;
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9u;
  x = (x ^ (x >> 27)) * 0x94d049bb133111ebu;
  return x ^ (x >> 31);
}

// Which quantile element i takes.
constexpr uint32_t quantile_index(uint64_t seed, int64_t i) {
  const uint64_t bits = mix_bits(seed + static_cast<uint64_t>(i / 4 * 4));
  return static_cast<uint32_t>(bits >> (i % 4 * 16)) & 0xffffu;
}

// Quantiles of N(0, stddev) at probabilities (i + 0.5) / 65536, in bf16. Thread-safe.
std::vector<bf16> normal_quantiles(float stddev);

}  // namespace kvarn
