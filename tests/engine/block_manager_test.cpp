#include "engine/block_manager.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>

namespace kvarn {
namespace {

const KvLayout kFp16 = make_kv_layout(KvFormat::kFp16, 128);
const KvLayout kK4V2 = make_kv_layout(KvFormat::kKvarnK4V2, 128);

std::vector<int32_t> ids_of(int seed) {
  std::vector<int32_t> ids(kBlockTokens);
  for (size_t i = 0; i < ids.size(); ++i) ids[i] = seed * 1000 + static_cast<int32_t>(i);
  return ids;
}

TEST(BlockManagerTest, AnExactBlockTakesAPageEach27TokensAsItFills) {
  BlockManager blocks(kK4V2, 20, true);
  const BlockId id = blocks.try_new_block(1, 1);
  for (int tokens = 1; tokens <= 128; ++tokens) {
    ASSERT_TRUE(blocks.try_grow(id, tokens));
    ASSERT_EQ(blocks.block(id).num_pages, (tokens + 26) / 27) << tokens;
    ASSERT_EQ(blocks.stats().pages_in_use, (tokens + 26) / 27);
  }
  EXPECT_EQ(blocks.stats().tail_pages, 5);
  EXPECT_EQ(blocks.stats().live_tokens, 128);
  EXPECT_EQ(blocks.audit(false), 0);
  blocks.release(id);
  EXPECT_EQ(blocks.stats().pages_free, 20);
  EXPECT_EQ(blocks.audit(true), 0);
}

TEST(BlockManagerTest, CompleteTilesOfAPrefillTakeOnePageAndTheSinkAllItsRows) {
  BlockManager blocks(kK4V2, 20, true);
  EXPECT_EQ(blocks.block(blocks.try_new_block(0, 128)).num_pages, 5);
  const BlockId coded = blocks.try_new_block(1, 128);
  EXPECT_TRUE(blocks.block(coded).coded);
  EXPECT_EQ(blocks.block(coded).num_pages, 1);
  EXPECT_EQ(blocks.block(blocks.try_new_block(2, 104)).num_pages, 4);
  EXPECT_EQ(blocks.stats().sink_pages, 5);
  EXPECT_EQ(blocks.stats().coded_pages, 1);
  EXPECT_EQ(blocks.stats().tail_pages, 4);
}

TEST(BlockManagerTest, AnEncodeTakesTheReserveAndItsSourcesServeTheSameStepsRows) {
  BlockManager blocks(kK4V2, 6, true);
  blocks.set_reserve(1);
  const BlockId id = blocks.try_new_block(1, 127);
  ASSERT_TRUE(blocks.try_grow(id, 128));
  EXPECT_EQ(blocks.try_new_block(2, 1), kNoBlock) << "the last page is the reserve";
  const BlockPages sources = blocks.block(id).pages;
  const auto tile = blocks.try_encode(id);
  ASSERT_TRUE(tile.has_value());
  EXPECT_EQ(tile->first_row, -1);
  EXPECT_EQ(tile->source_pages, sources);
  EXPECT_THAT(sources, testing::Not(testing::Contains(tile->target_page)));
  EXPECT_EQ(blocks.stats().pages_in_use, 1);
  EXPECT_EQ(blocks.encode_targets(), 0) << "sources are no target for another encode of the step";
  const BlockId tail = blocks.try_new_block(2, 1);
  ASSERT_NE(tail, kNoBlock);
  EXPECT_THAT(sources, testing::Contains(blocks.block(tail).pages[0]));
  blocks.begin_step();
  EXPECT_EQ(blocks.encode_targets(), 4);
  EXPECT_EQ(blocks.audit(false), 0);
}

TEST(BlockManagerTest, WithoutATargetNothingIsEncoded) {
  BlockManager blocks(kK4V2, 5, true);
  const BlockId id = blocks.try_new_block(1, 127);
  ASSERT_TRUE(blocks.try_grow(id, 128));
  EXPECT_FALSE(blocks.try_encode(id).has_value());
  EXPECT_FALSE(blocks.block(id).coded);
  EXPECT_EQ(blocks.audit(false), 0);
}

TEST(BlockManagerTest, FullBlocksStayCachedWithoutUsersAndAreFoundAgain) {
  BlockManager blocks(kK4V2, 20, true);
  const BlockId a = blocks.publish(blocks.try_new_block(0, 128), kNoBlock, ids_of(1), "");
  const BlockId b = blocks.publish(blocks.try_new_block(1, 128), a, ids_of(2), "");
  blocks.release(std::vector<BlockId>{a, b});
  EXPECT_EQ(blocks.stats().pages_cached, 6);
  EXPECT_EQ(blocks.stats().cached_tokens, 256);
  EXPECT_EQ(blocks.available_pages(), 20);
  EXPECT_EQ(blocks.audit(true), 0);

  std::vector<int32_t> tokens = ids_of(1);
  const std::vector<int32_t> second = ids_of(2);
  tokens.insert(tokens.end(), second.begin(), second.end());
  EXPECT_EQ(blocks.find_prefix(tokens, 2, ""), (std::vector<BlockId>{a, b}));
  EXPECT_EQ(blocks.find_prefix(tokens, 1, ""), (std::vector<BlockId>{a}));
  EXPECT_TRUE(blocks.find_prefix(tokens, 2, "salt").empty());
  blocks.acquire(a);
  blocks.acquire(a);
  EXPECT_EQ(blocks.stats().pages_in_use, 5) << "shared pages count once";
  EXPECT_EQ(blocks.stats().pages_cached, 1);
}

TEST(BlockManagerTest, EvictsCachedBlocksOnlyWhenFreePagesRunOut) {
  BlockManager blocks(kK4V2, 6, true);
  const BlockId a = blocks.publish(blocks.try_new_block(0, 128), kNoBlock, ids_of(1), "");
  blocks.release(a);
  EXPECT_NE(blocks.try_new_block(1, 1), kNoBlock);
  EXPECT_EQ(blocks.find_prefix(ids_of(1), 1, "").size(), 1u);
  EXPECT_NE(blocks.try_new_block(1, 1), kNoBlock);
  EXPECT_TRUE(blocks.find_prefix(ids_of(1), 1, "").empty());
  EXPECT_EQ(blocks.stats().pages_free, 4);
  EXPECT_EQ(blocks.audit(false), 0);
}

TEST(BlockManagerTest, OfABlockComputedTwiceTheFirstCopyStays) {
  BlockManager blocks(kK4V2, 20, true);
  const BlockId first = blocks.publish(blocks.try_new_block(0, 128), kNoBlock, ids_of(1), "");
  const BlockId mine = blocks.try_new_block(0, 128);
  EXPECT_EQ(blocks.publish(mine, kNoBlock, ids_of(1), ""), first);
  EXPECT_EQ(blocks.block(first).ref_count, 2);
  EXPECT_EQ(blocks.stats().pages_in_use, 5);
  EXPECT_EQ(blocks.audit(false), 0);
}

TEST(BlockManagerTest, ARecordTakesThePlaceOfTheExactCopyOfTheSameBlock) {
  BlockManager blocks(kK4V2, 30, true);
  const BlockId root = blocks.publish(blocks.try_new_block(0, 128), kNoBlock, ids_of(1), "");
  const BlockId decoded = blocks.try_new_block(1, 127);
  ASSERT_TRUE(blocks.try_grow(decoded, 128));
  const BlockId first = blocks.publish(decoded, root, ids_of(2), "");
  const BlockId prefilled = blocks.try_new_block(1, 128);
  const PageId record = blocks.block(prefilled).pages[0];
  EXPECT_EQ(blocks.publish(prefilled, root, ids_of(2), ""), first);
  EXPECT_TRUE(blocks.block(first).coded);
  EXPECT_EQ(blocks.block(first).pages[0], record);
  EXPECT_EQ(blocks.stats().pages_in_use, 6);
  EXPECT_EQ(blocks.audit(false), 0);
}

TEST(BlockManagerTest, ExactBlocksBeyondTheSinkAskToBeEncodedOnceUnused) {
  BlockManager blocks(kK4V2, 30, true);
  const BlockId root = blocks.publish(blocks.try_new_block(0, 128), kNoBlock, ids_of(1), "");
  BlockId tail = blocks.try_new_block(1, 127);
  ASSERT_TRUE(blocks.try_grow(tail, 128));
  tail = blocks.publish(tail, root, ids_of(2), "");
  EXPECT_TRUE(blocks.take_blocks_to_encode().empty());
  blocks.release(std::vector<BlockId>{root, tail});
  EXPECT_EQ(blocks.take_blocks_to_encode(), std::vector<BlockId>{tail});
  EXPECT_TRUE(blocks.take_blocks_to_encode().empty());
  const std::vector<BlockId> chain = blocks.acquire_chain(tail);
  EXPECT_EQ(chain, (std::vector<BlockId>{root, tail}));
  ASSERT_TRUE(blocks.try_encode(tail).has_value());
  blocks.release(chain);
  EXPECT_EQ(blocks.stats().pages_cached, 6);
  EXPECT_EQ(blocks.audit(true), 0);
}

TEST(BlockManagerTest, Fp16NeverEncodes) {
  BlockManager blocks(kFp16, 30, true);
  const BlockId root = blocks.publish(blocks.try_new_block(0, 128), kNoBlock, ids_of(1), "");
  const BlockId next = blocks.publish(blocks.try_new_block(1, 128), root, ids_of(2), "");
  EXPECT_EQ(blocks.block(next).num_pages, 4);
  blocks.release(std::vector<BlockId>{root, next});
  EXPECT_TRUE(blocks.take_blocks_to_encode().empty());
  EXPECT_EQ(blocks.stats().dense_pages, 8);
}

TEST(BlockManagerTest, AForgottenBlockIsFoundNoMoreAndGoesWithItsLastUser) {
  BlockManager blocks(kK4V2, 20, true);
  const BlockId a = blocks.publish(blocks.try_new_block(0, 128), kNoBlock, ids_of(1), "");
  blocks.forget(a);
  EXPECT_TRUE(blocks.find_prefix(ids_of(1), 1, "").empty());
  blocks.release(a);
  EXPECT_EQ(blocks.stats().pages_free, 20);
  EXPECT_EQ(blocks.audit(true), 0);
}

TEST(BlockManagerTest, WithTheCacheOffReleasedBlocksAreFree) {
  BlockManager blocks(kK4V2, 20, false);
  blocks.release(blocks.try_new_block(0, 128));
  EXPECT_EQ(blocks.stats().pages_free, 20);
  EXPECT_TRUE(blocks.find_prefix(ids_of(1), 1, "").empty());
}

TEST(BlockManagerTest, AnAuditAtRestCountsPagesThatNobodyGaveBack) {
  BlockManager blocks(kK4V2, 20, true);
  ASSERT_NE(blocks.try_new_block(0, 30), kNoBlock);
  EXPECT_EQ(blocks.audit(/*idle=*/false), 0);
  EXPECT_EQ(blocks.audit(/*idle=*/true), 2);
}

}  // namespace
}  // namespace kvarn
