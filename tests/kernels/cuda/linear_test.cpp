// The GPU's linear against float64 products of the same bf16 values.
#include "kernels/linear_cuda.h"

#include <gtest/gtest.h>

#include <cmath>
#include <cstring>

#include "kernels/linear_cublaslt.h"
#include "kernels/linear_few_cuda.h"
#include "kernels/ops_cuda.h"
#include "tests/support/cuda_fixture.h"
#include "tests/support/random_tensor.h"
#include "tests/support/tensor_matchers.h"

namespace kvarn {
namespace {

using cuda::LinearResult;
using test::DeviceArray;

struct Shape {
  int64_t rows, n, k;
};

std::vector<float> widened(const std::vector<bf16>& values) {
  std::vector<float> out;
  out.reserve(values.size());
  for (const bf16 value : values) out.push_back(to_float(value));
  return out;
}

// A matrix product in float64, with the sum of magnitudes that bounds its rounding.
struct Product {
  std::vector<double> sum, magnitude;  // [rows, n]
};

Product product(const std::vector<bf16>& x, const std::vector<bf16>& w, const Shape& s) {
  const std::vector<float> xf = widened(x), wf = widened(w);
  Product out;
  for (int64_t r = 0; r < s.rows; ++r) {
    for (int64_t j = 0; j < s.n; ++j) {
      double sum = 0, magnitude = 0;
      for (int64_t i = 0; i < s.k; ++i) {
        const double term = double{xf[static_cast<size_t>(r * s.k + i)]} *
                            double{wf[static_cast<size_t>(j * s.k + i)]};
        sum += term;
        magnitude += std::abs(term);
      }
      out.sum.push_back(sum);
      out.magnitude.push_back(magnitude);
    }
  }
  return out;
}

// Products of bf16 are exact in fp32; tensor cores add a few of them at a time and cut what is
// below the largest's last bit, so a sum is within a small multiple of 2^-23 of the magnitudes:
// 2^-18 leaves room for the longest k here. A bf16 result is rounded once more, by up to half of
// its last bit: 2^-8 of the value, and of the value's own error.
void expect_near(const std::vector<float>& y, const Product& p, bool is_bf16, const Shape& s) {
  ASSERT_EQ(y.size(), p.sum.size());
  for (size_t i = 0; i < y.size(); ++i) {
    const double rounding = is_bf16 ? 0x1p-8 * std::abs(p.sum[i]) : 0;
    ASSERT_NEAR(y[i], p.sum[i], 0x1p-18 * p.magnitude[i] + 1.01 * rounding + 1e-30)
        << "rows " << s.rows << " n " << s.n << " k " << s.k << " at row "
        << static_cast<int64_t>(i) / s.n << " column " << static_cast<int64_t>(i) % s.n;
  }
}

LinearWeight weight_of(std::initializer_list<Tensor> parts) {
  LinearWeight weight;
  for (const Tensor& part : parts) {
    weight.parts[static_cast<size_t>(weight.num_parts++)] = part;
  }
  return weight;
}

class CudaLinearTest : public test::CudaTest {
 protected:
  void SetUp() override {
    test::CudaTest::SetUp();
    if (!IsSkipped()) linear_ = std::make_unique<cuda::Linear>(stream_, /*overlap=*/false);
  }
  void TearDown() override {
    linear_.reset();
    test::CudaTest::TearDown();
  }

  std::vector<float> run_bf16(Tensor x, const LinearWeight& weight) {
    const int64_t rows = x.dim(0), n = weight.out_features();
    const DeviceArray<bf16> y(static_cast<size_t>(rows * n));
    linear_->run(x, weight, Tensor::of(y.data(), {rows, n}));
    return widened(y.host());
  }
  std::vector<float> run_f32(Tensor x, const LinearWeight& weight) {
    const int64_t rows = x.dim(0), n = weight.out_features();
    const DeviceArray<float> y(static_cast<size_t>(rows * n));
    linear_->run(x, weight, Tensor::of(y.data(), {rows, n}));
    return y.host();
  }

  std::unique_ptr<cuda::Linear> linear_;
};

constexpr int64_t kRows[] = {1, 2, 3, 4, 5, 7, 8, 9, 11, 15, 16, 17, 127, 128, 129, 200};
// n: below a tile, not a multiple of one, odd, more tiles than multiprocessors; k: the least, less
// than a warp takes at once, ends inside a warp's share, more than a block takes at once.
constexpr Shape kShapes[] = {{0, 1, 8},   {0, 7, 40},   {0, 8, 64},    {0, 24, 200}, {0, 129, 1000},
                             {0, 100, 8}, {0, 64, 256}, {0, 16, 5128}, {0, 1100, 72}};

TEST_F(CudaLinearTest, IsNearTheFloat64Product) {
  for (Shape s : kShapes) {
    const auto w = test::random_bf16(static_cast<size_t>(s.n * s.k), 1);
    const DeviceArray<bf16> device_w(w);
    const LinearWeight weight = weight_of({Tensor::of(device_w.data(), {s.n, s.k})});
    for (const int64_t rows : kRows) {
      s.rows = rows;
      const auto x = test::random_bf16(static_cast<size_t>(s.rows * s.k), 2, -3, 3);
      const DeviceArray<bf16> device_x(x);
      const Product expected = product(x, w, s);
      const Tensor xt = Tensor::of(device_x.data(), {s.rows, s.k});
      ASSERT_NO_FATAL_FAILURE(expect_near(run_f32(xt, weight), expected, false, s));
      ASSERT_NO_FATAL_FAILURE(expect_near(run_bf16(xt, weight), expected, true, s));
    }
  }
}

TEST_F(CudaLinearTest, EveryPlanForFewRowsGivesTheProduct) {
  for (const Shape s : {Shape{3, 40, 1096}, Shape{8, 1000, 520}, Shape{1, 17, 4104},
                        Shape{9, 40, 1096}, Shape{16, 1000, 520}, Shape{13, 17, 4104}}) {
    const auto w = test::random_bf16(static_cast<size_t>(s.n * s.k), 3);
    const auto x = test::random_bf16(static_cast<size_t>(s.rows * s.k), 4);
    const DeviceArray<bf16> device_w(w), device_x(x);
    const Product expected = product(x, w, s);
    for (const int warps : {1, 4, 5, 8, 12, 16}) {
      for (const int64_t blocks : {1, 3, 1000}) {
        for (const bool overlap : {false, true}) {
          const DeviceArray<float> y(static_cast<size_t>(s.rows * s.n));
          cuda::linear_few_rows(stream_, Tensor::of(device_x.data(), {s.rows, s.k}),
                                weight_of({Tensor::of(device_w.data(), {s.n, s.k})}),
                                Tensor::of(y.data(), {s.rows, s.n}), LinearResult::kStore,
                                {warps, blocks}, overlap);
          SCOPED_TRACE(testing::Message()
                       << warps << " warps, " << blocks << " blocks, overlap " << overlap);
          ASSERT_NO_FATAL_FAILURE(expect_near(y.host(), expected, false, s));
        }
      }
    }
  }
}

TEST_F(CudaLinearTest, AmongFewRowsARowHasTheSameBitsAloneAndInABatch) {
  const int64_t n = 200, k = 2000;
  const DeviceArray<bf16> w(test::random_bf16(static_cast<size_t>(n * k), 5));
  const DeviceArray<bf16> x(test::random_bf16(static_cast<size_t>(16 * k), 6));
  const LinearWeight weight = weight_of({Tensor::of(w.data(), {n, k})});
  const auto check = [&](int64_t least, int64_t most) {
    const std::vector<float> all = run_f32(Tensor::of(x.data(), {most, k}), weight);
    for (int64_t row = 0; row < most; ++row) {
      for (int64_t rows = least; row + rows <= most; ++rows) {
        const Tensor some = Tensor::of(x.data(), {16, k}).rows(row, rows);
        EXPECT_TRUE(test::bitwise_equal(
            run_f32(some, weight),
            std::span(all).subspan(static_cast<size_t>(row * n), static_cast<size_t>(rows * n))))
            << row << " + " << rows;
      }
    }
  };
  check(1, 8);
  check(9, 16);
}

TEST_F(CudaLinearTest, PartsStandBesideEachOther) {
  const int64_t k = 200;
  const int64_t columns[] = {40, 13, 27};  // the middle part ends inside a tile
  const int64_t n = 80;
  const auto w = test::random_bf16(static_cast<size_t>(n * k), 7);
  const DeviceArray<bf16> together(w);
  std::vector<std::unique_ptr<DeviceArray<bf16>>> apart;
  for (int64_t i = 0, row = 0; i < 3; row += columns[i++]) {
    apart.push_back(std::make_unique<DeviceArray<bf16>>(
        std::vector<bf16>(w.begin() + row * k, w.begin() + (row + columns[i]) * k)));
  }
  const auto part = [&](int64_t first, int64_t count) {
    return Tensor::of(together.data(), {n, k}).rows(first, count);
  };
  const auto alone = [&](size_t i) { return Tensor::of(apart[i]->data(), {columns[i], k}); };
  const LinearWeight variants[] = {
      weight_of({part(0, 40), part(40, 13), part(53, 27)}),
      weight_of({alone(0), alone(1), alone(2)}),
      weight_of({part(0, 53), alone(2)}),
      weight_of({part(0, 40), alone(1), part(53, 27)}),
      weight_of({alone(0), part(40, 13), part(53, 27)}),
  };
  for (const int64_t rows : {1, 3, 8, 9, 16, 17, 130}) {
    const auto x = test::random_bf16(static_cast<size_t>(rows * k), 8);
    const DeviceArray<bf16> device_x(x);
    const Tensor xt = Tensor::of(device_x.data(), {rows, k});
    const Product expected = product(x, w, {rows, n, k});
    for (const LinearWeight& weight : variants) {
      ASSERT_NO_FATAL_FAILURE(expect_near(run_f32(xt, weight), expected, false, {rows, n, k}));
      ASSERT_NO_FATAL_FAILURE(expect_near(run_bf16(xt, weight), expected, true, {rows, n, k}));
    }
  }
}

TEST_F(CudaLinearTest, NotANumberStaysInItsRowAndColumn) {
  const int64_t n = 75, k = 264;
  for (const int64_t rows : {2, 8, 9, 16, 33}) {
    auto w = test::random_bf16(static_cast<size_t>(n * k), 9);
    auto x = test::random_bf16(static_cast<size_t>(rows * k), 10);
    const Product clean = product(x, w, {rows, n, k});
    x[static_cast<size_t>(1 * k + 263)] = {0x7fc0};
    w[static_cast<size_t>(17 * k)] = {0x7f80};  // infinity
    const DeviceArray<bf16> device_w(w), device_x(x);
    const std::vector<float> y = run_f32(Tensor::of(device_x.data(), {rows, k}),
                                         weight_of({Tensor::of(device_w.data(), {n, k})}));
    for (int64_t row = 0; row < rows; ++row) {
      for (int64_t column = 0; column < n; ++column) {
        const auto i = static_cast<size_t>(row * n + column);
        if (row == 1 || column == 17) {
          EXPECT_FALSE(std::isfinite(y[i])) << row << ", " << column;
        } else {
          EXPECT_NEAR(y[i], clean.sum[i], 1e-4 * clean.magnitude[i]) << row << ", " << column;
        }
      }
    }
  }
}

TEST_F(CudaLinearTest, AddsToTheResidual) {
  for (const Shape s : {Shape{1, 40, 72}, Shape{5, 129, 1000}, Shape{8, 64, 2048}, Shape{9, 64, 72},
                        Shape{130, 48, 256}}) {
    const auto w = test::random_bf16(static_cast<size_t>(s.n * s.k), 11);
    const auto x = test::random_bf16(static_cast<size_t>(s.rows * s.k), 12);
    const auto residual = test::random_floats(static_cast<size_t>(s.rows * s.n), 13, -9, 9);
    const DeviceArray<bf16> device_w(w), device_x(x);
    const DeviceArray<float> y(residual);
    const LinearWeight weight = weight_of({Tensor::of(device_w.data(), {s.n, s.k})});
    Product expected = product(x, w, s);
    for (int round = 1; round <= 2; ++round) {  // the first may have timed algorithms
      linear_->run_fused(Tensor::of(device_x.data(), {s.rows, s.k}), weight, LinearResult::kAdd,
                         Tensor::of(y.data(), {s.rows, s.n}));
      Product sum = expected;
      for (size_t i = 0; i < residual.size(); ++i) {
        sum.sum[i] = round * sum.sum[i] + double{residual[i]};
        sum.magnitude[i] = round * sum.magnitude[i] + double{std::abs(residual[i])};
      }
      ASSERT_NO_FATAL_FAILURE(expect_near(y.host(), sum, false, s));
    }
  }
}

TEST_F(CudaLinearTest, GateAndUpBecomeTheirProduct) {
  for (const Shape s : {Shape{1, 8, 64}, Shape{3, 72, 200}, Shape{8, 1000, 1024}, Shape{9, 72, 200},
                        Shape{16, 1000, 1024}}) {
    const int64_t ffn = s.n;
    const auto gate = test::random_bf16(static_cast<size_t>(ffn * s.k), 14);
    const auto up = test::random_bf16(static_cast<size_t>(ffn * s.k), 15);
    std::vector<bf16> both = gate;
    both.insert(both.end(), up.begin(), up.end());
    const auto x = test::random_bf16(static_cast<size_t>(s.rows * s.k), 16, -0.3f, 0.3f);
    const DeviceArray<bf16> g(gate), u(up), together(both), device_x(x);
    const Product pg = product(x, gate, s), pu = product(x, up, s);
    for (const LinearWeight& weight :
         {weight_of({Tensor::of(together.data(), {2 * ffn, s.k})}),
          weight_of({Tensor::of(g.data(), {ffn, s.k}), Tensor::of(u.data(), {ffn, s.k})})}) {
      const DeviceArray<bf16> y(static_cast<size_t>(s.rows * ffn));
      linear_->run_fused(Tensor::of(device_x.data(), {s.rows, s.k}), weight, LinearResult::kSiluMul,
                         Tensor::of(y.data(), {s.rows, ffn}));
      const std::vector<float> values = widened(y.host());
      for (size_t i = 0; i < values.size(); ++i) {
        const double silu = pg.sum[i] / (1 + std::exp(-pg.sum[i]));
        // Both sums are within 2^-18 of their magnitudes (silu's slope is below 1.1); the result
        // is rounded to bf16.
        const double tolerance = 0x1p-18 * (1.1 * pg.magnitude[i] * std::abs(pu.sum[i]) +
                                            std::abs(silu) * pu.magnitude[i]);
        ASSERT_NEAR(values[i], silu * pu.sum[i],
                    1.01 * (tolerance + 0x1p-8 * std::abs(silu * pu.sum[i])) + 1e-30)
            << "rows " << s.rows << " at " << i;
      }
    }
  }
}

TEST_F(CudaLinearTest, ReplaysInAGraph) {
  // Chains in which each kernel reads what the one in front has written, beginning with a norm that
  // lets the next begin early.
  const int64_t size = 512;
  cuda::Linear overlapping(stream_, /*overlap=*/true);
  const DeviceArray<bf16> w(test::random_bf16(static_cast<size_t>(size * size), 17, -0.1f, 0.1f));
  const DeviceArray<bf16> norm_weight(test::random_bf16(static_cast<size_t>(size), 18, 0.5f, 1.f));
  const LinearWeight weight = weight_of({Tensor::of(w.data(), {size, size})});
  for (const int64_t rows : {1, 8, 16, 24}) {
    const auto count = static_cast<size_t>(rows * size);
    const DeviceArray<float> start(test::random_floats(count, 19));
    const DeviceArray<bf16> a(count), b(count);
    const Tensor at = Tensor::of(a.data(), {rows, size}), bt = Tensor::of(b.data(), {rows, size});
    const auto chain = [&](cuda::Linear& linear) {
      cuda::rms_norm(stream_, Tensor::of(start.data(), {rows, size}),
                     Tensor::of(norm_weight.data(), {size}), 1e-6f, at);
      for (int i = 0; i < 8; ++i) linear.run(i % 2 == 0 ? at : bt, weight, i % 2 == 0 ? bt : at);
    };
    const auto poison = [&] {
      CUDA_CHECK(cudaMemsetAsync(a.data(), 0xff, a.bytes(), stream_));
      CUDA_CHECK(cudaMemsetAsync(b.data(), 0xff, b.bytes(), stream_));
    };
    chain(*linear_);
    const std::vector<float> expected = widened(a.host());
    poison();
    chain(overlapping);
    const std::vector<float> direct = widened(a.host());
    // Only cuBLASLt may take another algorithm for each object, whose rounding eight layers carry.
    EXPECT_TRUE(rows <= cuda::kFewRows ? test::bitwise_equal(direct, expected)
                                       : test::near_relative_to_largest(direct, expected, 0x1p-6f))
        << rows;

    cudaGraph_t graph = nullptr;
    cudaGraphExec_t exec = nullptr;
    CUDA_CHECK(cudaStreamBeginCapture(stream_, cudaStreamCaptureModeThreadLocal));
    for (int i = 0; i < 10; ++i) chain(overlapping);
    CUDA_CHECK(cudaStreamEndCapture(stream_, &graph));
    CUDA_CHECK(cudaGraphInstantiate(&exec, graph, 0));
    for (int replay = 0; replay < 3; ++replay) {
      poison();
      CUDA_CHECK(cudaGraphLaunch(exec, stream_));
      EXPECT_TRUE(test::bitwise_equal(widened(a.host()), direct)) << rows;
    }
    cudaGraphExecDestroy(exec);
    cudaGraphDestroy(graph);
  }
}

TEST_F(CudaLinearTest, RecordsAShapeItHasNotSeen) {
  const Shape s{40, 136, 264};
  const auto w = test::random_bf16(static_cast<size_t>(s.n * s.k), 19);
  const auto x = test::random_bf16(static_cast<size_t>(s.rows * s.k), 20);
  const DeviceArray<bf16> device_w(w), device_x(x);
  const DeviceArray<float> y(static_cast<size_t>(s.rows * s.n));
  cudaGraph_t graph = nullptr;
  cudaGraphExec_t exec = nullptr;
  CUDA_CHECK(cudaStreamBeginCapture(stream_, cudaStreamCaptureModeThreadLocal));
  linear_->run(Tensor::of(device_x.data(), {s.rows, s.k}),
               weight_of({Tensor::of(device_w.data(), {s.n, s.k})}),
               Tensor::of(y.data(), {s.rows, s.n}));
  CUDA_CHECK(cudaStreamEndCapture(stream_, &graph));
  CUDA_CHECK(cudaGraphInstantiate(&exec, graph, 0));
  CUDA_CHECK(cudaGraphLaunch(exec, stream_));
  wait();
  expect_near(y.host(), product(x, w, s), false, s);
  cudaGraphExecDestroy(exec);
  cudaGraphDestroy(graph);
}

TEST_F(CudaLinearTest, NoRowsDoNothing) {
  const DeviceArray<bf16> w(64);
  const LinearWeight weight = weight_of({Tensor::of(w.data(), {8, 8})});
  linear_->run(Tensor::of(static_cast<bf16*>(nullptr), {0, 8}), weight,
               Tensor::of(static_cast<bf16*>(nullptr), {0, 8}));
  linear_->run_fused(Tensor::of(static_cast<bf16*>(nullptr), {0, 8}), weight, LinearResult::kAdd,
                     Tensor::of(static_cast<float*>(nullptr), {0, 8}));
  wait();
}

TEST_F(CudaLinearTest, OtherKAreRefused) {
  GTEST_FLAG_SET(death_test_style, "threadsafe");
  const Tensor x = Tensor::of(static_cast<bf16*>(nullptr), {1, 12});
  const LinearWeight weight = weight_of({Tensor::of(static_cast<bf16*>(nullptr), {8, 12})});
  EXPECT_DEATH(linear_->run(x, weight, Tensor::of(static_cast<bf16*>(nullptr), {1, 8})),
               "k must be a positive multiple of 8");
}

}  // namespace
}  // namespace kvarn
