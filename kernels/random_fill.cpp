#include "kernels/random_fill.h"

#include <algorithm>
#include <cmath>
#include <numbers>

namespace kvarn {
namespace {

std::vector<double> standard_quantiles() {
  constexpr int kHalf = 32768;
  std::vector<double> quantiles(2 * kHalf);
  double x = 0;
  for (int i = 0; i < kHalf; ++i) {
    const double p = 0.5 + (i + 0.5) / (2 * kHalf);
    // Newton on the CDF, concave for x > 0: started left of the root it only climbs towards it.
    for (int round = 0; round < 20; ++round) {
      const double density = std::exp(-x * x / 2) / std::sqrt(2 * std::numbers::pi);
      const double step = (p - 0.5 * std::erfc(-x / std::numbers::sqrt2)) / density;
      x += step;
      if (std::abs(step) < 1e-9) break;
    }
    quantiles[static_cast<size_t>(kHalf + i)] = x;
    quantiles[static_cast<size_t>(kHalf - 1 - i)] = -x;
  }
  return quantiles;
}

}  // namespace

std::vector<bf16> normal_quantiles(float stddev) {
  static const std::vector<double> standard = standard_quantiles();
  std::vector<bf16> quantiles(standard.size());
  std::transform(standard.begin(), standard.end(), quantiles.begin(),
                 [&](double q) { return to_bf16(static_cast<float>(stddev * q)); });
  return quantiles;
}

}  // namespace kvarn
