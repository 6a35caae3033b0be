#include "kernels/random_fill.h"

#include <gtest/gtest.h>

#include "kernels/ops_cpu.h"
#include "kernels/ops_cuda.h"
#include "tests/support/cuda_fixture.h"

namespace kvarn {
namespace {

using CudaRandomFillTest = test::CudaTest;
using test::DeviceArray;

TEST_F(CudaRandomFillTest, GivesTheBitsOfTheCpuTwin) {
  ThreadPool pool(1);
  constexpr float kStddev = 0.02f;
  const std::vector<bf16> host_quantiles = normal_quantiles(kStddev);
  const DeviceArray<bf16> quantiles(host_quantiles);
  for (const int64_t size : {1, 3, 4, 7, 8, 9, 127, 128, 129, 2047, 2048, 2049, 1 << 20}) {
    for (const uint64_t seed : {uint64_t{0}, uint64_t{0xfedcba9876543210u}}) {
      std::vector<bf16> expected(static_cast<size_t>(size));
      cpu::fill_normal(Tensor::of(expected.data(), {size}), kStddev, seed, pool);
      const DeviceArray<bf16> out(static_cast<size_t>(size + 16));
      cuda::fill_normal(stream_, Tensor::of(out.data(), {size}), quantiles.data(), seed);
      const std::vector<bf16> values = out.host();
      for (int64_t i = 0; i < size; ++i) {
        ASSERT_EQ(values[static_cast<size_t>(i)].bits, expected[static_cast<size_t>(i)].bits)
            << i << " of " << size;
        ASSERT_EQ(expected[static_cast<size_t>(i)].bits,
                  host_quantiles[quantile_index(seed, i)].bits);
        if (size > 4096 && i > 64) i += 96;  // the large fill in steps
      }
      for (int64_t i = size; i < size + 16; ++i) {
        ASSERT_EQ(values[static_cast<size_t>(i)].bits, 0xffff) << "written behind the end";
      }
    }
  }
}

TEST_F(CudaRandomFillTest, NoElementsDoNothing) {
  cuda::fill_normal(stream_, Tensor::of(static_cast<bf16*>(nullptr), {0}), nullptr, 1);
  wait();
}

}  // namespace
}  // namespace kvarn
