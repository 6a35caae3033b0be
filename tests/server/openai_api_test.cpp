// Bodies -> GenerateRequest and validate(): a matrix made from the field tables (wrong types, both
// sides of each bound, null), and seeded random and mutated bodies.
#include "server/openai_api.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <random>

#include <nlohmann/json.hpp>

#include "server/json_out.h"
#include "server/validate.h"

namespace kvarn::test {
namespace {

using nlohmann::json;
using nlohmann::ordered_json;

constexpr int kDepth = 100;

ModelInfo model() {
  ModelInfo info;
  info.served_names = {"demo"};
  info.vocab_size = 1000;
  info.max_model_len = 4096;
  info.max_num_seqs = 64;
  return info;
}

json minimal(OpenAiEndpoint endpoint) {
  return endpoint == OpenAiEndpoint::kChat
             ? json::parse(R"({"messages":[{"role":"user","content":"x"}]})")
             : json{{"prompt", "x"}};
}

// The whole way of a request up to the engine, without one.
Status check(OpenAiEndpoint endpoint, const std::string& body) {
  Result<OpenAiRequest> request = parse_openai_request(endpoint, body, kDepth);
  if (!request.is_ok()) return request.status();
  KVARN_RETURN_IF_ERROR(validate(request->generate, model(), ServerConfig{}));
  return validate_model(request->generate.model, model(), *request->generate.names);
}

struct Row {
  const char* name;
  const char* good;  // JSON values that pass, comma-separated
  const char* bad;   // values that fail with invalid_value (R)
  const char* type;  // values that fail with invalid_type (T)
  bool chat = true, completions = true;
  const char* with = "{}";  // members that the row needs
};

const std::vector<Row> kRows = {
    {"model", R"("demo")", "", "1,true,[],{}"},
    {"stream", "true,false", "", R"(0,1,"true",[])"},
    {"stream_options", R"({},{"include_usage":true},{"other":1})", "", R"(1,"x",[])", true, true,
     R"({"stream":true})"},
    {"max_completion_tokens", "1,4096,3.0", "0,-1,4097", R"("1",1.5,true,[])", true, false},
    {"max_tokens", "1,4096,1e2", "0,4097", R"("1",1.5,true)", true, false},
    {"max_tokens", "0,1,4096", "-1,4097", R"("1",1.5,true)", false, true},
    {"temperature", "0,1e-6,0.7,2", "-0.1,2.1", R"("1",true,[],{})"},
    {"top_p", "0,0.5,1", "-0.01,1.01", R"("1",true)"},
    {"top_k", "-1,0,1,2000000000", "-2", R"("1",1.5,false)"},
    {"min_p", "0,1", "-0.1,1.1", R"("0")"},
    {"repetition_penalty", "0.01,1,10", "0,-1,10.1", R"("1")"},
    {"presence_penalty", "-2,0,2", "-2.1,2.1", R"("1")"},
    {"frequency_penalty", "-2,0,2", "-2.1,2.1", R"("1")"},
    {"logit_bias", R"({},{"5":100},{"999":-100})",
     R"({"1000":1},{"-1":1},{"x":1},{"05":1},{"5":101})", R"([],"x",{"5":"1"},{"5":null})"},
    {"seed", "0,-9223372036854775808,9223372036854775807", "1e30,18446744073709551615",
     R"("1",1.5)"},
    {"n", "1,2,64", "0,-1,65,129", R"("1",1.5)"},
    {"stop", R"("a",[],["a","b"])",
     R"("",[""],["a","a","a","a","a","a","a","a","a","a","a","a","a","a","a","a","a"])",
     R"(1,[1],{})"},
    {"stop_token_ids", "[],[0,999]", "[1000],[-1]", R"("1",["1"],[1.5])"},
    {"min_tokens", "0,10", "-1,4097", R"("1",true)"},
    {"ignore_eos", "true,false", "", R"(0,"true")"},
    {"include_stop_str_in_output", "true,false", "", "0"},
    {"skip_special_tokens", "true,false", "", "0"},
    {"logprobs", "true,false", "", R"(1,"true")", true, false},
    {"logprobs", "0,20", "-1,21", R"(true,"1")", false, true},
    {"top_logprobs", "0,20", "-1,21", R"(true,"1",1.5)", true, false, R"({"logprobs":true})"},
    {"return_token_ids", "true,false", "", "1"},
    {"echo", "true,false", "", "1", false, true},
    {"response_format", R"({"type":"text"})", R"({"type":"yaml"})", R"("text",[],{"type":1})"},
    {"chat_template_kwargs", R"({},{"enable_thinking":true},{"other":[1]})",
     R"({"messages":1},{"tools":1},{"add_generation_prompt":true})",
     R"([],"x",{"enable_thinking":1})", true, false},
    {"enable_thinking", "true,false", "", "1", true, false},
    {"reasoning_effort", R"("none","minimal","low","medium","high","xhigh","max")", R"("huge","")",
     "1,true", true, false},
    {"include_reasoning", "true,false", "", "1", true, false},
    {"cache_salt", R"("a")", R"("")", "1"},
    {"priority", "0", "2147483648,-2147483649", R"("1",1.5)"},
    {"messages", R"([{"role":"user","content":"x"}])", R"([],[{"role":"robot","content":"x"}])",
     R"("x",{},[1],[{"role":1}],[{"role":"user","content":1}])", true, false},
    {"prompt", R"("x",["x","y"],[1,2],[[1],[2]])", R"("",[],[""],[1000],[[-1]],[[]])",
     R"(1,true,{},["x",1],[1,"x"],[[1],2],[[1.5]])", false, true},
    // Accepted without effect.
    {"user", R"("u",1)", "", ""},
    {"metadata", "{},1", "", ""},
    {"store", "true,1", "", ""},
    {"service_tier", R"("auto")", "", ""},
    {"unknown_member", R"(1,"x",[],{})", "", ""},
};

class FieldMatrix : public ::testing::TestWithParam<OpenAiEndpoint> {
 protected:
  void expect(const Row& row, const char* values, const std::string& reason) {
    const json list = json::parse("[" + std::string(values) + "]");
    for (const json& value : list) {
      json body = minimal(GetParam());
      body.update(json::parse(row.with));
      body[row.name] = value;
      const Status status = check(GetParam(), body.dump());
      const std::string what =
          std::string(row.name) + " = " + value.dump() + ": " + status.message();
      EXPECT_EQ(status.reason(), reason) << what;
      if (!reason.empty()) {
        EXPECT_THAT(status.param(), ::testing::StartsWith(row.name)) << what;
      }
    }
  }
};
INSTANTIATE_TEST_SUITE_P(Endpoints, FieldMatrix,
                         ::testing::Values(OpenAiEndpoint::kChat, OpenAiEndpoint::kCompletions));

TEST_P(FieldMatrix, GivesTheStatedErrorOrNone) {
  for (const Row& row : kRows) {
    if (GetParam() == OpenAiEndpoint::kChat ? !row.chat : !row.completions) continue;
    expect(row, row.good, "");
    expect(row, row.bad, "invalid_value");
    expect(row, row.type, "invalid_type");
    const bool required = std::string(row.name) == "messages" || std::string(row.name) == "prompt";
    expect(row, "null", required ? "missing_required_parameter" : "");
  }
}

TEST_P(FieldMatrix, RefusesLaterStagesUnlessTheyHoldTheirDefault) {
  struct Later {
    const char *name, *value, *harmless;
    bool completions;
  };
  const std::vector<Later> later = {
      {"tools", R"([{"type":"function"}])", "null", false},
      {"tool_choice", R"("auto")", R"("none")", false},
      {"tool_choice", R"({"type":"function","function":{"name":"f"}})", "null", false},
      {"parallel_tool_calls", "false", "true", false},
      {"thinking_token_budget", "5", "-1", false},
      {"add_generation_prompt", "false", "true", false},
      {"continue_final_message", "true", "false", false},
      {"priority", "1", "0", true},
      {"bypass_prefix_cache", "true", "false", true},
      {"return_timings", "true", "false", true},
      {"best_of", "2", "1", true},
      {"use_beam_search", "true", "false", true},
      {"modalities", R"(["audio"])", R"(["text"])", false},
      {"verbosity", R"("low")", R"("medium")", false},
      {"response_format", R"({"type":"json_object"})", R"({"type":"text"})", true},
  };
  for (const Later& field : later) {
    if (GetParam() == OpenAiEndpoint::kCompletions && !field.completions) continue;
    json body = minimal(GetParam());
    body[field.name] = json::parse(field.value);
    const Status status = check(GetParam(), body.dump());
    EXPECT_EQ(status.reason(), "unsupported_parameter") << field.name << ": " << status.message();
    EXPECT_THAT(status.param(), ::testing::StartsWith(field.name));
    body[field.name] = json::parse(field.harmless);
    EXPECT_TRUE(check(GetParam(), body.dump()).is_ok()) << field.name;
  }
}

TEST(OpenAiConflicts, NameBothFields) {
  struct Case {
    const char *members, *param;
  };
  for (const Case& c : std::vector<Case>{
           {R"({"stream_options":{"include_usage":true}})", "stream_options"},
           {R"({"stream":true,"stream_options":{"continuous_usage_stats":true}})",
            "stream_options.continuous_usage_stats"},
           {R"({"max_tokens":1,"max_completion_tokens":2})", "max_completion_tokens"},
           {R"({"top_logprobs":1})", "top_logprobs"},
           {R"({"enable_thinking":true,"chat_template_kwargs":{"enable_thinking":false}})",
            "enable_thinking"}}) {
    json body = minimal(OpenAiEndpoint::kChat);
    body.update(json::parse(c.members));
    const Status status = check(OpenAiEndpoint::kChat, body.dump());
    EXPECT_EQ(status.reason(), "invalid_value") << c.members;
    EXPECT_EQ(status.param(), c.param) << status.message();
  }
}

TEST(OpenAiErrors, HaveTheWordingOfTheDocs) {
  const auto message = [](const char* members) {
    json body = minimal(OpenAiEndpoint::kChat);
    body.update(json::parse(members));
    return check(OpenAiEndpoint::kChat, body.dump()).message();
  };
  EXPECT_EQ(message(R"({"temperature":2.5})"), "'temperature' must be 0..2, got 2.5");
  EXPECT_EQ(message(R"({"temperature":"1"})"), "'temperature' must be a number, got string");
  EXPECT_EQ(message(R"({"messages":null})"), "'messages' is required");
  EXPECT_EQ(message(R"({"top_logprobs":1})"), "'top_logprobs' needs 'logprobs'");
  EXPECT_EQ(message(R"({"model":"gpt"})"), "model 'gpt' does not exist; served: demo");
  EXPECT_EQ(message(R"({"reasoning_effort":"a\u0001b"})"),
            "'reasoning_effort' must be one of none, minimal, low, medium, high, xhigh, max, got "
            "'a\\u0001b'");
  EXPECT_THAT(message(R"({"stop":5})"),
              ::testing::HasSubstr("'stop' must be a string or an array"));
}

TEST(OpenAiErrors, CutLongValues) {
  json body = minimal(OpenAiEndpoint::kChat);
  body["model"] = std::string(1 << 20, 'm');
  const Status status = check(OpenAiEndpoint::kChat, body.dump());
  EXPECT_LT(status.message().size(), 200u);
}

TEST(OpenAiMessages, ReadEveryRole) {
  const Result<OpenAiRequest> request = parse_openai_request(OpenAiEndpoint::kChat, R"({"messages":[
    {"role":"developer","content":[{"type":"text","text":"a"},{"type":"text","text":"b"}],"name":"n"},
    {"role":"assistant","content":null,"reasoning":"r","reasoning_content":"first",
     "tool_calls":[{"id":"c1","type":"function","function":{"name":"f","arguments":"{\"a\": 1}"}},
                   {"function":{"name":"g","arguments":{"z":1,"a":2}}}]},
    {"role":"tool","content":"result","tool_call_id":"c1"},
    {"role":"assistant","content":[{"type":"refusal","refusal":"no"}]}]})",
                                                             kDepth);
  ASSERT_TRUE(request.is_ok()) << request.status().message();
  const auto& chat = std::get<ChatPrompt>(request->generate.prompts.front());
  EXPECT_EQ(chat.messages[0].content, "a\nb");
  EXPECT_FALSE(chat.messages[1].content.has_value());
  EXPECT_EQ(chat.messages[1].reasoning_content, "first");
  EXPECT_EQ(chat.messages[1].tool_calls[0].arguments, "{\"a\": 1}");
  EXPECT_EQ(chat.messages[1].tool_calls[1].arguments_object->dump(), R"({"z":1,"a":2})");
  EXPECT_EQ(chat.messages[2].tool_call_id, "c1");
  EXPECT_EQ(chat.messages[3].content, "no");
  EXPECT_TRUE(validate_chat(chat, kHttpParams).is_ok());
}

TEST(OpenAiMessages, BlameThePath) {
  struct Case {
    const char *messages, *reason, *param;
  };
  for (const Case& c : std::vector<Case>{
           {R"([{"role":"user","content":"x"},{"role":"tool","content":"x"}])",
            "missing_required_parameter", "messages[1].tool_call_id"},
           {R"([{"role":"function","content":"x"}])", "unsupported_parameter", "messages[0].role"},
           {R"([{"role":"assistant"}])", "missing_required_parameter", "messages[0].content"},
           {R"([{"role":"assistant","tool_calls":[{"function":{"name":"f"}}]}])",
            "missing_required_parameter", "messages[0].tool_calls[0].function.arguments"},
           {R"([{"role":"assistant","tool_calls":[{"function":{"name":"f","arguments":1}}]}])",
            "invalid_type", "messages[0].tool_calls[0].function.arguments"},
           {R"([{"role":"assistant","tool_calls":[{"type":"custom"}]}])", "invalid_value",
            "messages[0].tool_calls[0].type"},
           {R"([{"role":"user","content":[{"type":"text"}]}])", "missing_required_parameter",
            "messages[0].content[0].text"},
           {R"([{"role":"user","content":["x"]}])", "invalid_type", "messages[0].content[0]"},
           {R"([{"role":"user","content":[{"type":"video"}]}])", "invalid_value",
            "messages[0].content[0].type"}}) {
    const Status status =
        check(OpenAiEndpoint::kChat, "{\"messages\":" + std::string(c.messages) + "}");
    EXPECT_EQ(status.reason(), c.reason) << c.messages << status.message();
    EXPECT_EQ(status.param(), c.param) << c.messages;
  }
}

TEST(OpenAiDefaults, ComeFromTheModelUnlessGiven) {
  ModelInfo info = model();
  info.sampling = {0.6, 0.95, 0.1, 1.1, 20, 100};
  const auto sampling = [&](const char* members) {
    json body = minimal(OpenAiEndpoint::kChat);
    body.update(json::parse(members));
    return resolve_sampling(
        parse_openai_request(OpenAiEndpoint::kChat, body.dump(), kDepth)->generate, info);
  };
  const SamplingParams defaults = sampling("{}");
  EXPECT_FLOAT_EQ(defaults.temperature, 0.6f);
  EXPECT_EQ(defaults.top_k, 20);
  EXPECT_EQ(defaults.num_logprobs, -1);
  EXPECT_NE(defaults.seed, sampling("{}").seed);
  const SamplingParams given =
      sampling(R"({"temperature":0,"top_k":-1,"seed":-1,"logprobs":true})");
  EXPECT_EQ(given.temperature, 0.f);
  EXPECT_EQ(given.top_k, 0);
  EXPECT_EQ(given.seed, ~uint64_t{0});
  EXPECT_EQ(given.num_logprobs, 0);
}

TEST(OpenAiDefaults, OfTheOutputLimit) {
  ModelInfo info = model();
  ServerConfig config;
  const auto limit = [&](OpenAiEndpoint endpoint, const char* members, int64_t prompt) {
    json body = minimal(endpoint);
    body.update(json::parse(members));
    const OpenAiRequest request = parse_openai_request(endpoint, body.dump(), kDepth).value();
    return resolve_max_tokens(request.generate, prompt, endpoint == OpenAiEndpoint::kChat,
                              "messages", info, config);
  };
  EXPECT_EQ(*limit(OpenAiEndpoint::kChat, "{}", 96), 4000);
  EXPECT_EQ(*limit(OpenAiEndpoint::kCompletions, "{}", 96), 16);
  EXPECT_EQ(limit(OpenAiEndpoint::kChat, "{}", 4096).status().reason(), "context_length_exceeded");
  EXPECT_EQ(limit(OpenAiEndpoint::kChat, R"({"max_tokens":10})", 4087).status().param(),
            "messages");
  EXPECT_EQ(*limit(OpenAiEndpoint::kCompletions, R"({"max_tokens":0})", 4096), 0);
  EXPECT_EQ(limit(OpenAiEndpoint::kCompletions, R"({"min_tokens":17})", 5).status().param(),
            "min_tokens");
  config.default_max_tokens = 50;
  EXPECT_EQ(*limit(OpenAiEndpoint::kChat, "{}", 96), 50);
  EXPECT_EQ(*limit(OpenAiEndpoint::kChat, R"({"max_tokens":60})", 96), 60);
  info.sampling.max_new_tokens = 20;
  EXPECT_EQ(*limit(OpenAiEndpoint::kChat, "{}", 96), 20);
}

// Mutations keep most of a body intact, so that they reach deep into the parser.
TEST(OpenAiFuzz, NeverCrashesAndAlwaysNamesAReason) {
  const std::vector<std::string> seeds = {
      R"({"messages":[{"role":"user","content":[{"type":"text","text":"h\u00e9\ud83d\ude00"}]}],"n":2,"stop":["a"],"logit_bias":{"5":1.5},"stream":true,"stream_options":{"include_usage":true},"chat_template_kwargs":{"enable_thinking":false}})",
      R"({"prompt":[[1,2,3],[4]],"max_tokens":5,"logprobs":3,"seed":-1,"temperature":1e-3,"cache_salt":"s"})",
      R"({"messages":[{"role":"assistant","content":null,"tool_calls":[{"id":"c","type":"function","function":{"name":"f","arguments":{"a":[]}}}]},{"role":"tool","tool_call_id":"c","content":"x"}]})"};
  const std::string alphabet = "{}[]\",:\\0129.eE-+tfnu \x01\x80\xff\xc3";
  std::mt19937 random(20240607);
  int accepted = 0;
  for (int i = 0; i < 20000; ++i) {
    std::string body = seeds[random() % seeds.size()];
    for (unsigned edits = random() % 4; edits > 0 && !body.empty(); --edits) {
      const size_t at = random() % body.size();
      switch (random() % 4) {
        case 0:
          body[at] = alphabet[random() % alphabet.size()];
          break;
        case 1:
          body.erase(at, random() % 5);
          break;
        case 2:
          body.insert(at, 1, alphabet[random() % alphabet.size()]);
          break;
        default:
          body.insert(at, body.substr(random() % body.size(), random() % 12));
      }
    }
    for (const OpenAiEndpoint endpoint : {OpenAiEndpoint::kChat, OpenAiEndpoint::kCompletions}) {
      const Status status = check(endpoint, body);
      if (status.is_ok()) {
        ++accepted;
        continue;
      }
      EXPECT_FALSE(status.reason().empty());
      EXPECT_TRUE(status.code() == StatusCode::kInvalidArgument ||
                  status.code() == StatusCode::kNotFound)
          << body;
      EXPECT_NO_THROW(json::parse(dump_json(ordered_json(status.message()))));
    }
  }
  EXPECT_GT(accepted, 1000);  // else the mutations test the JSON parser only
}

}  // namespace
}  // namespace kvarn::test
