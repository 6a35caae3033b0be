#include "engine/tokenizer/tokenizer.h"

#include <chrono>
#include <cstdio>
#include <random>
#include <thread>

#include <gtest/gtest.h>

#include "engine/tokenizer/detokenizer.h"
#include "engine/tokenizer/normalizer.h"
#include "tests/engine/tokenizer/small_tokenizer.h"

namespace kvarn {
namespace {

using Ids = std::vector<int32_t>;

std::unique_ptr<Tokenizer> load(const nlohmann::json& file) {
  const ScratchFile scratch(file.dump());
  auto tokenizer = Tokenizer::load(scratch.path());
  EXPECT_TRUE(tokenizer.is_ok()) << tokenizer.status().message();
  return tokenizer.is_ok() ? std::move(tokenizer).value() : nullptr;
}

std::unique_ptr<Tokenizer> load_demo() {
  auto tokenizer = Tokenizer::load(KVARN_SOURCE_DIR "/assets/demo-model/tokenizer.json");
  EXPECT_TRUE(tokenizer.is_ok()) << tokenizer.status().message();
  return std::move(tokenizer).value();
}

TEST(TokenizerTest, MergesByRankNotByLength) {
  const auto tokenizer = load(small_tokenizer());
  EXPECT_EQ(tokenizer->encode("hello"), (Ids{259}));
  EXPECT_EQ(tokenizer->encode("hell t"), (Ids{258, 260}));
  EXPECT_EQ(tokenizer->encode("helo"), (Ids{256, 'l', 'o'}));
  EXPECT_EQ(tokenizer->encode("lll"), (Ids{257, 'l'}));  // of equal ranks the leftmost
  EXPECT_TRUE(tokenizer->encode("").empty());
}

TEST(TokenizerTest, MergesMayBeStringsOfTwoWords) {
  nlohmann::json file = small_tokenizer();
  file["model"]["merges"] = {"#version: 0.2", "h e", "l l", "he ll", "hell o", "Ġ t"};
  EXPECT_EQ(load(file)->encode("hello t"), (Ids{259, 260}));
}

TEST(TokenizerTest, IgnoreMergesTakesWholeWordsOfTheVocabulary) {
  nlohmann::json file = small_tokenizer();
  file["model"]["merges"] = nlohmann::json::array();
  EXPECT_EQ(load(file)->encode("hello").size(), 5u);
  file["model"]["ignore_merges"] = true;
  EXPECT_EQ(load(file)->encode("hello"), (Ids{259}));
}

TEST(TokenizerTest, ByteLevelAloneSplitsAsGpt2) {
  nlohmann::json file = small_tokenizer();
  file["pre_tokenizer"] = {{"type", "ByteLevel"}, {"add_prefix_space", false}};
  EXPECT_EQ(load(file)->encode("hello t"), (Ids{259, 260}));
}

TEST(TokenizerTest, AddedTokensAreRecognisedInsideText) {
  const auto tokenizer = load(small_tokenizer());
  EXPECT_EQ(tokenizer->encode("hello<think>hello<|end|>"), (Ids{259, 262, 259, 261}));
  EXPECT_EQ(tokenizer->encode("<thinkhello").back(), 259);
  EXPECT_EQ(tokenizer->added_token_id("<think>"), 262);
  EXPECT_EQ(tokenizer->added_token_id("hello"), std::nullopt);
  EXPECT_TRUE(tokenizer->is_special(261));
  EXPECT_FALSE(tokenizer->is_special(262));
  EXPECT_TRUE(tokenizer->is_added(262));
  EXPECT_FALSE(tokenizer->is_added(259));
}

TEST(TokenizerTest, TheLongestAddedTokenAtAPlaceWins) {
  nlohmann::json file = small_tokenizer();
  nlohmann::json longer = file["added_tokens"][1];
  longer["content"] = "<think>!";
  longer["id"] = 263;
  file["added_tokens"].push_back(longer);
  EXPECT_EQ(load(file)->encode("<think>!<think>"), (Ids{263, 262}));
}

TEST(TokenizerTest, StrippingAddedTokensTakeTheSpaceAround) {
  nlohmann::json file = small_tokenizer();
  file["added_tokens"][1]["lstrip"] = true;
  EXPECT_EQ(load(file)->encode("hello \xE3\x80\x80<think> t"), (Ids{259, 262, 260}));
  file["added_tokens"][1]["rstrip"] = true;
  EXPECT_EQ(load(file)->encode("hello <think> \n hello"), (Ids{259, 262, 259}));
}

TEST(TokenizerTest, NormalizedAddedTokensMatchComposedText) {
  nlohmann::json file = small_tokenizer();
  file["added_tokens"][1]["content"] = "<\xC3\xA9>";
  EXPECT_NE(load(file)->encode("<e\xCC\x81>"), (Ids{262}));
  file["added_tokens"][1]["normalized"] = true;
  EXPECT_EQ(load(file)->encode("<e\xCC\x81>"), (Ids{262}));
}

TEST(TokenizerTest, DecodeGivesTheBytesBackAndSkipsSpecialTokensIfAsked) {
  const auto tokenizer = load(small_tokenizer());
  const Ids ids = {259, 261, 262};
  EXPECT_EQ(tokenizer->decode(ids, false), "hello<|end|><think>");
  EXPECT_EQ(tokenizer->decode(ids, true), "hello<think>");
  EXPECT_EQ(tokenizer->decode(Ids{-1, 99999}, false), "");
  EXPECT_EQ(tokenizer->token_bytes(260), " t");
  EXPECT_EQ(tokenizer->token_bytes(-5), "");
  EXPECT_EQ(tokenizer->vocab_size(), 263);
}

TEST(TokenizerTest, BytesThatAreNotUtf8BecomeReplacementCharacters) {
  const auto tokenizer = load(small_tokenizer());
  EXPECT_EQ(tokenizer->encode("\xE6\xBC"), tokenizer->encode("\xEF\xBF\xBD"));
  EXPECT_EQ(tokenizer->decode(tokenizer->encode("a\xFF"), false), "a\xEF\xBF\xBD");
}

TEST(TokenizerProperty, DetokeniseOfTokeniseIsNfc) {
  const auto tokenizer = load_demo();
  std::mt19937 rng(1);
  static const std::vector<std::string> kParts = {"a",
                                                  "Hello",
                                                  " ",
                                                  "\n\n",
                                                  "é",
                                                  "e\xCC\x81",
                                                  "\xE1\x84\x80\xE1\x85\xA1\xE1\x86\xA8",
                                                  "漢",
                                                  "🙂",
                                                  "<think>",
                                                  "<|im_end|>",
                                                  "\xCC\xA3\xCC\x81",
                                                  "12",
                                                  "'re",
                                                  "\xE2\x84\xAB"};
  for (int round = 0; round < 2000; ++round) {
    std::string text;
    for (size_t i = 0; i < rng() % 12; ++i) text += kParts[rng() % kParts.size()];
    const Ids ids = tokenizer->encode(text);
    const std::string back = tokenizer->decode(ids, false);
    ASSERT_EQ(sanitize_utf8(back), back);
    // Added tokens part the text: marks do not reach over them.
    if (text.find('<') == text.npos) {
      ASSERT_EQ(back, to_nfc(text));
    }
  }
}

TEST(TokenizerProperty, HugeInputsTakeSecondsNotHours) {
  const auto tokenizer = load_demo();
  constexpr size_t kBytes = size_t{1} << 20;
  std::string marks = "a";
  while (marks.size() < kBytes) marks += "\xCC\x81\xCC\xA3";  // in the wrong order, all one run
  std::string letters;
  std::mt19937 rng(1);
  while (letters.size() < kBytes) letters += static_cast<char>('a' + rng() % 26);
  const std::pair<const char*, std::string> inputs[] = {
      {"one letter", std::string(kBytes, 'a')},
      {"random letters", letters},
      {"spaces", std::string(kBytes, ' ')},
      {"newlines", std::string(kBytes, '\n')},
      {"punctuation", std::string(kBytes, '=')},
      {"less-than signs", std::string(kBytes, '<')},
      {"combining marks", marks},
      {"zero bytes", std::string(kBytes, '\0')},
  };
  for (const auto& [name, text] : inputs) {
    const auto start = std::chrono::steady_clock::now();
    const Ids ids = tokenizer->encode(text);
    const std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - start;
    std::printf("%-16s 1 MiB, %7zu tokens, %.3f s\n", name, ids.size(), seconds.count());
    EXPECT_FALSE(ids.empty());
    // Half a second here; the bound only tells linear from quadratic, also under sanitizers.
    EXPECT_LT(seconds.count(), 60);
  }
}

TEST(TokenizerTest, EncodesFromSeveralThreadsAtOnce) {
  const auto tokenizer = load_demo();
  const std::string text = "The quick brown fox jumps over the lazy dog, again and again. 漢字 é";
  const Ids expected = tokenizer->encode(text);
  std::vector<std::thread> threads;
  std::vector<int> wrong(4, 0);
  for (size_t t = 0; t < wrong.size(); ++t) {
    threads.emplace_back([&, t] {
      for (int i = 0; i < 200; ++i) {
        tokenizer->encode("word" + std::to_string(i * 7 + static_cast<int>(t)));
        wrong[t] += tokenizer->encode(text) == expected ? 0 : 1;
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  EXPECT_EQ(wrong, std::vector<int>(4, 0));
}

}  // namespace
}  // namespace kvarn
