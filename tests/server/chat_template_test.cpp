#include "server/chat_template.h"

#include <fstream>

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <nlohmann/json.hpp>

namespace kvarn {
namespace {

using nlohmann::ordered_json;
using testing::HasSubstr;

ordered_json parsed(const char* text) { return ordered_json::parse(text); }

class QwenTemplateTest : public testing::Test {
 protected:
  void SetUp() override {
    std::ifstream in(KVARN_SOURCE_DIR "/tests/data/qwen3/tokenizer_config.json");
    const ordered_json config = ordered_json::parse(in);
    auto compiled = ChatTemplate::compile(config.at("chat_template").get<std::string>());
    ASSERT_TRUE(compiled.is_ok()) << compiled.status().message();
    template_ = std::move(compiled).value();
  }

  std::string render(const char* variables) const {
    auto text = template_->render(parsed(variables));
    EXPECT_TRUE(text.is_ok()) << text.status().message();
    return text.is_ok() ? *text : "";
  }

  std::unique_ptr<ChatTemplate> template_;
};

TEST_F(QwenTemplateTest, HasNoDefaultSystemPrompt) {
  EXPECT_EQ(
      render(R"({"messages": [{"role": "user", "content": "Hi"}], "add_generation_prompt": true})"),
      "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n");
}

TEST_F(QwenTemplateTest, ThinkingOffClosesAnEmptyThinkBlock) {
  EXPECT_THAT(
      render(R"({"messages": [{"role": "user", "content": "Hi"}], "add_generation_prompt": true,
                         "enable_thinking": false})"),
      testing::EndsWith("<|im_start|>assistant\n<think>\n\n</think>\n\n"));
}

TEST_F(QwenTemplateTest, ToolsKeepTheOrderOfTheirMembersAndEscapeNothing) {
  const std::string text =
      render(R"({"messages": [{"role": "system", "content": "S"}, {"role": "user", "content": "U"}],
      "tools": [{"type": "function", "function": {"name": "f", "description": "<é & \"q\">", "a": 1.0, "b": null}}]})");
  EXPECT_THAT(text, testing::StartsWith("<|im_start|>system\nS\n\n# Tools\n"));
  EXPECT_THAT(
      text, HasSubstr("\n{\"type\": \"function\", \"function\": {\"name\": \"f\", \"description\": "
                      "\"<é & \\\"q\\\">\", \"a\": 1.0, \"b\": null}}\n"));
}

TEST_F(QwenTemplateTest, ReasoningBeforeTheLastUserMessageIsDropped) {
  const std::string text = render(R"({"messages": [{"role": "user", "content": "1"},
      {"role": "assistant", "content": "<think>\nold\n</think>\n\nA"}, {"role": "user", "content": "2"},
      {"role": "assistant", "content": "B", "reasoning_content": "new"}]})");
  EXPECT_EQ(text,
            "<|im_start|>user\n1<|im_end|>\n<|im_start|>assistant\nA<|im_end|>\n<|im_start|>"
            "user\n2<|im_end|>\n"
            "<|im_start|>assistant\n<think>\nnew\n</think>\n\nB<|im_end|>\n");
}

TEST_F(QwenTemplateTest, NeighbouringToolMessagesShareAUserBlock) {
  const std::string text = render(R"({"messages": [{"role": "user", "content": "q"},
      {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "f", "arguments": "{\"a\":  1}"}},
                                                         {"function": {"name": "g", "arguments": {"b": [1, "x"]}}}]},
      {"role": "tool", "content": "1"}, {"role": "tool", "content": "2"}]})");
  EXPECT_THAT(
      text,
      HasSubstr(
          "<tool_call>\n{\"name\": \"f\", \"arguments\": {\"a\":  1}}\n</tool_call>\n"
          "<tool_call>\n{\"name\": \"g\", \"arguments\": {\"b\": [1, \"x\"]}}\n</tool_call>"));
  EXPECT_THAT(
      text, HasSubstr("<|im_start|>user\n<tool_response>\n1\n</tool_response>\n<tool_response>\n2\n"
                      "</tool_response><|im_end|>\n"));
}

TEST_F(QwenTemplateTest, ContentThatIsNoStringIsATemplateErrorOfTheMessages) {
  const auto text =
      template_->render(parsed(R"({"messages": [{"role": "user", "content": null}]})"));
  ASSERT_FALSE(text.is_ok());
  EXPECT_EQ(text.status().code(), StatusCode::kInvalidArgument);
  EXPECT_EQ(text.status().reason(), "template_error");
  EXPECT_EQ(text.status().param(), "messages");
  EXPECT_THAT(text.status().message(), HasSubstr("chat template, line 20: "));
}

TEST_F(QwenTemplateTest, AThousandMessagesRenderFarBelowTheStepLimit) {
  ordered_json messages = ordered_json::array();
  for (int i = 0; i < 2048; ++i) {
    messages.push_back({{"role", "user"}, {"content", std::string(200, 'u')}});
    messages.push_back(
        {{"role", "assistant"}, {"content", "<think>r</think>" + std::string(200, 'a')}});
  }
  const auto text = template_->render({{"messages", messages}, {"add_generation_prompt", true}});
  ASSERT_TRUE(text.is_ok()) << text.status().message();
  EXPECT_GT(text->size(), size_t{2048} * 400);
}

TEST(ChatTemplateTest, ACompileErrorNamesLineAndConstruct) {
  const std::pair<const char*, const char*> cases[] = {
      {"a\n{% include 'x' %}", "line 2: {% include %} is not supported"},
      {"{% extends 'x' %}", "line 1: {% extends %} is not supported"},
      {"\n\n{{ x | nofilter }}", "line 3: filter 'nofilter' is not supported"},
      {"{{ x is odder }}", "line 1: test 'odder' is not supported"},
      {"{% for x in y recursive %}{% endfor %}", "line 1: a recursive loop"},
      {"{% if x %}\n\nabc", "line 1: the block is not closed: expected {% endif %}"},
      {"{{ x", "line 1: tag {{ is not closed"},
      {"{# x", "comment {# is not closed"},
      {"{{ 'x }}", "string is not closed"},
      {"{{ (1 }}", "line 1: unexpected '}', expected ')'"},
      {"{{ 1 + }}", "line 1: expected an expression, got '}}'"},
      {"{{ a ? b }}", "unexpected character '?'"},
      {"{% endfor %}", "{% endfor %} closes nothing"},
      {"{% break %}", "{% break %} is outside of a loop"},
      {"{{ 0x1f }}", "hexadecimal"},
      {"{{ 99999999999999999999 }}", "does not fit into 64 bits"},
      {"{% raw %}x", "{% raw %} is not closed"},
  };
  for (const auto& [source, expected] : cases) {
    const auto compiled = ChatTemplate::compile(source);
    ASSERT_FALSE(compiled.is_ok()) << source;
    EXPECT_THAT(compiled.status().message(), HasSubstr(expected)) << source;
    EXPECT_THAT(compiled.status().message(), testing::StartsWith("chat template"));
  }
}

std::string error_of(const std::string& source,
                     const ordered_json& variables = ordered_json::object()) {
  const auto compiled = ChatTemplate::compile(source);
  EXPECT_TRUE(compiled.is_ok()) << compiled.status().message();
  const auto text = (*compiled)->render(variables);
  return text.is_ok() ? "no error: " + text->substr(0, 100) : text.status().message();
}

TEST(ChatTemplateTest, ARuntimeErrorNamesTheLine) {
  EXPECT_EQ(error_of("a\n{{ x.y }}"), "chat template, line 2: 'x' is undefined");
  EXPECT_EQ(error_of("{% if true %}\n\n{{ raise_exception('no tools') }}{% endif %}"),
            "chat template, line 3: the template refuses the messages: no tools");
  EXPECT_THAT(error_of("{{ [].append(1) }}"), HasSubstr("list.append() is not allowed"));
  EXPECT_THAT(error_of("{{ 1 + 'a' }}"),
              HasSubstr("unsupported operands for '+': 'int' and 'str'"));
  EXPECT_THAT(error_of("{{ 1 // 0 }}"), HasSubstr("division by zero"));
}

TEST(ChatTemplateTest, RunawayTemplatesAreStopped) {
  const std::string loops =
      "{% for a in range(9999) %}{% for b in range(9999) %}{% endfor %}{% endfor %}";
  EXPECT_THAT(error_of(loops), HasSubstr("steps"));
  EXPECT_THAT(error_of("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}"),
              HasSubstr("nest deeper"));
  EXPECT_THAT(error_of("{{ 'x' * 9999999999 }}"), HasSubstr("longer than"));
  EXPECT_THAT(error_of("{% set ns = namespace(s='x') %}{% for i in range(60) %}{% set ns.s = ns.s "
                       "+ ns.s %}{% endfor %}"),
              HasSubstr("longer than"));
  EXPECT_THAT(error_of("{% set s = 'x' * 1000000 %}{{ s.replace('', s) }}"),
              HasSubstr("longer than"));
  EXPECT_THAT(error_of("{% set s = 'x' * 1000000 %}{{ range(99999) | join(s) }}"),
              HasSubstr("longer than"));
  EXPECT_THAT(error_of("{% set s = 'x' * 1000000 %}{% for i in range(1000) %}{{ s }}{% endfor %}"),
              HasSubstr("longer than"));
  EXPECT_THAT(error_of("{{ range(999999) }}"), HasSubstr("range() is longer"));
  EXPECT_THAT(error_of("{% set ns = namespace(l=[]) %}{% for i in range(9999) %}{% set ns.l = "
                       "[ns.l] %}{% endfor %}"),
              HasSubstr("nested deeper"));
  EXPECT_THAT(error_of("{{ '%9999999d' % 1 }}"), HasSubstr("width"));
  EXPECT_THAT(error_of("{{ 'x'.center(99999999999) }}"), HasSubstr("longer than"));
}

TEST(ChatTemplateTest, DeepSourceIsRefusedNotOverflown) {
  for (const std::string& source :
       {"{{ " + std::string(100000, '(') + "1" + std::string(100000, ')') + " }}",
        "{{ " + std::string(100000, '[') + std::string(100000, ']') + " }}",
        "{{ " + std::string(100000, '-') + "1 }}",
        std::string("{{ 1") +
            [] {
              std::string chain;
              for (int i = 0; i < 100000; ++i) chain += "+1";
              return chain;
            }() +
            " }}",
        [] {
          std::string nested;
          for (int i = 0; i < 50000; ++i) nested += "{% if x %}";
          return nested;
        }()}) {
    const auto compiled = ChatTemplate::compile(source);
    ASSERT_FALSE(compiled.is_ok());
    EXPECT_THAT(compiled.status().message(), HasSubstr("deeper than"));
  }
}

TEST(ChatTemplateTest, DeepMessagesAreRefusedNotOverflown) {
  ordered_json deep = 1;
  for (int i = 0; i < 5000; ++i) deep = ordered_json::array({std::move(deep)});
  EXPECT_THAT(error_of("{{ x|tojson }}", {{"x", std::move(deep)}}), HasSubstr("nested deeper"));
}

TEST(ChatTemplateTest, RenderingIsRepeatable) {
  const auto compiled = ChatTemplate::compile(
      "{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{% endfor %}{{ "
      "ns.n }}");
  const ordered_json variables = {{"messages", {1, 2, 3}}};
  EXPECT_EQ(*(*compiled)->render(variables), "3");
  EXPECT_EQ(*(*compiled)->render(variables), "3");
}

TEST(ChatTemplateTest, KeepsItsSource) {
  EXPECT_EQ((*ChatTemplate::compile("{{ x }}\n"))->source(), "{{ x }}\n");
}

}  // namespace
}  // namespace kvarn
