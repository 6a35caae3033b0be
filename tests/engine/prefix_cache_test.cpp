#include "engine/prefix_cache.h"

#include <gtest/gtest.h>

#include <random>

namespace kvarn {
namespace {

std::vector<int32_t> ids_of(int seed) {
  std::vector<int32_t> ids(kBlockTokens);
  for (size_t i = 0; i < ids.size(); ++i) ids[i] = seed * 1000 + static_cast<int32_t>(i);
  return ids;
}

TEST(PrefixCacheTest, FindsABlockByItsParentAndIds) {
  PrefixCache cache(KvFormat::kFp16);
  cache.insert(7, kNoBlock, ids_of(1), "");
  cache.insert(8, 7, ids_of(2), "");
  EXPECT_EQ(cache.find(kNoBlock, ids_of(1), ""), 7);
  EXPECT_EQ(cache.find(7, ids_of(2), ""), 8);
  EXPECT_EQ(cache.find(kNoBlock, ids_of(2), ""), kNoBlock) << "the same ids elsewhere differ";
  EXPECT_EQ(cache.find(7, ids_of(1), ""), kNoBlock);
}

TEST(PrefixCacheTest, BlocksAreSharedUnderAnEqualSaltOnly) {
  PrefixCache cache(KvFormat::kFp16);
  cache.insert(1, kNoBlock, ids_of(1), "a");
  EXPECT_EQ(cache.find(kNoBlock, ids_of(1), "a"), 1);
  EXPECT_EQ(cache.find(kNoBlock, ids_of(1), "b"), kNoBlock);
  EXPECT_EQ(cache.find(kNoBlock, ids_of(1), ""), kNoBlock);
}

TEST(PrefixCacheTest, ACollisionOfHashesIsAMiss) {
  const auto poor = [](uint64_t, std::span<const int32_t>) -> uint64_t { return 42; };
  PrefixCache cache(KvFormat::kFp16, poor);
  cache.insert(1, kNoBlock, ids_of(1), "");
  cache.insert(2, 1, ids_of(2), "");
  cache.insert(3, kNoBlock, ids_of(2), "salt");
  EXPECT_EQ(cache.find(kNoBlock, ids_of(2), ""), kNoBlock);
  EXPECT_EQ(cache.find(1, ids_of(2), ""), 2);
  EXPECT_EQ(cache.find(kNoBlock, ids_of(2), "salt"), 3);
  EXPECT_EQ(cache.find(3, ids_of(2), ""), kNoBlock) << "another chain, although all else is equal";
  cache.erase(2);
  EXPECT_EQ(cache.find(1, ids_of(2), ""), kNoBlock);
  EXPECT_EQ(cache.find(kNoBlock, ids_of(2), "salt"), 3) << "erasing leaves what collides";
}

TEST(PrefixCacheTest, EvictsTheLeastRecentlyUsedAndOfThoseTheDeepest) {
  PrefixCache cache(KvFormat::kFp16);
  cache.insert(1, kNoBlock, ids_of(1), "");
  cache.insert(2, 1, ids_of(2), "");
  cache.insert(3, kNoBlock, ids_of(3), "");
  EXPECT_EQ(cache.next_victim(), kNoBlock) << "blocks in use stay";
  cache.mark_unused(3, 5);
  cache.mark_unused(1, 9);
  cache.mark_unused(2, 9);
  std::vector<BlockId> order;
  while (cache.next_victim() != kNoBlock) {
    order.push_back(cache.next_victim());
    cache.erase(order.back());
  }
  EXPECT_EQ(order, (std::vector<BlockId>{3, 2, 1}));
  EXPECT_EQ(cache.size(), 0);
}

TEST(PrefixCacheTest, ABlockInUseAgainIsNoVictim) {
  PrefixCache cache(KvFormat::kFp16);
  cache.insert(1, kNoBlock, ids_of(1), "");
  cache.insert(2, kNoBlock, ids_of(2), "");
  cache.mark_unused(1, 1);
  cache.mark_unused(2, 2);
  cache.mark_used(1);
  EXPECT_EQ(cache.next_victim(), 2);
  cache.mark_unused(1, 3);
  EXPECT_EQ(cache.next_victim(), 2);
}

TEST(PrefixCacheTest, TheHashDependsOnEveryIdAndTheirOrder) {
  std::vector<int32_t> ids = ids_of(1);
  const uint64_t hash = hash_block(1, ids);
  EXPECT_NE(hash, hash_block(2, ids));
  for (size_t i = 0; i < ids.size(); ++i) {
    ++ids[i];
    EXPECT_NE(hash_block(1, ids), hash) << i;
    --ids[i];
  }
  std::swap(ids[0], ids[127]);
  EXPECT_NE(hash_block(1, ids), hash);
}

}  // namespace
}  // namespace kvarn
