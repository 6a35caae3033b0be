#include <gtest/gtest.h>

#include <cmath>

#include "kernels/ops_cpu.h"
#include "kernels/ops_cuda.h"
#include "tests/support/cuda_fixture.h"
#include "tests/support/random_tensor.h"

namespace kvarn {
namespace {

using CudaActivationTest = test::CudaTest;
using test::DeviceArray;

TEST_F(CudaActivationTest, SiluMulMatchesTheCpuTwin) {
  struct Case {
    int64_t rows, ffn;
  };
  ThreadPool pool(1);
  for (const Case c : {Case{1, 8}, Case{3, 24}, Case{127, 72}, Case{128, 128}, Case{129, 1000},
                       Case{1, 3072}, Case{5, 12288}}) {
    const auto size = static_cast<size_t>(c.rows * c.ffn);
    // Gates up to +-100: e^-x overflows there and must still give x or 0.
    std::vector<bf16> gate_up = test::random_bf16(2 * size, 1, -100, 100);
    for (size_t i = 0; i < gate_up.size(); i += 2) {
      gate_up[i] = to_bf16(to_float(gate_up[i]) / 50);
    }
    std::vector<float> wide, expected(size);
    for (const bf16 value : gate_up) wide.push_back(to_float(value));
    cpu::silu_mul(Tensor::of(wide.data(), {c.rows, 2 * c.ffn}),
                  Tensor::of(expected.data(), {c.rows, c.ffn}), pool, CpuIsa::kScalar);
    const DeviceArray<bf16> device(gate_up), y(size);
    cuda::silu_mul(stream_, Tensor::of(device.data(), {c.rows, 2 * c.ffn}),
                   Tensor::of(y.data(), {c.rows, c.ffn}));
    const std::vector<bf16> values = y.host();
    for (size_t i = 0; i < size; ++i) {
      // Half of the last bit of a bf16 is up to 2^-8 of its value; another expf may move a value
      // over a rounding border. Below 1e-30 the twin's clamped exponential and the true one part.
      ASSERT_NEAR(to_float(values[i]), expected[i],
                  1.01f * 0x1p-8f * std::abs(expected[i]) + 1e-30f)
          << c.rows << " x " << c.ffn << " at " << i;
    }
  }
}

TEST_F(CudaActivationTest, NoRowsDoNothing) {
  cuda::silu_mul(stream_, Tensor::of(static_cast<bf16*>(nullptr), {0, 64}),
                 Tensor::of(static_cast<bf16*>(nullptr), {0, 32}));
  wait();
}

}  // namespace
}  // namespace kvarn
