#include "server/stop_checker.h"

#include <algorithm>
#include <random>
#include <string>
#include <vector>

#include <gtest/gtest.h>

#include "engine/tokenizer/detokenizer.h"

namespace kvarn {
namespace {

struct Answer {
  std::string text;
  std::vector<int32_t> completed;  // token ids, in the order in which their pieces completed them
  std::optional<size_t> matched;
};

void take(const StopChecker::Output& out, Answer& run) {
  for (const TextPiece& piece : out.pieces) {
    EXPECT_TRUE(is_valid_utf8(piece.text)) << piece.text;
    run.text += piece.text;
    if (piece.completes_token) run.completed.push_back(piece.token_id);
  }
  if (out.matched) run.matched = out.matched;
}

Answer run_checker(const std::vector<std::string>& tokens, const std::vector<std::string>& stops,
                   bool include, const std::string& tail = "") {
  StopChecker checker(stops, include);
  Answer run;
  for (size_t i = 0; i < tokens.size(); ++i) {
    take(checker.push(static_cast<int32_t>(i), tokens[i]), run);
  }
  take(checker.finish(tail), run);
  return run;
}

TEST(StopCheckerTest, ReleasesTextAtOnceWithoutStopStrings) {
  StopChecker checker({}, false);
  const StopChecker::Output out = checker.push(7, "abc");
  EXPECT_EQ(out.pieces, (std::vector<TextPiece>{{7, "abc", true}}));
  EXPECT_FALSE(out.matched);
}

TEST(StopCheckerTest, HoldsBackOnlyWhatMayBecomeAMatch) {
  StopChecker checker({"stop"}, false);
  EXPECT_EQ(checker.push(1, "a st").pieces, (std::vector<TextPiece>{{1, "a ", false}}));
  EXPECT_EQ(checker.push(2, "one").pieces,
            (std::vector<TextPiece>{{1, "st", true}, {2, "one", true}}));
}

TEST(StopCheckerTest, CutsBeforeTheStopStringAndCompletesTheTokensItCut) {
  StopChecker checker({"\n\n"}, false);
  EXPECT_EQ(checker.push(1, "x\n").pieces, (std::vector<TextPiece>{{1, "x", false}}));
  const StopChecker::Output out = checker.push(2, "\ny");
  EXPECT_EQ(out.matched, 0u);
  EXPECT_EQ(out.pieces, (std::vector<TextPiece>{{1, "", true}, {2, "", true}}));
  EXPECT_TRUE(checker.push(3, "more").pieces.empty());
  EXPECT_TRUE(checker.finish("").pieces.empty());
}

TEST(StopCheckerTest, KeepsTheStopStringWhenItIsAskedFor) {
  const Answer run = run_checker({"a", "ST", "OPb"}, {"STOP"}, true);
  EXPECT_EQ(run.text, "aSTOP");
  EXPECT_EQ(run.completed, (std::vector<int32_t>{0, 1, 2}));
}

TEST(StopCheckerTest, TheMatchThatEndsFirstWinsAndOfThoseTheLongest) {
  EXPECT_EQ(run_checker({"abcd"}, {"bcd", "bc"}, true).matched, 1u);
  EXPECT_EQ(run_checker({"abcd"}, {"c", "bc", "abc"}, true).matched, 2u);
}

TEST(StopCheckerTest, MatchesInTheTailOfTheDetokeniser) {
  const Answer run = run_checker({"a"}, {"\xEF\xBF\xBD"}, false, "\xEF\xBF\xBD");
  EXPECT_EQ(run.text, "a");
  EXPECT_EQ(run.matched, 0u);
}

TEST(StopCheckerTest, AnEmptyTokenWaitsForTheTextBeforeIt) {
  StopChecker checker({"xyz"}, false);
  checker.push(1, "x");
  EXPECT_TRUE(checker.push(2, "").pieces.empty());
  EXPECT_EQ(checker.push(3, "q").pieces,
            (std::vector<TextPiece>{{1, "x", true}, {2, "", true}, {3, "q", true}}));
}

// What a search over the whole text finds.
Answer whole_text(const std::string& text, const std::vector<std::string>& stops, bool include) {
  Answer run;
  run.text = text;
  for (size_t end = 1; end <= text.size(); ++end) {
    for (size_t i = 0; i < stops.size(); ++i) {
      if (!std::string_view(text).substr(0, end).ends_with(stops[i])) continue;
      if (!run.matched || stops[i].size() > stops[*run.matched].size()) run.matched = i;
    }
    if (!run.matched) continue;
    run.text = text.substr(0, include ? end : end - stops[*run.matched].size());
    break;
  }
  return run;
}

// Tokens of whole characters: the detokeniser never gives parts of one.
std::vector<std::string> random_tokens(std::mt19937& rng, size_t count) {
  static const std::vector<std::string> kParts = {"a",    "b",      "ab", "ba",  "é",  "漢",
                                                  "🙂", "a🙂b", "",   "aab", "\n", "漢é"};
  std::vector<std::string> tokens;
  for (size_t i = 0; i < count; ++i) tokens.push_back(kParts[rng() % kParts.size()]);
  return tokens;
}

TEST(StopCheckerProperty, AnySplitGivesWhatASearchOverTheWholeTextGives) {
  std::mt19937 rng(1);
  int matches = 0;
  for (int round = 0; round < 4000; ++round) {
    const std::vector<std::string> tokens = random_tokens(rng, 1 + rng() % 12);
    std::vector<std::string> stops;
    for (size_t i = 0; i < rng() % 4; ++i) {
      std::string stop;
      for (const std::string& part : random_tokens(rng, 1 + rng() % 3)) stop += part;
      if (!stop.empty()) stops.push_back(stop);
    }
    const bool include = rng() % 2 == 0;
    std::string text;
    for (const std::string& token : tokens) text += token;
    const Answer expected = whole_text(text, stops, include);
    const Answer run = run_checker(tokens, stops, include);
    ASSERT_EQ(run.text, expected.text);
    ASSERT_EQ(run.matched, expected.matched);
    // Every token up to the match is completed exactly once, in order.
    for (size_t i = 0; i < run.completed.size(); ++i) {
      ASSERT_EQ(run.completed[i], static_cast<int32_t>(i));
    }
    if (!run.matched) {
      ASSERT_EQ(run.completed.size(), tokens.size());
    }
    matches += run.matched ? 1 : 0;
  }
  EXPECT_GT(matches, 1000);
  EXPECT_LT(matches, 3500);
}

TEST(StopCheckerProperty, NeverHoldsBackMoreThanTheLongestStopStringLessOneByte) {
  std::mt19937 rng(2);
  const std::vector<std::string> stops = {"aba", "baab🙂", "漢é漢"};
  size_t longest = 0;
  for (const std::string& stop : stops) longest = std::max(longest, stop.size());
  for (int round = 0; round < 300; ++round) {
    StopChecker checker(stops, false);
    size_t pushed = 0, released = 0;
    for (const std::string& token : random_tokens(rng, 40)) {
      const StopChecker::Output out = checker.push(0, token);
      if (out.matched) break;
      pushed += token.size();
      for (const TextPiece& piece : out.pieces) released += piece.text.size();
      ASSERT_LE(pushed - released, longest - 1);
    }
  }
}

}  // namespace
}  // namespace kvarn
