// Rows reach exactly the places that their slots name, for random page tables.
#include <gtest/gtest.h>

#include <cstring>

#include "kernels/kv_cpu.h"
#include "tests/kernels/kv_cache_driver.h"

namespace kvarn::test {
namespace {

TEST(KvLayoutTest, PagesHoldWholeRowsAndTiles) {
  for (const KvFormat format : {KvFormat::kFp16, KvFormat::kKvarnK4V2, KvFormat::kKvarnK4V4}) {
    const KvLayout l = make_kv_layout(format, 128);
    EXPECT_LE(l.v_row_offset(l.exact_rows - 1) + 256, static_cast<size_t>(l.page_bytes));
    EXPECT_LE(l.pages_per_exact_block, kMaxPagesPerBlock);
    EXPECT_GE(l.pages_per_exact_block * l.exact_rows, kBlockTokens);
    EXPECT_EQ(l.exact_pages(0), 0);
    EXPECT_EQ(l.exact_pages(1), 1);
    EXPECT_EQ(l.exact_pages(l.exact_rows), 1);
    EXPECT_EQ(l.exact_pages(l.exact_rows + 1), 2);
    if (l.coded()) {
      EXPECT_EQ(l.tile().bytes, l.page_bytes);
    }
  }
}

TEST(KvLayoutTest, ReadsCodedIsAFunctionOfPositions) {
  EXPECT_FALSE(reads_coded(0, 100000, 99968)) << "the sink stays exact";
  EXPECT_FALSE(reads_coded(1, 255, 128)) << "its own tile is exact";
  EXPECT_TRUE(reads_coded(1, 256, 128)) << "the next tile reads it coded, in the same chunk too";
  EXPECT_TRUE(reads_coded(1, 256, 256));
  EXPECT_FALSE(reads_coded(1, 256, 128, ReadingRule::kChunkStart));
  EXPECT_TRUE(reads_coded(1, 300, 256, ReadingRule::kChunkStart));
}

TEST(KvWriteTest, WritesEachRowToItsSlotAndNothingElse) {
  std::mt19937_64 engine(7);
  for (int round = 0; round < 60; ++round) {
    constexpr KvFormat kFormats[] = {KvFormat::kFp16, KvFormat::kKvarnK4V2, KvFormat::kKvarnK4V4};
    const KvFormat format = kFormats[round % 3];
    const int head_dim = format == KvFormat::kFp16 && round % 2 == 0 ? 64 : 128;
    const int heads = 1 + round % 3, pages = 9;
    const KvLayout layout = make_kv_layout(format, head_dim);
    const auto dim = static_cast<size_t>(head_dim);
    std::vector<std::byte> bytes(static_cast<size_t>(pages * heads * layout.page_bytes),
                                 std::byte{0xee});
    std::vector<std::byte> expected = bytes;
    std::vector<int64_t> all(static_cast<size_t>(pages * layout.exact_rows));
    for (size_t i = 0; i < all.size(); ++i) all[i] = static_cast<int64_t>(i);
    std::shuffle(all.begin(), all.end(), engine);
    const auto rows = static_cast<size_t>(engine() % 150);
    std::vector<int64_t> slots(all.begin(), all.begin() + static_cast<ptrdiff_t>(rows));
    for (int64_t& slot : slots)
      if (engine() % 5 == 0) slot = -1;
    const size_t count = rows * static_cast<size_t>(heads) * dim;
    std::vector<half> k = random_half(count, engine(), -4, 4);
    std::vector<half> v = random_half(count, engine(), -4, 4);
    for (size_t r = 0; r < rows; ++r) {
      if (slots[r] < 0) continue;
      for (int h = 0; h < heads; ++h) {
        std::byte* page =
            expected.data() + (slots[r] / layout.exact_rows * heads + h) * layout.page_bytes;
        const auto row = static_cast<size_t>(slots[r] % layout.exact_rows);
        const size_t from = (r * static_cast<size_t>(heads) + static_cast<size_t>(h)) * dim;
        std::memcpy(page + row * 2 * dim, &k[from], 2 * dim);
        std::memcpy(page + (static_cast<size_t>(layout.exact_rows) + row) * 2 * dim, &v[from],
                    2 * dim);
      }
    }
    ThreadPool pool(1 + round % 2);
    const auto n = static_cast<int64_t>(rows);
    cpu::kv_write({Tensor::of(k.data(), {n, heads, head_dim}),
                   Tensor::of(v.data(), {n, heads, head_dim}),
                   slots.data(),
                   {bytes.data(), pages, heads, layout}},
                  pool);
    ASSERT_TRUE(bytes == expected) << "round " << round;
  }
}

}  // namespace
}  // namespace kvarn::test
