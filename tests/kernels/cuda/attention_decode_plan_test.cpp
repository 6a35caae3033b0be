// How a decode step's pages are divided over thread blocks: every page of every list exactly once,
// whatever the lengths, and shares of nearly one size. Runs without a GPU.
#include "kernels/attention_decode_plan.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <map>
#include <random>
#include <utility>
#include <vector>

namespace kvarn::cuda {
namespace {

constexpr KvFormat kFormats[] = {KvFormat::kFp16, KvFormat::kKvarnK4V2, KvFormat::kKvarnK4V4};

DecodeList list_of(const KvLayout& layout, int32_t position) {
  return decode_list(layout.coded(), layout.pages_per_exact_block, layout.exact_rows, position);
}

TEST(DecodeListTest, ItemsAreTheBlocksOfTheReadingRuleInOrder) {
  for (const KvFormat format : kFormats) {
    const KvLayout layout = make_kv_layout(format, 128);
    for (const int32_t position : {0, 1, 26, 27, 31, 32, 126, 127, 128, 129, 154, 155, 255, 256,
                                   257, 383, 384, 4095, 5000}) {
      std::vector<DecodeList::Item> expected;
      for (int32_t block = 0; block <= position / kBlockTokens; ++block) {
        if (layout.coded() && reads_coded(block, position, position)) {
          expected.push_back({block, 0, 0});
          continue;
        }
        const int32_t tokens = std::min(kBlockTokens, position + 1 - block * kBlockTokens);
        for (int32_t page = 0; page * layout.exact_rows < tokens; ++page) {
          expected.push_back(
              {block, page, std::min(layout.exact_rows, tokens - page * layout.exact_rows)});
        }
      }
      const DecodeList list = list_of(layout, position);
      ASSERT_EQ(static_cast<size_t>(list.items), expected.size()) << "position " << position;
      for (int32_t i = 0; i < list.items; ++i) {
        const DecodeList::Item item = list.item(i, layout.pages_per_exact_block, layout.exact_rows);
        const DecodeList::Item& e = expected[static_cast<size_t>(i)];
        EXPECT_EQ(item.block, e.block) << "position " << position << ", item " << i;
        EXPECT_EQ(item.page, e.page) << "position " << position << ", item " << i;
        EXPECT_EQ(item.rows, e.rows) << "position " << position << ", item " << i;
      }
    }
  }
}

struct Plan {
  std::vector<std::byte> bytes;
  int grid;
  const DecodeShare& share(int block) const {
    return reinterpret_cast<const DecodeShare*>(bytes.data())[block];
  }
  DecodeSegment segment(int block, int i) const {
    const auto* rest = reinterpret_cast<const DecodeSegment*>(
        reinterpret_cast<const DecodeShare*>(bytes.data()) + grid);
    return i == 0 ? share(block).first : rest[share(block).rest + i - 1];
  }
};

Plan plan_of(const KvLayout& layout, int kv_heads, int grid,
             const std::vector<AttentionSequence>& sequences) {
  Plan plan{std::vector<std::byte>(
                max_decode_plan_bytes(grid, static_cast<int>(sequences.size()), kv_heads)),
            grid};
  const size_t used = plan_decode(layout, kv_heads, grid, sequences, plan.bytes.data());
  EXPECT_LE(used, plan.bytes.size());
  plan.bytes.resize(used);
  return plan;
}

std::vector<AttentionSequence> sequences_of(const std::vector<int32_t>& lengths) {
  std::vector<AttentionSequence> sequences;
  int32_t row = 0, block = 0;
  for (const int32_t length : lengths) {  // 0: fills the batch up
    sequences.push_back({row++, length > 0 ? 1 : 0, std::max(length - 1, 0), block});
    block += (length + kBlockTokens - 1) / kBlockTokens;
  }
  return sequences;
}

// Every item once, parts in order, partials apart; the largest share in items.
int64_t check_plan(const KvLayout& layout, int kv_heads, const std::vector<int32_t>& lengths,
                   int grid) {
  const std::vector<AttentionSequence> sequences = sequences_of(lengths);
  const Plan plan = plan_of(layout, kv_heads, grid, sequences);
  std::map<std::pair<int32_t, int32_t>, std::vector<DecodeSegment>> lists;  // of (row, head)
  int64_t largest = 0;
  for (int block = 0; block < grid; ++block) {
    int64_t items = 0;
    for (int i = 0; i < plan.share(block).segments; ++i) {
      const DecodeSegment segment = plan.segment(block, i);
      EXPECT_LT(segment.begin, segment.end);
      items += segment.end - segment.begin;
      lists[{segment.row, segment.head}].push_back(segment);
    }
    EXPECT_EQ(items, plan.share(block).items);
    largest = std::max(largest, items);
  }
  std::vector<bool> partial_used(static_cast<size_t>(max_decode_partials(grid)));
  size_t with_work = 0;
  for (const AttentionSequence& s : sequences) {
    if (s.num_rows == 0) continue;
    for (int32_t head = 0; head < kv_heads; ++head, ++with_work) {
      const std::vector<DecodeSegment>& parts = lists[{s.first_row, head}];
      int32_t at = 0;
      for (size_t p = 0; p < parts.size(); ++p) {
        EXPECT_EQ(parts[p].begin, at);
        at = parts[p].end;
        EXPECT_EQ(parts[p].position, s.first_position);
        EXPECT_EQ(parts[p].first_block, s.first_block);
        EXPECT_EQ(static_cast<size_t>(parts[p].parts), parts.size());
        if (parts.size() == 1) continue;
        EXPECT_EQ(parts[p].partial, parts[p].first_partial + static_cast<int32_t>(p));
        const auto partial = static_cast<size_t>(parts[p].partial);
        EXPECT_LT(partial, partial_used.size());
        if (partial >= partial_used.size()) continue;
        EXPECT_FALSE(partial_used[partial]) << "two parts with one place";
        partial_used[partial] = true;
      }
      EXPECT_EQ(at, list_of(layout, s.first_position).items)
          << "row " << s.first_row << ", head " << head;
    }
  }
  EXPECT_EQ(lists.size(), with_work) << "no work for rows that fill the batch up";
  return largest;
}

TEST(DecodePlanTest, EveryPageIsReadOnceByRaggedBatches) {
  std::mt19937_64 engine(7);
  for (const KvFormat format : kFormats) {
    const KvLayout layout = make_kv_layout(format, 128);
    for (const int grid : {1, 2, 3, 114, 132, 264}) {
      for (int round = 0; round < 40; ++round) {
        std::vector<int32_t> lengths(1 + engine() % 70);
        const auto longest = static_cast<int32_t>(1 + (1 << (engine() % 15)));
        for (int32_t& length : lengths) {
          length = static_cast<int32_t>(engine() % static_cast<uint64_t>(longest));
          if (engine() % 8 == 0) length *= 4;
        }
        const int kv_heads = static_cast<int>(1 + engine() % 8);
        const int64_t largest = check_plan(layout, kv_heads, lengths, grid);
        int64_t total = 0;
        for (const int32_t length : lengths) {
          if (length > 0) total += int64_t{list_of(layout, length - 1).items} * kv_heads;
        }
        // The planner trades at most 4 % and 4 items for borders between lists.
        const int64_t least = (total + grid - 1) / grid;
        EXPECT_LE(largest, least + least / 25 + 4);
        if (HasFailure()) return;
      }
    }
  }
}

TEST(DecodePlanTest, ListsOfOneLengthAreCutAtTheirBorders) {
  const KvLayout layout = make_kv_layout(KvFormat::kKvarnK4V2, 128);
  // 8 lists of 136 items, 16 parts each on 128 of 132 thread blocks.
  const Plan plan = plan_of(layout, 8, 132, sequences_of({16384}));
  for (int block = 0; block < 128; ++block) {
    EXPECT_EQ(plan.share(block).segments, 1);
    EXPECT_EQ(plan.share(block).first.parts, 16);
  }
  EXPECT_EQ(check_plan(layout, 8, {16384}, 132), 9);
}

TEST(DecodePlanTest, StepsWithoutDecodesGiveNobodyWork) {
  const KvLayout layout = make_kv_layout(KvFormat::kKvarnK4V2, 128);
  EXPECT_EQ(check_plan(layout, 8, {}, 132), 0);
  EXPECT_EQ(check_plan(layout, 8, {0, 0, 0}, 132), 0);
}

TEST(DecodePlanTest, OneListMayBeCutForEveryThreadBlock) {
  const KvLayout layout = make_kv_layout(KvFormat::kFp16, 128);
  EXPECT_LE(check_plan(layout, 1, {100000}, 132), 24);
  EXPECT_LE(check_plan(layout, 1, {100000}, 1), 3125);
}

}  // namespace
}  // namespace kvarn::cuda
