// The CPU behind the seam: what it says about itself, and that it refuses shapes that are bugs. The
// ops themselves are tested one by one beside this file.
#include <gtest/gtest.h>

#include "kernels/backend.h"
#include "kernels/ops_cpu.h"
#include "tests/kernels/isa_param.h"
#include "tests/support/random_tensor.h"
#include "tests/support/tensor_matchers.h"

namespace kvarn {
namespace {

using BackendCpuTest = test::IsaTest;

CpuOptions options(CpuIsa isa, int threads) {
  CpuOptions o;
  o.isa = isa;
  o.threads = threads;
  return o;
}

TEST_P(BackendCpuTest, NamesItsIsaAndThreads) {
  const auto backend = make_cpu_backend(options(GetParam(), 2));
  EXPECT_EQ(backend->name(), std::string("cpu (") + cpu_isa_name(GetParam()) + ", 2 threads)");
  EXPECT_EQ(backend->threads(), 2);
  EXPECT_EQ(backend->activation_dtype(), DType::kF32);
}

TEST_P(BackendCpuTest, AFusedBlockIsTheSameAloneAndInABatch) {
  // norm -> gate/up -> silu_mul -> down -> residual: the ops chained through the seam.
  const int64_t hidden = 96, ffn = 160, rows = 19;
  auto gate = test::random_bf16(static_cast<size_t>(ffn * hidden), 1);
  auto up = test::random_bf16(static_cast<size_t>(ffn * hidden), 2);
  auto down = test::random_bf16(static_cast<size_t>(hidden * ffn), 3);
  auto norm = test::random_bf16(static_cast<size_t>(hidden), 4);
  const auto x = test::random_floats(static_cast<size_t>(rows * hidden), 5);
  const auto block = [&](Backend& backend, std::vector<float> residual) {
    const int64_t n = static_cast<int64_t>(residual.size()) / hidden;
    std::vector<float> y(residual.size()), gu(static_cast<size_t>(n * 2 * ffn)),
        h(static_cast<size_t>(n * ffn));
    backend.rms_norm(Tensor::of(residual.data(), {n, hidden}), Tensor::of(norm.data(), {hidden}),
                     1e-6f, Tensor::of(y.data(), {n, hidden}));
    LinearWeight gate_up, project;
    gate_up.parts = {Tensor::of(gate.data(), {ffn, hidden}), Tensor::of(up.data(), {ffn, hidden})};
    gate_up.num_parts = 2;
    project.parts[0] = Tensor::of(down.data(), {hidden, ffn});
    project.num_parts = 1;
    backend.linear(Tensor::of(y.data(), {n, hidden}), gate_up, Tensor::of(gu.data(), {n, 2 * ffn}));
    backend.silu_mul(Tensor::of(gu.data(), {n, 2 * ffn}), Tensor::of(h.data(), {n, ffn}));
    backend.linear(Tensor::of(h.data(), {n, ffn}), project, Tensor::of(y.data(), {n, hidden}));
    backend.add(Tensor::of(residual.data(), {n, hidden}), Tensor::of(y.data(), {n, hidden}));
    return residual;
  };
  const auto one = make_cpu_backend(options(GetParam(), 1));
  const auto two = make_cpu_backend(options(GetParam(), 2));
  const std::vector<float> batch = block(*two, x);
  for (int64_t row = 0; row < rows; ++row) {
    ASSERT_TRUE(test::bitwise_equal(
        block(*one, {x.begin() + row * hidden, x.begin() + (row + 1) * hidden}),
        std::span(batch).subspan(static_cast<size_t>(row * hidden), static_cast<size_t>(hidden))));
  }
}

INSTANTIATE_FOR_EVERY_ISA(BackendCpuTest);

TEST(CpuFeaturesTest, EveryLevelBelowTheBestIsSupported) {
  bool above_best = false;
  for (const CpuIsa isa : test::kAllIsas) {
    EXPECT_EQ(cpu_isa_supported(isa), !above_best) << cpu_isa_name(isa);
    above_best |= isa == best_cpu_isa();
  }
  EXPECT_TRUE(above_best);
}

TEST(CpuFeaturesTest, AProcessHasAtLeastOneCore) {
  EXPECT_GE(cpu::physical_cores(), 1);
  EXPECT_EQ(make_cpu_backend({})->threads(), cpu::physical_cores());
}

TEST(BackendCpu, UploadKeepsMappedWeightsWhereTheyAre) {
  const auto backend = make_cpu_backend(options(best_cpu_isa(), 1));
  const float weights[4] = {};
  Buffer unused;
  EXPECT_EQ(backend->upload(weights, sizeof(weights), unused, 0), weights);
  EXPECT_EQ(unused.bytes(), 0u);
}

TEST(BackendCpuDeathTest, AWrongShapeIsABug) {
  const auto backend = make_cpu_backend(options(best_cpu_isa(), 1));
  std::vector<float> x(32), y(32), w(8);
  EXPECT_DEATH(backend->rms_norm(Tensor::of(x.data(), {4, 8}), Tensor::of(w.data(), {7}), 1e-6f,
                                 Tensor::of(y.data(), {4, 8})),
               "weight is \\[hidden\\]");
  LinearWeight weight;
  weight.num_parts = 1;
  weight.parts[0] = Tensor::of(w.data(), {1, 8});
  EXPECT_DEATH(backend->linear(Tensor::of(x.data(), {4, 8}), weight, Tensor::of(y.data(), {4, 2})),
               "y is f32 \\[rows, n\\]");
}

}  // namespace
}  // namespace kvarn
