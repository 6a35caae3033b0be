#include <gtest/gtest.h>

#include <cmath>
#include <limits>

#include "kernels/ops_cpu.h"
#include "kernels/sampling_scan_cpu.h"
#include "tests/kernels/isa_param.h"
#include "tests/support/random_tensor.h"
#include "tests/support/tensor_matchers.h"

namespace kvarn {
namespace {

using ActivationTest = test::IsaTest;
constexpr float kInf = std::numeric_limits<float>::infinity();

std::vector<float> silu_mul(std::vector<float> gate_up, int64_t rows, int64_t ffn, int threads,
                            CpuIsa isa) {
  ThreadPool pool(threads);
  std::vector<float> y(static_cast<size_t>(rows * ffn), std::nanf(""));
  cpu::silu_mul(Tensor::of(gate_up.data(), {rows, 2 * ffn}), Tensor::of(y.data(), {rows, ffn}),
                pool, isa);
  return y;
}

TEST_P(ActivationTest, SiluMulIsNearFloat64) {
  for (const int64_t ffn : {1, 15, 16, 17, 100, 3072}) {
    const int64_t rows = 3;
    const auto x = test::random_floats(static_cast<size_t>(rows * 2 * ffn), 1, -30, 30);
    const std::vector<float> y = silu_mul(x, rows, ffn, 2, GetParam());
    for (int64_t row = 0; row < rows; ++row) {
      for (int64_t i = 0; i < ffn; ++i) {
        const double gate = x[static_cast<size_t>(row * 2 * ffn + i)];
        const double up = x[static_cast<size_t>(row * 2 * ffn + ffn + i)];
        const double expected = gate / (1 + std::exp(-gate)) * up;
        // e^x to 2 ulp, then an add, a division and a product.
        ASSERT_NEAR(y[static_cast<size_t>(row * ffn + i)], expected, 6e-7 * std::abs(expected));
      }
    }
  }
}

TEST_P(ActivationTest, EveryIsaGivesTheScalarBitsForAnyThreads) {
  const int64_t rows = 9, ffn = 1037;
  const auto x = test::random_floats(static_cast<size_t>(rows * 2 * ffn), 2, -100, 100);
  const std::vector<float> scalar = silu_mul(x, rows, ffn, 1, CpuIsa::kScalar);
  for (const int threads : {1, 2, 5}) {
    EXPECT_TRUE(test::bitwise_equal(silu_mul(x, rows, ffn, threads, GetParam()), scalar));
  }
}

TEST_P(ActivationTest, ExtremesBehaveLikeTheFormula) {
  const std::vector<float> gates = {0.f, -0.f, 1e-30f, 500.f, -500.f, 1e30f, -1e30f, std::nanf("")};
  std::vector<float> x = gates;
  x.resize(16, 2.f);  // up
  const std::vector<float> y = silu_mul(x, 1, 8, 1, GetParam());
  EXPECT_EQ(y[0], 0.f);
  EXPECT_EQ(y[1], 0.f);
  EXPECT_NEAR(y[2], 1e-30f, 1e-36f);
  EXPECT_EQ(y[3], 1000.f);
  EXPECT_NEAR(y[4], 0.f, 1e-30f);
  EXPECT_EQ(y[5], 2e30f);
  EXPECT_NEAR(y[6], 0.f, 1e-30f);
  EXPECT_TRUE(std::isnan(y[7]));
}

INSTANTIATE_FOR_EVERY_ISA(ActivationTest);

// The exponential of every op, through the op that shows it bare.
float exponential(float x) {
  float y = -1.f;
  cpu::softmax_weights(&x, 1, 0.f, 1.f, -kInf, &y);
  return y;
}

TEST(ExpTest, IsWithinTwoUlpOverItsRange) {
  double worst = 0;
  for (float x = -87.f; x < 88.5f; x += 0.00137f) {
    const float y = exponential(x);
    const double expected = std::exp(static_cast<double>(x));
    const auto rounded = static_cast<float>(expected);
    const double ulp =
        static_cast<double>(std::nextafter(rounded, kInf)) - static_cast<double>(rounded);
    worst = std::max(worst, std::abs(static_cast<double>(y) - expected) / ulp);
  }
  EXPECT_LE(worst, 2.0);
  EXPECT_GT(worst, 0.0);
}

TEST(ExpTest, EndsInZeroAndInfinity) {
  EXPECT_EQ(exponential(-kInf), 0.f);
  EXPECT_EQ(exponential(-1000.f), 0.f);
  EXPECT_EQ(exponential(0.f), 1.f);
  EXPECT_EQ(exponential(100.f), kInf);
  EXPECT_EQ(exponential(kInf), kInf);
}

}  // namespace
}  // namespace kvarn
