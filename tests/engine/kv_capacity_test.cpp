#include "engine/kv_capacity.h"

#include <gtest/gtest.h>

#include <algorithm>

namespace kvarn {
namespace {

const KvLayout kFp16 = make_kv_layout(KvFormat::kFp16, 128);
const KvLayout kK4V2 = make_kv_layout(KvFormat::kKvarnK4V2, 128);
const KvLayout kK4V4 = make_kv_layout(KvFormat::kKvarnK4V4, 128);

TEST(KvCapacityTest, APromptOf1000TakesSinkSixCodedBlocksAndFourTailPages) {
  EXPECT_EQ(pages_after_prefill(kK4V2, 1000), 5 + 6 + 4);
  EXPECT_EQ(pages_after_decode(kK4V2, 1004), 15);
  EXPECT_EQ(pages_after_decode(kK4V2, 1005), 16);  // position 1004 takes the tail's fifth page
  EXPECT_EQ(pages_after_decode(kK4V2, 1024), 16);
  EXPECT_EQ(pages_after_decode(kK4V2, 1025), 13);  // position 1024 needs block 7 coded
}

TEST(KvCapacityTest, Fp16TakesFourPagesABlock) {
  EXPECT_EQ(pages_after_prefill(kFp16, 1000), 7 * 4 + 4);
  EXPECT_EQ(pages_after_decode(kFp16, 1024), 32);
  EXPECT_EQ(peak_pages(kFp16, 1024), 32);  // nothing is ever encoded: no reserve
}

TEST(KvCapacityTest, AFullPromptIsCodedToItsEndButADecodedBlockStaysExactForAStep) {
  EXPECT_EQ(pages_after_prefill(kK4V4, 256), 4 + 1);
  EXPECT_EQ(pages_after_decode(kK4V4, 256), 4 + 4);
}

TEST(KvCapacityTest, ThePeakIsTheMostOfAllLengthsOnTheWay) {
  for (const KvLayout& layout : {kFp16, kK4V2, kK4V4}) {
    int64_t most = 0;
    for (int64_t tokens = 1; tokens <= 1500; ++tokens) {
      most =
          std::max({most, pages_after_prefill(layout, tokens), pages_after_decode(layout, tokens)});
      ASSERT_EQ(peak_pages(layout, tokens), most + (layout.coded() ? 1 : 0)) << tokens;
    }
  }
}

TEST(KvCapacityTest, TheLongestSequenceFitsAndOneTokenMoreDoesNot) {
  for (const KvLayout& layout : {kFp16, kK4V2, kK4V4}) {
    for (int64_t pages = 0; pages < 200; ++pages) {
      const int64_t tokens = longest_sequence(layout, pages);
      EXPECT_LE(peak_pages(layout, tokens), pages);
      EXPECT_GT(peak_pages(layout, tokens + 1), pages);
    }
  }
  EXPECT_EQ(longest_sequence(kK4V2, 1), 0);  // one page and the reserve are two
  EXPECT_EQ(longest_sequence(kK4V2, 2), 27);
}

}  // namespace
}  // namespace kvarn
