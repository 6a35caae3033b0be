#include "engine/tokenizer/detokenizer.h"

#include <random>

#include <gtest/gtest.h>

#include "tests/engine/tokenizer/small_tokenizer.h"

namespace kvarn {
namespace {

class DetokenizerTest : public testing::Test {
 protected:
  void SetUp() override {
    const ScratchFile scratch(small_tokenizer().dump());
    auto loaded = Tokenizer::load(scratch.path());
    ASSERT_TRUE(loaded.is_ok()) << loaded.status().message();
    tokenizer_ = std::move(loaded).value();
  }
  static int32_t byte(int value) { return value; }  // small_tokenizer: the id of a byte is the byte

  std::unique_ptr<Tokenizer> tokenizer_;
};

TEST_F(DetokenizerTest, HoldsBackAnIncompleteCharacter) {
  Detokenizer detokenizer(*tokenizer_, false);
  EXPECT_EQ(detokenizer.push(byte('a')), "a");
  EXPECT_EQ(detokenizer.push(byte(0xF0)), "");
  EXPECT_EQ(detokenizer.push(byte(0x9F)), "");
  EXPECT_EQ(detokenizer.push(byte(0x99)), "");
  EXPECT_EQ(detokenizer.push(byte(0x82)), "🙂");
  EXPECT_EQ(detokenizer.finish(), "");
}

TEST_F(DetokenizerTest, AnUnfinishedCharacterBecomesOneReplacementCharacter) {
  Detokenizer detokenizer(*tokenizer_, false);
  detokenizer.push(byte(0xF0));
  detokenizer.push(byte(0x9F));
  EXPECT_EQ(detokenizer.finish(), "\xEF\xBF\xBD");
  EXPECT_EQ(detokenizer.finish(), "");
}

TEST_F(DetokenizerTest, BytesThatCannotContinueAreReplacedAtOnce) {
  Detokenizer detokenizer(*tokenizer_, false);
  EXPECT_EQ(detokenizer.push(byte(0xE6)), "");
  EXPECT_EQ(detokenizer.push(byte('x')), "\xEF\xBF\xBDx");
  EXPECT_EQ(detokenizer.push(byte(0x80)), "\xEF\xBF\xBD");
  EXPECT_EQ(detokenizer.push(byte(0xC0)), "\xEF\xBF\xBD");
}

TEST_F(DetokenizerTest, SpecialTokensAreSkippedOnlyIfAsked) {
  Detokenizer skipping(*tokenizer_, true), keeping(*tokenizer_, false);
  EXPECT_EQ(skipping.push(261), "");
  EXPECT_EQ(skipping.push(262), "<think>");
  EXPECT_EQ(keeping.push(261), "<|end|>");
}

TEST_F(DetokenizerTest, ConcatenatedPiecesAreTheSanitizedDecodeAndValid) {
  std::mt19937 rng(1);
  for (int round = 0; round < 3000; ++round) {
    Detokenizer detokenizer(*tokenizer_, round % 2 == 0);
    std::vector<int32_t> ids;
    std::string text;
    for (size_t i = 0; i < rng() % 20; ++i) {
      static const int32_t kLikely[] = {0xF0, 0x9F, 0x99, 0x82, 0xE6, 0xBC,
                                        0xA2, 0xC3, 0xA9, 261,  262};
      ids.push_back(rng() % 3 == 0 ? static_cast<int32_t>(rng() % 263) : kLikely[rng() % 11]);
      const std::string piece = detokenizer.push(ids.back());
      ASSERT_TRUE(is_valid_utf8(piece));
      text += piece;
    }
    text += detokenizer.finish();
    ASSERT_EQ(text, sanitize_utf8(tokenizer_->decode(ids, round % 2 == 0)));
  }
}

TEST(SanitizeUtf8Test, FollowsTheMaximalSubpartRule) {
  const std::string r = "\xEF\xBF\xBD";
  // Unicode 15, table 3-8 and the examples around it.
  EXPECT_EQ(sanitize_utf8("\xC0\xAF\xE0\x80\xBF\xF0\x81\x82\x41"),
            r + r + r + r + r + r + r + r + "A");
  EXPECT_EQ(sanitize_utf8("\xED\xA0\x80\xED\xBF\xBF\xED\xAF\x41"),
            r + r + r + r + r + r + r + r + "A");
  EXPECT_EQ(sanitize_utf8("\xF4\x91\x92\x93\xFF\x41\x80\xBF\x42"),
            r + r + r + r + r + "A" + r + r + "B");
  EXPECT_EQ(sanitize_utf8("\xE1\x80\xE2\xF0\x91\x92\xF1\xBF\x41"), r + r + r + r + "A");
  EXPECT_EQ(sanitize_utf8("é漢🙂"), "é漢🙂");
}

TEST(IsValidUtf8Test, RefusesSurrogatesOverlongFormsAndCutCharacters) {
  EXPECT_TRUE(is_valid_utf8(""));
  EXPECT_TRUE(is_valid_utf8("plain ascii, more than eight bytes é"));
  EXPECT_TRUE(is_valid_utf8("\xF4\x8F\xBF\xBF"));
  EXPECT_FALSE(is_valid_utf8("\xED\xA0\x80"));
  EXPECT_FALSE(is_valid_utf8("\xC0\x80"));
  EXPECT_FALSE(is_valid_utf8("\xF4\x90\x80\x80"));
  EXPECT_FALSE(is_valid_utf8("12345678\xE6\xBC"));
}

}  // namespace
}  // namespace kvarn
