#include <gtest/gtest.h>

#include <cmath>

#include "kernels/ops_cpu.h"
#include "tests/kernels/isa_param.h"
#include "tests/support/random_tensor.h"
#include "tests/support/tensor_matchers.h"

namespace kvarn {
namespace {

using NormTest = test::IsaTest;

struct Case {
  int64_t rows, hidden;
};
constexpr Case kCases[] = {{1, 1}, {2, 15}, {3, 16}, {5, 17}, {4, 128}, {130, 1000}, {7, 1024}};
constexpr float kEps = 1e-6f;

std::vector<float> norm(std::vector<float> x, std::vector<bf16> weight, int64_t rows, int threads,
                        CpuIsa isa) {
  ThreadPool pool(threads);
  const auto hidden = static_cast<int64_t>(weight.size());
  std::vector<float> y(x.size(), std::nanf(""));
  cpu::rms_norm(Tensor::of(x.data(), {rows, hidden}), Tensor::of(weight.data(), {hidden}), kEps,
                Tensor::of(y.data(), {rows, hidden}), pool, isa);
  return y;
}

TEST_P(NormTest, RmsNormIsNearFloat64) {
  for (const Case c : kCases) {
    const auto x = test::random_floats(static_cast<size_t>(c.rows * c.hidden), 1, -4, 4);
    const auto weight = test::random_bf16(static_cast<size_t>(c.hidden), 2);
    const std::vector<float> y = norm(x, weight, c.rows, 2, GetParam());
    for (int64_t row = 0; row < c.rows; ++row) {
      double squares = 0;
      for (int64_t i = 0; i < c.hidden; ++i) {
        squares += std::pow(double{x[static_cast<size_t>(row * c.hidden + i)]}, 2);
      }
      const double scale = 1 / std::sqrt(squares / static_cast<double>(c.hidden) + double{kEps});
      for (int64_t i = 0; i < c.hidden; ++i) {
        const auto at = static_cast<size_t>(row * c.hidden + i);
        const double expected = x[at] * scale * double{to_float(weight[static_cast<size_t>(i)])};
        // A few roundings of 2^-24 each; the lanes keep the sum of squares to 2^-20.
        ASSERT_NEAR(y[at], expected, 2e-6 * std::abs(expected) + 1e-30) << row << ", " << i;
      }
    }
  }
}

TEST_P(NormTest, EveryIsaGivesTheScalarBits) {
  for (const Case c : kCases) {
    const auto x = test::random_floats(static_cast<size_t>(c.rows * c.hidden), 3, -4, 4);
    const auto weight = test::random_bf16(static_cast<size_t>(c.hidden), 4);
    EXPECT_TRUE(test::bitwise_equal(norm(x, weight, c.rows, 2, GetParam()),
                                    norm(x, weight, c.rows, 1, CpuIsa::kScalar)));
  }
}

TEST_P(NormTest, ARowDoesNotDependOnItsBatch) {
  const int64_t rows = 70, hidden = 1003;
  const auto x = test::random_floats(static_cast<size_t>(rows * hidden), 5);
  const auto weight = test::random_bf16(static_cast<size_t>(hidden), 6);
  const std::vector<float> batch = norm(x, weight, rows, 3, GetParam());
  for (int64_t row = 0; row < rows; ++row) {
    const auto at = static_cast<size_t>(row * hidden), count = static_cast<size_t>(hidden);
    ASSERT_TRUE(test::bitwise_equal(
        norm({x.begin() + row * hidden, x.begin() + (row + 1) * hidden}, weight, 1, 1, GetParam()),
        std::span(batch).subspan(at, count)));
  }
}

TEST_P(NormTest, AddRmsNormIsAddThenRmsNorm) {
  ThreadPool pool(2);
  for (const Case c : kCases) {
    const auto size = static_cast<size_t>(c.rows * c.hidden);
    auto residual = test::random_floats(size, 7), delta = test::random_floats(size, 8);
    auto weight = test::random_floats(static_cast<size_t>(c.hidden), 9);
    auto sum = residual;
    std::vector<float> fused(size), separate(size);
    const auto matrix = [&](std::vector<float>& v) {
      return Tensor::of(v.data(), {c.rows, c.hidden});
    };
    cpu::add(matrix(sum), matrix(delta), pool, GetParam());
    for (size_t i = 0; i < size; ++i) ASSERT_EQ(sum[i], residual[i] + delta[i]);
    cpu::rms_norm(matrix(sum), Tensor::of(weight.data(), {c.hidden}), kEps, matrix(separate), pool,
                  GetParam());
    cpu::add_rms_norm(matrix(residual), matrix(delta), Tensor::of(weight.data(), {c.hidden}), kEps,
                      matrix(fused), pool, GetParam());
    EXPECT_TRUE(test::bitwise_equal(residual, sum));
    EXPECT_TRUE(test::bitwise_equal(fused, separate));
  }
}

TEST_P(NormTest, WeightsMayBeF16) {
  ThreadPool pool(1);
  auto x = test::random_floats(48, 10);
  std::vector<half> weight;
  std::vector<float> widened;
  for (const float w : test::random_floats(48, 11)) {
    weight.push_back(to_half(w));
    widened.push_back(to_float(weight.back()));
  }
  std::vector<float> a(48), b(48);
  cpu::rms_norm(Tensor::of(x.data(), {1, 48}), Tensor::of(weight.data(), {48}), kEps,
                Tensor::of(a.data(), {1, 48}), pool, GetParam());
  cpu::rms_norm(Tensor::of(x.data(), {1, 48}), Tensor::of(widened.data(), {48}), kEps,
                Tensor::of(b.data(), {1, 48}), pool, GetParam());
  EXPECT_TRUE(test::bitwise_equal(a, b));
}

INSTANTIATE_FOR_EVERY_ISA(NormTest);

}  // namespace
}  // namespace kvarn
