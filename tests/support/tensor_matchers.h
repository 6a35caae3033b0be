// Comparisons of float arrays that say where and by how much they differ.
#pragma once

#include <gtest/gtest.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <span>

namespace kvarn::test {

inline float largest_magnitude(std::span<const float> values) {
  float largest = 0;
  for (const float value : values) largest = std::max(largest, std::abs(value));
  return largest;
}

// Every |a - b| <= tolerance * largest |b|. NaN never passes.
inline ::testing::AssertionResult near_relative_to_largest(std::span<const float> a,
                                                           std::span<const float> b,
                                                           float tolerance) {
  if (a.size() != b.size()) {
    return ::testing::AssertionFailure() << "sizes differ: " << a.size() << " and " << b.size();
  }
  const float largest = largest_magnitude(b);
  float worst = 0;
  for (size_t i = 0; i < a.size(); ++i) {
    const float difference = std::abs(a[i] - b[i]);
    if (!(difference <= tolerance * largest)) {
      return ::testing::AssertionFailure()
             << "element " << i << ": " << a[i] << " and " << b[i] << " differ by " << difference
             << ", above " << tolerance << " of the largest value " << largest;
    }
    worst = std::max(worst, difference);
  }
  return ::testing::AssertionSuccess() << "largest difference " << worst << " of " << largest;
}

// The same bits, so that -0 differs from 0 and NaN equals itself.
inline ::testing::AssertionResult bitwise_equal(std::span<const float> a,
                                                std::span<const float> b) {
  if (a.size() != b.size()) {
    return ::testing::AssertionFailure() << "sizes differ: " << a.size() << " and " << b.size();
  }
  for (size_t i = 0; i < a.size(); ++i) {
    if (std::bit_cast<uint32_t>(a[i]) != std::bit_cast<uint32_t>(b[i])) {
      return ::testing::AssertionFailure() << "element " << i << " of " << a.size() << ": " << a[i]
                                           << " and " << b[i] << " are not the same bits";
    }
  }
  return ::testing::AssertionSuccess();
}

}  // namespace kvarn::test
