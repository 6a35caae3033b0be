#include <gtest/gtest.h>

#include <cstring>

#include "kernels/ops_cpu.h"
#include "kernels/ops_cuda.h"
#include "tests/support/cuda_fixture.h"
#include "tests/support/random_tensor.h"
#include "tests/support/tensor_matchers.h"

namespace kvarn {
namespace {

using CudaEmbeddingTest = test::CudaTest;
using test::DeviceArray;

template <typename T>
std::vector<T> random_table(size_t size) {
  std::vector<T> table;
  for (const float value : test::random_floats(size, 1, -3, 3)) {
    if constexpr (std::is_same_v<T, bf16>) {
      table.push_back(to_bf16(value));
    } else if constexpr (std::is_same_v<T, half>) {
      table.push_back(to_half(value));
    } else {
      table.push_back(value);
    }
  }
  return table;
}

template <typename T>
void check_embed(cudaStream_t stream, int64_t rows, int64_t hidden) {
  constexpr int kVocab = 301;
  ThreadPool pool(1);
  auto table = random_table<T>(static_cast<size_t>(kVocab * hidden));
  auto ids = test::random_tokens(static_cast<size_t>(rows), kVocab, 2);
  ids.front() = 0;
  ids.back() = kVocab - 1;
  std::vector<float> expected(static_cast<size_t>(rows * hidden));
  cpu::embed(ids.data(), Tensor::of(table.data(), {kVocab, hidden}),
             Tensor::of(expected.data(), {rows, hidden}), pool);
  const DeviceArray<T> device_table(table);
  const DeviceArray<int32_t> device_ids(ids);
  const DeviceArray<float> out(expected.size());
  cuda::embed(stream, device_ids.data(), Tensor::of(device_table.data(), {kVocab, hidden}),
              Tensor::of(out.data(), {rows, hidden}));
  EXPECT_TRUE(test::bitwise_equal(out.host(), expected)) << rows << " x " << hidden;
}

TEST_F(CudaEmbeddingTest, EmbedGivesTheCpuBits) {
  for (const int64_t rows : {1, 2, 127, 128, 129}) {
    for (const int64_t hidden : {8, 72, 1024, 5120}) {
      check_embed<bf16>(stream_, rows, hidden);
      check_embed<half>(stream_, rows, hidden);
      check_embed<float>(stream_, rows, hidden);
    }
  }
}

template <typename T>
void check_gather(cudaStream_t stream, int64_t rows, int64_t columns) {
  constexpr int kFrom = 130;
  const auto x = random_table<T>(static_cast<size_t>(kFrom * columns));
  auto picks = test::random_tokens(static_cast<size_t>(rows), kFrom, 3);
  picks.back() = kFrom - 1;
  const DeviceArray<T> device_x(x), y(static_cast<size_t>(rows * columns));
  const DeviceArray<int32_t> device_picks(picks);
  cuda::gather_rows(stream, Tensor::of(device_x.data(), {kFrom, columns}), device_picks.data(),
                    rows, Tensor::of(y.data(), {rows, columns}));
  const std::vector<T> values = y.host();
  for (int64_t row = 0; row < rows; ++row) {
    const size_t pick = static_cast<size_t>(picks[static_cast<size_t>(row)]);
    ASSERT_EQ(std::memcmp(&values[static_cast<size_t>(row * columns)],
                          &x[pick * static_cast<size_t>(columns)],
                          static_cast<size_t>(columns) * sizeof(T)),
              0)
        << "row " << row << " of " << rows << " x " << columns;
  }
}

TEST_F(CudaEmbeddingTest, GatherCopiesRows) {
  for (const int64_t rows : {1, 127, 128, 129}) {
    for (const int64_t columns : {1, 7, 66, 1024, 2051}) {  // every width of copy
      check_gather<float>(stream_, rows, columns);
      check_gather<bf16>(stream_, rows, columns);
    }
  }
}

TEST_F(CudaEmbeddingTest, NoRowsDoNothing) {
  const DeviceArray<float> x(64);
  const Tensor none = Tensor::of(static_cast<float*>(nullptr), {0, 8});
  cuda::embed(stream_, nullptr, Tensor::of(x.data(), {8, 8}), none);
  cuda::gather_rows(stream_, Tensor::of(x.data(), {8, 8}), nullptr, 0, none);
  wait();
}

}  // namespace
}  // namespace kvarn
