#include "server/output_parser.h"

#include <random>
#include <string>
#include <vector>

#include <gtest/gtest.h>

#include "engine/tokenizer/detokenizer.h"
#include "server/stop_checker.h"

namespace kvarn {
namespace {

using State = OutputParser::State;
using Kind = OutputDelta::Kind;

constexpr int32_t kOpen = 100, kClose = 101, kText = 1;

OutputFormat by_id() {
  OutputFormat format;
  format.reasoning = true;
  format.think_open_id = kOpen;
  format.think_close_id = kClose;
  return format;
}
OutputFormat by_text() {
  OutputFormat format;
  format.reasoning = true;
  return format;
}

struct Token {
  int32_t id;
  std::string text;
};
Token text(std::string t) { return {kText, std::move(t)}; }
const Token kOpenToken{kOpen, "<think>"}, kCloseToken{kClose, "</think>"};

struct Fold {
  std::string reasoning, content;
  int32_t reasoning_tokens = 0;
  int32_t accounted = 0, unaccounted = 0;
};

void add(const std::vector<OutputDelta>& deltas, Fold& fold) {
  for (const OutputDelta& delta : deltas) {
    EXPECT_FALSE(delta.text.empty());
    EXPECT_TRUE(is_valid_utf8(delta.text));
    (delta.kind == Kind::kReasoning ? fold.reasoning : fold.content) += delta.text;
    fold.accounted += delta.num_tokens;
  }
}

Fold parse(const OutputFormat& format, State start, const std::vector<Token>& tokens) {
  OutputParser parser(format, start);
  Fold fold;
  std::vector<OutputDelta> deltas;
  for (const Token& token : tokens) parser.push({token.id, token.text, true}, deltas);
  parser.finish(deltas);
  add(deltas, fold);
  fold.reasoning_tokens = parser.reasoning_tokens();
  fold.unaccounted = parser.unaccounted_tokens();
  EXPECT_EQ(static_cast<size_t>(fold.accounted + fold.unaccounted), tokens.size());
  return fold;
}

TEST(OutputParserTest, SplitsReasoningFromContentAndDropsTheNewlinesAround) {
  const OutputFormat format = by_id();
  const Fold fold = parse(format, State::kStart,
                          {kOpenToken, text("\n"), text("Easy"), text("."), text("\n"), kCloseToken,
                           text("\n\n"), text("4")});
  EXPECT_EQ(fold.reasoning, "Easy.");
  EXPECT_EQ(fold.content, "4");
  EXPECT_EQ(fold.reasoning_tokens, 6);  // <think> to </think> inclusive
}

TEST(OutputParserTest, WhitespaceBeforeThinkIsDropped) {
  const OutputFormat format = by_id();
  const Fold fold = parse(format, State::kStart, {text(" \n"), kOpenToken, text("r"), kCloseToken});
  EXPECT_EQ(fold.reasoning, "r");
  EXPECT_EQ(fold.content, "");
  EXPECT_EQ(fold.reasoning_tokens, 3);
}

TEST(OutputParserTest, WhitespaceBeforeAnythingElseIsContent) {
  const OutputFormat format = by_id();
  EXPECT_EQ(parse(format, State::kStart, {text(" \n"), text("x")}).content, " \nx");
  EXPECT_EQ(parse(format, State::kStart, {text(" \n")}).content, " \n");
}

TEST(OutputParserTest, AMarkerSpelledWithOrdinaryTokensIsTextIfTheVocabularyHasIt) {
  const OutputFormat format = by_id();
  const Fold fold = parse(format, State::kStart, {text("<th"), text("ink>x</think>y")});
  EXPECT_EQ(fold.content, "<think>x</think>y");
  EXPECT_EQ(fold.reasoning_tokens, 0);
}

TEST(OutputParserTest, WithoutMarkersInTheVocabularyTheTextDecides) {
  const OutputFormat format = by_text();
  const Fold fold =
      parse(format, State::kStart, {text("<th"), text("ink>x<"), text("/think"), text(">\n\ny<")});
  EXPECT_EQ(fold.reasoning, "x");
  EXPECT_EQ(fold.content, "y<");
  EXPECT_EQ(fold.reasoning_tokens, 4);
}

TEST(OutputParserTest, APromptThatOpenedThinkStartsInReasoning) {
  const OutputFormat format = by_id();
  const Fold fold = parse(format, State::kReasoning, {text("r\n"), kCloseToken, text("c")});
  EXPECT_EQ(fold.reasoning, "r");
  EXPECT_EQ(fold.content, "c");
  EXPECT_EQ(fold.reasoning_tokens, 2);
}

TEST(OutputParserTest, APromptThatClosedThinkStartsInContentAndKeepsItsNewlines) {
  const OutputFormat format = by_id();
  EXPECT_EQ(parse(format, State::kContent, {text("\nc")}).content, "\nc");
}

TEST(OutputParserTest, ThinkInTheMiddleOfContentIsReasoningAndAStrayCloseIsDropped) {
  const OutputFormat format = by_id();
  const Fold fold = parse(format, State::kStart,
                          {text("a"), kCloseToken, text("\nb"), kOpenToken, text("r"), kOpenToken,
                           text("s"), kCloseToken, text("\nc")});
  EXPECT_EQ(fold.reasoning, "rs");
  EXPECT_EQ(fold.content, "a\nbc");
}

TEST(OutputParserTest, ToolCallMarkersAreText) {
  const OutputFormat format = by_id();
  const Fold fold = parse(format, State::kReasoning,
                          {{7, "<tool_call>"}, kCloseToken, {7, "<tool_call>"}, text("{}")});
  EXPECT_EQ(fold.reasoning, "<tool_call>");
  EXPECT_EQ(fold.content, "<tool_call>{}");
}

TEST(OutputParserTest, PlainFormatTakesMarkersForContent) {
  const OutputFormat format = OutputFormat::plain();
  const Fold fold = parse(format, State::kStart, {kOpenToken, text("\nx\n"), kCloseToken});
  EXPECT_EQ(fold.content, "<think>\nx\n</think>");
  EXPECT_EQ(fold.unaccounted, 0);
}

TEST(OutputParserTest, AMarkerThatAStopStringCutNeverReachesTheClient) {
  const OutputFormat format = by_id();
  OutputParser parser(format, State::kReasoning);
  std::vector<OutputDelta> deltas;
  parser.push({kText, "r", true}, deltas);
  parser.push({kClose, "</th", false}, deltas);
  parser.push({kClose, "", true}, deltas);
  parser.finish(deltas);
  EXPECT_EQ(deltas, (std::vector<OutputDelta>{{Kind::kReasoning, "r", 1}}));
  EXPECT_EQ(parser.unaccounted_tokens(), 1);
}

TEST(OutputParserTest, MarkersThatTheDetokeniserSkippedAsSpecialStillCount) {
  const OutputFormat format = by_id();
  const Fold fold =
      parse(format, State::kStart, {{kOpen, ""}, text("r"), {kClose, ""}, text("\nc")});
  EXPECT_EQ(fold.reasoning, "r");
  EXPECT_EQ(fold.content, "c");
  EXPECT_EQ(fold.reasoning_tokens, 3);
}

TEST(OutputParserTest, ACharacterThatAMarkerCutOffStaysBeforeIt) {
  const OutputFormat format = by_id();
  const Fold fold = parse(format, State::kReasoning,
                          {text("r"), text(""), {kClose, "\xEF\xBF\xBD</think>"}, text("c")});
  EXPECT_EQ(fold.reasoning, "r\xEF\xBF\xBD");
  EXPECT_EQ(fold.content, "c");
}

TEST(OutputParserTest, ADeltaAccountsForTheTokensWhoseTextIsOut) {
  const OutputFormat format = by_id();
  OutputParser parser(format, State::kReasoning);
  std::vector<OutputDelta> deltas;
  const auto pushed = [&](const TextPiece& piece) {
    deltas.clear();
    parser.push(piece, deltas);
    return deltas;
  };
  EXPECT_EQ(pushed({1, "a\n", true}), (std::vector<OutputDelta>{{Kind::kReasoning, "a", 0}}));
  EXPECT_EQ(pushed({1, "", true}), std::vector<OutputDelta>{});
  EXPECT_EQ(pushed({1, "b", true}), (std::vector<OutputDelta>{{Kind::kReasoning, "\nb", 3}}));
  EXPECT_EQ(pushed({1, "\n", true}), std::vector<OutputDelta>{});
  EXPECT_EQ(pushed({kClose, "</think>", true}), std::vector<OutputDelta>{});
  EXPECT_EQ(pushed({1, "\n\n", true}), std::vector<OutputDelta>{});
  EXPECT_EQ(pushed({1, "c", true}), (std::vector<OutputDelta>{{Kind::kContent, "c", 4}}));
}

// The rules applied to the whole output at once: blocks of text between markers.
Fold parse_whole(State state, const std::vector<Token>& tokens, bool ids) {
  std::string all;
  std::vector<std::pair<std::string, int>> blocks(
      1);  // text, marker behind it: 0 end, 1 open, 2 close
  for (const Token& token : tokens) {
    if (ids && token.id == kOpen) {
      blocks.back().second = 1;
      blocks.emplace_back();
    } else if (ids && token.id == kClose) {
      blocks.back().second = 2;
      blocks.emplace_back();
    } else {
      blocks.back().first += token.text;
    }
  }
  if (!ids) {
    for (const Token& token : tokens) all += token.text;
    blocks.assign(1, {});
    for (size_t i = 0; i < all.size();) {
      const std::string_view rest = std::string_view(all).substr(i);
      const int marker = rest.starts_with("<think>") ? 1 : rest.starts_with("</think>") ? 2 : 0;
      if (marker == 0) {
        blocks.back().first += all[i++];
        continue;
      }
      blocks.back().second = marker;
      blocks.emplace_back();
      i += marker == 1 ? 7 : 8;
    }
  }
  Fold fold;
  std::string reasoning_block;
  bool drop_leading = state == State::kReasoning;
  const auto flush_reasoning = [&] {
    const size_t first = reasoning_block.find_first_not_of('\n');
    const size_t last = reasoning_block.find_last_not_of('\n');
    if (first != reasoning_block.npos)
      fold.reasoning += reasoning_block.substr(first, last - first + 1);
    reasoning_block.clear();
  };
  std::string content_block;
  const auto flush_content = [&] {
    if (drop_leading)
      content_block.erase(0, std::min(content_block.find_first_not_of('\n'), content_block.size()));
    fold.content += content_block;
    content_block.clear();
  };
  for (const auto& [block, marker] : blocks) {
    const bool blank = block.find_first_not_of(" \t\n\r\v\f") == block.npos;
    if (state == State::kReasoning) {
      reasoning_block += block;
      if (marker == 1) continue;
      flush_reasoning();
      drop_leading = true;
      state = State::kContent;
      continue;
    }
    const bool dropped = state == State::kStart && blank && marker == 1;
    if (!dropped) content_block += block;
    if (state == State::kStart && (!blank || marker != 1)) state = State::kContent;
    if (marker == 1) {
      flush_content();
      state = State::kReasoning;
    }
  }
  if (state == State::kReasoning)
    flush_reasoning();
  else
    flush_content();
  return fold;
}

std::vector<Token> random_output(std::mt19937& rng) {
  static const std::vector<std::string> kTexts = {
      "a",   "b c",  "\n",   "\n\n",   " ", " \n",         "x\n",
      "\ny", "é",    "漢字", "🙂",   "",  "<think>",     "</think>",
      "<th", "ink>", "</",   "think>", "<", "<tool_call>", ".\n\n"};
  std::vector<Token> tokens;
  for (size_t i = 0; i < 1 + rng() % 14; ++i) {
    const auto dice = rng() % 8;
    if (dice == 0)
      tokens.push_back(kOpenToken);
    else if (dice == 1)
      tokens.push_back(kCloseToken);
    else
      tokens.push_back(text(kTexts[rng() % kTexts.size()]));
  }
  return tokens;
}

// Cuts a token's text into pieces at character borders, as the stop checker may.
std::vector<TextPiece> random_pieces(std::mt19937& rng, const Token& token) {
  std::vector<TextPiece> pieces(1, {token.id, "", false});
  for (const char c : token.text) {
    const bool border = (static_cast<uint8_t>(c) & 0xC0) != 0x80;
    if (border && rng() % 3 == 0) pieces.push_back({token.id, "", false});
    pieces.back().text += c;
  }
  pieces.back().completes_token = true;
  return pieces;
}

class OutputParserProperty : public testing::TestWithParam<bool> {};

TEST_P(OutputParserProperty, TheFoldIsTheSameHoweverTheTextIsCut) {
  const OutputFormat format = GetParam() ? by_id() : by_text();
  std::mt19937 rng(3);
  int with_reasoning = 0;
  for (int round = 0; round < 6000; ++round) {
    const std::vector<Token> tokens = random_output(rng);
    const State start = static_cast<State>(rng() % 3);
    const Fold expected = parse_whole(start, tokens, GetParam());
    const Fold whole = parse(format, start, tokens);

    OutputParser parser(format, start);
    Fold cut;
    int32_t pushed = 0;
    for (const Token& token : tokens) {
      for (const TextPiece& piece : random_pieces(rng, token)) {
        std::vector<OutputDelta> deltas;
        parser.push(piece, deltas);
        pushed += piece.completes_token ? 1 : 0;
        add(deltas, cut);
        ASSERT_LE(cut.accounted, pushed);
        ASSERT_EQ(cut.accounted + parser.unaccounted_tokens(), pushed);
      }
    }
    std::vector<OutputDelta> deltas;
    parser.finish(deltas);
    add(deltas, cut);
    std::string shown;
    for (const Token& token : tokens) shown += "[" + token.text + "]";
    ASSERT_EQ(cut.reasoning, expected.reasoning) << shown << static_cast<int>(start);
    ASSERT_EQ(cut.content, expected.content) << shown << static_cast<int>(start);
    ASSERT_EQ(whole.reasoning, expected.reasoning) << shown;
    ASSERT_EQ(whole.content, expected.content) << shown;
    ASSERT_EQ(parser.reasoning_tokens(), whole.reasoning_tokens) << shown;
    with_reasoning += expected.reasoning.empty() ? 0 : 1;
  }
  EXPECT_GT(with_reasoning, 1000);
}

INSTANTIATE_TEST_SUITE_P(Markers, OutputParserProperty, testing::Values(true, false),
                         [](const auto& values) { return values.param ? "ById" : "ByText"; });

// Detokeniser -> stop checker -> parser, as the server composes them, on the demo model's real
// vocabulary: 2-, 3- and 4-byte characters, markers and stop strings at every token border.
class ComposedTest : public testing::Test {
 protected:
  static void SetUpTestSuite() {
    auto loaded = Tokenizer::load(KVARN_SOURCE_DIR "/assets/demo-model/tokenizer.json");
    ASSERT_TRUE(loaded.is_ok()) << loaded.status().message();
    tokenizer_ = std::move(loaded).value().release();
  }
  static void TearDownTestSuite() { delete tokenizer_; }

  static Fold run(const std::vector<int32_t>& ids, const std::vector<std::string>& stops,
                  State start) {
    const OutputFormat format = OutputFormat::qwen3(*tokenizer_);
    Detokenizer detokenizer(*tokenizer_, true);
    StopChecker checker(stops, false);
    OutputParser parser(format, start);
    Fold fold;
    std::vector<OutputDelta> deltas;
    for (const int32_t id : ids) {
      for (const TextPiece& piece : checker.push(id, detokenizer.push(id)).pieces) {
        parser.push(piece, deltas);
      }
    }
    for (const TextPiece& piece : checker.finish(detokenizer.finish()).pieces) {
      parser.push(piece, deltas);
    }
    parser.finish(deltas);
    add(deltas, fold);
    fold.reasoning_tokens = parser.reasoning_tokens();
    fold.unaccounted = parser.unaccounted_tokens();
    return fold;
  }

  static Tokenizer* tokenizer_;
};
Tokenizer* ComposedTest::tokenizer_ = nullptr;

TEST_F(ComposedTest, EveryPrefixOfAnOutputIsSplitAsItsTextSays) {
  const std::string output =
      "<think>\nÉtude: 漢字 🙂, so 2+2=4.\n</think>\n\nIt is 4 🙂 — 漢!<|im_end|>";
  const std::vector<int32_t> ids = tokenizer_->encode(output);
  for (size_t n = 0; n <= ids.size(); ++n) {
    const std::vector<int32_t> prefix(ids.begin(), ids.begin() + static_cast<ptrdiff_t>(n));
    const Fold fold = run(prefix, {}, State::kStart);
    EXPECT_EQ(fold.accounted + fold.unaccounted, static_cast<int32_t>(n));
    const std::string decoded = sanitize_utf8(tokenizer_->decode(prefix, true));
    EXPECT_EQ(fold.content.find("<think>"), std::string::npos);
    // What was generated, less markers and the newlines beside them, in order.
    EXPECT_TRUE(decoded.find(fold.reasoning) != decoded.npos);
    EXPECT_TRUE(decoded.ends_with(fold.content));
  }
  const Fold whole = run(ids, {}, State::kStart);
  EXPECT_EQ(whole.reasoning, "Étude: 漢字 🙂, so 2+2=4.");
  EXPECT_EQ(whole.content, "It is 4 🙂 — 漢!");
}

TEST_F(ComposedTest, AStopStringCutsInReasoningAndContentAlike) {
  const std::vector<int32_t> ids =
      tokenizer_->encode("<think>\nalpha beta\n</think>\n\ngamma delta");
  EXPECT_EQ(run(ids, {"beta"}, State::kStart).reasoning, "alpha ");
  EXPECT_EQ(run(ids, {"beta"}, State::kStart).content, "");
  EXPECT_EQ(run(ids, {"delta"}, State::kStart).content, "gamma ");
  EXPECT_EQ(run(ids, {"</think>"}, State::kStart).content, "");
  EXPECT_EQ(run(ids, {"think>\n\nga"}, State::kStart).content, "");
}

TEST_F(ComposedTest, TheStartStateComesFromTheGenerationPrompt) {
  const OutputFormat format = OutputFormat::qwen3(*tokenizer_);
  const auto state = [&](std::string_view prompt) {
    return OutputParser::start_state(format, *tokenizer_, tokenizer_->encode(prompt));
  };
  const std::string user = "<|im_start|>user\nwhat is <think>?<|im_end|>\n";
  EXPECT_EQ(state(user + "<|im_start|>assistant\n"), State::kStart);
  EXPECT_EQ(state(user + "<|im_start|>assistant\n<think>\n"), State::kReasoning);
  EXPECT_EQ(state(user + "<|im_start|>assistant\n<think>\n\n</think>\n\n"), State::kContent);
  EXPECT_EQ(state(user), State::kStart);
  EXPECT_EQ(state(""), State::kStart);
}

}  // namespace
}  // namespace kvarn
