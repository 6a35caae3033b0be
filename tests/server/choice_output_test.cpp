// One choice from tokens to deltas: token accounting, stop strings, endings, hidden reasoning. And
// the fold property: the JSON body of a folded answer equals what the chunks of a stream add up to,
// however the tokens are cut, batched or merged.
#include "server/choice_output.h"

#include <gtest/gtest.h>

#include <random>

#include <nlohmann/json.hpp>

#include "server/fold.h"
#include "server/openai_api.h"
#include "server/token_stream.h"

namespace kvarn::test {
namespace {

using nlohmann::json;

const Tokenizer& tokenizer() {
  static const std::unique_ptr<Tokenizer> demo =
      Tokenizer::load(std::string(KVARN_SOURCE_DIR) + "/assets/demo-model/tokenizer.json").value();
  return *demo;
}
const OutputFormat& format() {
  static const OutputFormat qwen3 = OutputFormat::qwen3(tokenizer());
  return qwen3;
}
constexpr int32_t kEos = 6120;

TokenEvent event(int32_t token, std::optional<FinishReason> finish = {}, bool stop_id = false) {
  TokenEvent out;
  out.sampled.token = token;
  out.sampled.logprob = -0.25f;
  out.sampled.top_logprobs = {{token, -0.25f}, {1, -3.5f}};
  out.finish = finish;
  out.finished_by_stop_id = stop_id;
  return out;
}

// Ids of `text`; where `spelled`, in single bytes, so that markers are ordinary tokens and
// characters are cut.
std::vector<int32_t> ids_of(const std::string& text, bool spelled) {
  if (!spelled) return tokenizer().encode(text);
  static const std::vector<int32_t> bytes = [] {
    std::vector<int32_t> by_byte(256, -1);
    for (int32_t id = 0; id < tokenizer().vocab_size(); ++id) {
      const std::string& raw = tokenizer().token_bytes(id);
      if (raw.size() == 1 && !tokenizer().is_added(id)) {
        by_byte[static_cast<unsigned char>(raw[0])] = id;
      }
    }
    return by_byte;
  }();
  std::vector<int32_t> out;
  for (const char c : text) out.push_back(bytes[static_cast<unsigned char>(c)]);
  return out;
}

struct Output {
  Fold fold{1};
  std::vector<Delta> deltas;
  int32_t tokens = 0;
};

Output run(const std::vector<int32_t>& ids, const OutputRules& rules, FinishReason last,
           OutputParser::State start = OutputParser::State::kStart) {
  Output out;
  ChoiceOutput choice(0, tokenizer(), format(), start, rules);
  for (size_t i = 0; i < ids.size() && !choice.done(); ++i) {
    const bool end = i + 1 == ids.size();
    choice.push(event(ids[i], end ? std::optional(last) : std::nullopt), out.deltas);
  }
  out.tokens = choice.num_tokens();
  for (const Delta& delta : out.deltas) out.fold.add(delta);
  return out;
}

OutputRules everything() {
  OutputRules rules;
  rules.response.logprobs = true;
  rules.response.top_logprobs = 1;
  rules.response.token_ids = true;
  return rules;
}

TEST(ChoiceOutput, AccountsForEveryTokenOnce) {
  std::vector<int32_t> ids = ids_of("<think>\nwhy\n</think>\n\nbecause \xF0\x9F\x98\x80!", false);
  ids.push_back(kEos);
  const Output result = run(ids, everything(), FinishReason::kStop);
  const FoldedChoice& choice = result.fold.choices()[0];
  EXPECT_EQ(choice.content, "because \xF0\x9F\x98\x80!");
  EXPECT_EQ(choice.reasoning, "why");
  EXPECT_EQ(choice.token_ids, ids);
  EXPECT_EQ(choice.logprobs.size(), ids.size());
  EXPECT_EQ(choice.num_tokens, static_cast<int64_t>(ids.size()));
  EXPECT_EQ(choice.finish->eos_token_id, kEos);
  EXPECT_EQ(result.deltas.back().kind, DeltaKind::kFinish);
}

TEST(ChoiceOutput, EndsAtAStopStringThatSpansTokens) {
  OutputRules rules = everything();
  rules.stop = {"needle"};
  const std::vector<int32_t> ids = ids_of("hay needle more hay", true);
  const Output result = run(ids, rules, FinishReason::kLength);
  EXPECT_EQ(result.fold.choices()[0].content, "hay ");
  EXPECT_EQ(result.fold.choices()[0].finish->stop_string, "needle");
  EXPECT_EQ(result.tokens, 10);  // "hay needle"
  EXPECT_EQ(result.fold.choices()[0].token_ids.size(), 10u);
  EXPECT_EQ(result.fold.usage().completion_tokens, 10);
  rules.include_stop_string = true;
  EXPECT_EQ(run(ids, rules, FinishReason::kLength).fold.choices()[0].content, "hay needle");
}

TEST(ChoiceOutput, LooksForNoStopStringBeforeMinTokens) {
  OutputRules rules;
  rules.stop = {"a"};
  rules.min_tokens = 4;
  const Output result = run(ids_of("aaaaaaaa", true), rules, FinishReason::kLength);
  EXPECT_EQ(result.tokens, 4);
  EXPECT_EQ(result.fold.choices()[0].content, "aaa");
}

TEST(ChoiceOutput, HidesReasoningTextButCountsAndShowsItsTokens) {
  OutputRules rules = everything();
  rules.response.include_reasoning = false;
  std::vector<int32_t> ids = ids_of("<think>\nsecret\n</think>\n\nshown", false);
  const Output result = run(ids, rules, FinishReason::kLength);
  EXPECT_EQ(result.fold.choices()[0].reasoning, "");
  EXPECT_EQ(result.fold.choices()[0].content, "shown");
  EXPECT_EQ(result.fold.choices()[0].token_ids, ids);
  EXPECT_GT(result.fold.usage().reasoning_tokens, 2);
}

TEST(ChoiceOutput, LeavesTheEndingTokenOutOfTheText) {
  OutputRules rules;
  rules.response.skip_special_tokens = false;
  std::vector<int32_t> ids = ids_of("done", false);
  ids.push_back(kEos);
  EXPECT_EQ(run(ids, rules, FinishReason::kStop).fold.choices()[0].content, "done");
  rules.include_stop_string = true;
  EXPECT_EQ(run(ids, rules, FinishReason::kStop).fold.choices()[0].content, "done<|im_end|>");
}

TEST(ChoiceOutput, ClosesACutCharacterWithOneReplacement) {
  const std::vector<int32_t> ids = ids_of("a\xF0\x9F\x98", true);
  EXPECT_EQ(run(ids, {}, FinishReason::kLength).fold.choices()[0].content, "a\xEF\xBF\xBD");
}

TEST(ChoiceOutput, GivesIdsWithoutTextWhereNoneIsWanted) {
  OutputRules rules = everything();
  rules.response.text = false;
  const std::vector<int32_t> ids = ids_of("<think>a</think>b", false);
  const Output result = run(ids, rules, FinishReason::kLength);
  EXPECT_EQ(result.fold.choices()[0].content, "");
  EXPECT_EQ(result.fold.choices()[0].token_ids, ids);
  EXPECT_EQ(result.deltas.size(), ids.size());  // the last token travels with the finish
}

TEST(ChoiceOutput, OfNoTokensIsAFinishOnly) {
  const OutputRules rules;
  ChoiceOutput choice(0, tokenizer(), format(), OutputParser::State::kStart, rules);
  std::vector<Delta> deltas;
  choice.push(event(-1, FinishReason::kLength), deltas);
  ASSERT_EQ(deltas.size(), 1u);
  EXPECT_EQ(deltas[0].num_tokens, 0);
}

// What a client adds up from the chunks of a stream.
json fold_of_chunks(const std::vector<std::string>& payloads, bool chat) {
  json out{{"content", ""}, {"reasoning", ""}, {"ids", json::array()}, {"logprobs", json::array()}};
  for (const std::string& payload : payloads) {
    const json chunk = json::parse(payload);  // throws where a chunk is not JSON or not UTF-8
    const json& choice = chunk["choices"][0];
    if (chat) {
      const json& delta = choice["delta"];
      out["content"] = out["content"].get<std::string>() + delta.value("content", "");
      out["reasoning"] = out["reasoning"].get<std::string>() + delta.value("reasoning_content", "");
      EXPECT_LE(delta.size(), 2u);
    } else {
      out["content"] = out["content"].get<std::string>() + choice["text"].get<std::string>();
    }
    for (const json& id : choice.value("token_ids", json::array())) out["ids"].push_back(id);
    if (!choice["logprobs"].is_null()) {
      if (chat) {
        for (const json& entry : choice["logprobs"]["content"]) out["logprobs"].push_back(entry);
      } else {
        for (const char* member : {"tokens", "token_logprobs", "top_logprobs", "text_offset"}) {
          for (const json& entry : choice["logprobs"][member]) out[member].push_back(entry);
        }
      }
    }
    if (!choice["finish_reason"].is_null()) {
      out["finish_reason"] = choice["finish_reason"];
      out["stop_reason"] = choice["stop_reason"];
    }
  }
  return out;
}

json fold_of_body(const std::string& body, bool chat) {
  const json parsed = json::parse(body);
  const json& choice = parsed["choices"][0];
  json out{{"content", ""}, {"reasoning", ""}, {"logprobs", json::array()}};
  if (chat) {
    const json& message = choice["message"];
    if (!message["content"].is_null()) out["content"] = message["content"];
    out["reasoning"] = message.value("reasoning_content", "");
    out["logprobs"] = choice["logprobs"]["content"];
  } else {
    out["content"] = choice["text"];
    for (const char* member : {"tokens", "token_logprobs", "top_logprobs", "text_offset"}) {
      out[member] = choice["logprobs"][member];
    }
  }
  out["ids"] = choice["token_ids"];
  out["finish_reason"] = choice["finish_reason"];
  out["stop_reason"] = choice["stop_reason"];
  return out;
}

struct Sample {
  std::string text;
  std::vector<std::string> stop;
};

const std::vector<Sample> kCorpus = {
    {"<think>\nreason one\n\nreason two\n</think>\n\nThe answer is 42.", {}},
    {"plain \xC3\xA9\xE2\x82\xAC\xF0\x9F\x98\x80 text\n\nwith lines", {"zzz"}},
    {"<think>never closed", {}},
    {"</think>stray <think>late</think>tail", {}},
    {"<tool_call>\n{\"name\": \"f\"}\n</tool_call>", {"</tool"}},
    {"  \n lead <think>\n\n</think>\n\n{\"k\": \"\\u00e9\\\"\"}", {}},
    {"stop at the \xF0\x9F\x98\x80 smile", {"\xF0\x9F\x98\x80"}},
    {"aaab aaab aaac", {"aaac", "aac"}},
    {"", {}},
    {"bad \xF0\x9F\x98 bytes \xFF\xFE end", {}},
    {"line\xE2\x80\xA8separator \xC2\x85 next", {}},
};

class FoldProperty : public ::testing::TestWithParam<OpenAiEndpoint> {};
INSTANTIATE_TEST_SUITE_P(Endpoints, FoldProperty,
                         ::testing::Values(OpenAiEndpoint::kChat, OpenAiEndpoint::kCompletions));

TEST_P(FoldProperty, HoldsForEveryCutBatchAndMerge) {
  const bool chat = GetParam() == OpenAiEndpoint::kChat;
  const OutputFormat plain = OutputFormat::plain();
  std::mt19937 random(11);
  for (const Sample& sample : kCorpus) {
    for (const bool spelled : {false, true}) {
      const std::vector<int32_t> all = ids_of(sample.text, spelled);
      for (size_t length = 0; length <= all.size(); ++length) {  // ends inside everything
        std::vector<int32_t> ids(all.begin(), all.begin() + static_cast<std::ptrdiff_t>(length));
        const bool by_eos = random() % 2 == 0 || ids.empty();
        if (by_eos) ids.push_back(kEos);
        OutputRules rules = everything();
        rules.stop = sample.stop;
        rules.response.include_reasoning = random() % 4 != 0;

        ResponseStyle style;
        style.endpoint = GetParam();
        style.logprobs = style.token_ids = true;
        ChoiceOutput choice(0, tokenizer(), chat ? format() : plain, OutputParser::State::kStart,
                            rules);
        TokenStream merged(size_t{1} << 30);
        OpenAiStream every(style), lazy(style);
        std::vector<std::string> every_payload, lazy_payload;
        Fold fold(1);
        const auto drain = [&] {
          while (auto item = merged.try_take()) {
            if (const auto* delta = std::get_if<Delta>(&*item)) lazy.write(*delta, lazy_payload);
          }
        };
        for (size_t i = 0; i < ids.size() && !choice.done(); ++i) {
          const bool last = i + 1 == ids.size();
          std::vector<Delta> deltas;
          choice.push(event(ids[i], !last    ? std::nullopt
                                    : by_eos ? std::optional(FinishReason::kStop)
                                             : std::optional(FinishReason::kLength)),
                      deltas);
          for (const Delta& delta : deltas) {
            every.write(delta, every_payload);
            merged.push(delta);
            fold.add(delta);
          }
          if (random() % 5 == 0) drain();
        }
        drain();
        ASSERT_TRUE(choice.done());
        const json whole = fold_of_body(openai_body(style, fold), chat);
        EXPECT_EQ(fold_of_chunks(every_payload, chat), whole) << sample.text;
        EXPECT_EQ(fold_of_chunks(lazy_payload, chat), whole) << sample.text;
        EXPECT_EQ(whole["ids"].size(), static_cast<size_t>(choice.num_tokens()));
        EXPECT_EQ(fold.usage().completion_tokens, choice.num_tokens());
        const std::string content = whole["content"];
        if (chat && !spelled) {
          EXPECT_EQ(content.find("think>"), std::string::npos) << sample.text;
        }
      }
    }
  }
}

TEST(FoldProperty, LineSeparatorsAreEscapedOnTheWire) {
  ResponseStyle style;
  Fold fold(1);
  Delta delta;
  delta.text =
      "a\xE2\x80\xA8"
      "b\xC2\x85"
      "c\xE2\x80\xA9";
  fold.add(delta);
  const std::string body = openai_body(style, fold);
  EXPECT_NE(body.find("a\\u2028b\\u0085c\\u2029"), std::string::npos) << body;
}

}  // namespace
}  // namespace kvarn::test
