#include <gtest/gtest.h>

#include "kernels/ops_cpu.h"
#include "tests/support/random_tensor.h"
#include "tests/support/tensor_matchers.h"

namespace kvarn {
namespace {

TEST(EmbeddingTest, RowsAreTheTableWidenedExactly) {
  ThreadPool pool(2);
  const int64_t vocab = 50, hidden = 37, rows = 100;
  const auto values = test::random_floats(static_cast<size_t>(vocab * hidden), 1);
  const auto ids = test::random_tokens(static_cast<size_t>(rows), static_cast<int>(vocab), 2);
  std::vector<bf16> as_bf16;
  std::vector<half> as_half;
  std::vector<float> as_float = values;
  for (const float v : values) {
    as_bf16.push_back(to_bf16(v));
    as_half.push_back(to_half(v));
  }
  const auto check = [&](auto& table) {
    std::vector<float> out(static_cast<size_t>(rows * hidden), -1.f);
    cpu::embed(ids.data(), Tensor::of(table.data(), {vocab, hidden}),
               Tensor::of(out.data(), {rows, hidden}), pool);
    for (int64_t row = 0; row < rows; ++row) {
      for (int64_t i = 0; i < hidden; ++i) {
        const auto source = static_cast<size_t>(ids[static_cast<size_t>(row)] * hidden + i);
        ASSERT_EQ(out[static_cast<size_t>(row * hidden + i)], to_float(table[source]));
      }
    }
  };
  check(as_bf16);
  check(as_half);
  check(as_float);
}

TEST(EmbeddingDeathTest, AnIdOutsideTheVocabularyIsABug) {
  ThreadPool pool(1);
  std::vector<float> table(8), out(4);
  const int32_t id = 2;
  EXPECT_DEATH(
      cpu::embed(&id, Tensor::of(table.data(), {2, 4}), Tensor::of(out.data(), {1, 4}), pool),
      "token id outside the vocabulary");
}

TEST(GatherRowsTest, CopiesTheNamedRowsInOrder) {
  ThreadPool pool(2);
  auto x = test::random_floats(20 * 7, 3);
  const std::vector<int32_t> rows = {19, 0, 0, 5};
  std::vector<float> y(rows.size() * 7);
  cpu::gather_rows(Tensor::of(x.data(), {20, 7}), rows, Tensor::of(y.data(), {4, 7}), pool);
  for (size_t i = 0; i < rows.size(); ++i) {
    EXPECT_TRUE(test::bitwise_equal(std::span(y).subspan(i * 7, 7),
                                    std::span(x).subspan(static_cast<size_t>(rows[i]) * 7, 7)));
  }
}

}  // namespace
}  // namespace kvarn
