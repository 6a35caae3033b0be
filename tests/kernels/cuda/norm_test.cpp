#include <gtest/gtest.h>

#include <cmath>

#include "kernels/ops_cpu.h"
#include "kernels/ops_cuda.h"
#include "tests/support/cuda_fixture.h"
#include "tests/support/random_tensor.h"
#include "tests/support/tensor_matchers.h"

namespace kvarn {
namespace {

using test::DeviceArray;

struct Case {
  int64_t rows, hidden;
};
// Rows that fill less than a warp, an odd number of vectors, several warps, more than one vector
// per thread (above 8192), and the hidden sizes of the models.
constexpr Case kCases[] = {{1, 8},    {3, 64},   {127, 72},   {128, 1000}, {129, 192},
                           {1, 1024}, {5, 2048}, {2, 2560},   {7, 4096},   {2, 4104},
                           {3, 5120}, {2, 8192}, {130, 8200}, {2, 17000}};
constexpr float kEps = 1e-6f;

class CudaNormTest : public test::CudaTest {
 protected:
  ThreadPool pool_{1};
};

std::vector<float> widened(const std::vector<bf16>& values) {
  std::vector<float> out;
  for (const bf16 value : values) out.push_back(to_float(value));
  return out;
}

// y is rounded to bf16, by up to half of its last bit, 2^-8 of its value; the sums differ by a few
// ulp of f32, which can move a value over a rounding border.
void expect_near_bf16(const std::vector<bf16>& y, const std::vector<float>& expected) {
  ASSERT_EQ(y.size(), expected.size());
  for (size_t i = 0; i < y.size(); ++i) {
    ASSERT_NEAR(to_float(y[i]), expected[i], 1.01f * 0x1p-8f * std::abs(expected[i]) + 1e-30f) << i;
  }
}

template <typename W>
void check_norms(cudaStream_t stream, ThreadPool& pool, Case c, const std::vector<W>& weight) {
  SCOPED_TRACE(testing::Message() << c.rows << " x " << c.hidden);
  const auto size = static_cast<size_t>(c.rows * c.hidden);
  auto x = test::random_floats(size, 1, -4, 4);
  const auto delta = test::random_bf16(size, 2);
  auto host_weight = weight;
  auto wide_delta = widened(delta);
  std::vector<float> expected(size);
  const auto matrix = [&](auto* data) { return Tensor::of(data, {c.rows, c.hidden}); };
  const DeviceArray<W> device_weight(weight);
  const Tensor w = Tensor::of(device_weight.data(), {c.hidden});
  const Tensor host_w = Tensor::of(host_weight.data(), {c.hidden});

  const DeviceArray<float> device_x(x);
  const DeviceArray<bf16> device_delta(delta), y(size);
  cuda::rms_norm(stream, matrix(device_x.data()), w, kEps, matrix(y.data()));
  cpu::rms_norm(matrix(x.data()), host_w, kEps, matrix(expected.data()), pool, CpuIsa::kScalar);
  expect_near_bf16(y.host(), expected);
  EXPECT_TRUE(test::bitwise_equal(device_x.host(), x));

  const DeviceArray<bf16> y2(size);
  cuda::add_rms_norm(stream, matrix(device_x.data()), matrix(device_delta.data()), w, kEps,
                     matrix(y2.data()));
  cpu::add_rms_norm(matrix(x.data()), matrix(wide_delta.data()), host_w, kEps,
                    matrix(expected.data()), pool, CpuIsa::kScalar);
  EXPECT_TRUE(test::bitwise_equal(device_x.host(), x));  // one f32 addition an element
  expect_near_bf16(y2.host(), expected);

  cuda::add(stream, matrix(device_x.data()), matrix(device_delta.data()));
  cpu::add(matrix(x.data()), matrix(wide_delta.data()), pool, CpuIsa::kScalar);
  EXPECT_TRUE(test::bitwise_equal(device_x.host(), x));
}

TEST_F(CudaNormTest, MatchesTheCpuTwin) {
  for (const Case c : kCases) {
    const auto hidden = static_cast<size_t>(c.hidden);
    check_norms(stream_, pool_, c, test::random_bf16(hidden, 3, 0.5f, 2.f));
    check_norms(stream_, pool_, c, test::random_floats(hidden, 4, 0.5f, 2.f));
  }
  std::vector<half> weight;
  for (const float value : test::random_floats(1024, 5)) weight.push_back(to_half(value));
  check_norms(stream_, pool_, {3, 1024}, weight);
}

TEST_F(CudaNormTest, NotANumberStaysInItsRow) {
  const int64_t rows = 3, hidden = 1024;
  auto x = test::random_floats(rows * hidden, 6);
  x[hidden + 5] = std::nanf("");
  const DeviceArray<float> device_x(x);
  const DeviceArray<bf16> weight(test::random_bf16(hidden, 7)), y(rows * hidden);
  cuda::rms_norm(stream_, Tensor::of(device_x.data(), {rows, hidden}),
                 Tensor::of(weight.data(), {hidden}), kEps, Tensor::of(y.data(), {rows, hidden}));
  const std::vector<float> values = widened(y.host());
  for (int64_t i = 0; i < rows * hidden; ++i) {
    ASSERT_EQ(std::isnan(values[static_cast<size_t>(i)]), i / hidden == 1) << i;
  }
}

TEST_F(CudaNormTest, NoRowsDoNothing) {
  const Tensor x = Tensor::of(static_cast<float*>(nullptr), {0, 64});
  const Tensor y = Tensor::of(static_cast<bf16*>(nullptr), {0, 64});
  const DeviceArray<bf16> weight(64);
  cuda::rms_norm(stream_, x, Tensor::of(weight.data(), {64}), kEps, y);
  cuda::add_rms_norm(stream_, x, y, Tensor::of(weight.data(), {64}), kEps, y);
  cuda::add(stream_, x, y);
  wait();
}

}  // namespace
}  // namespace kvarn
