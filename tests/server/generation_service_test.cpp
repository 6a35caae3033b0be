// The service below both doors: rendering, usage, shared prefixes, metrics, cancellation.
#include "server/generation_service.h"

#include <gtest/gtest.h>

#include <atomic>
#include <set>
#include <thread>

#include "server/fold.h"
#include "server/model_info.h"
#include "tests/server/serving_fixture.h"

namespace kvarn::test {
namespace {

GenerateRequest chat_request(int seed) {
  GenerateRequest request;
  ChatPrompt chat;
  ChatMessage message;
  message.role = "user";
  message.content = "Hi";
  chat.messages.push_back(message);
  request.prompts.emplace_back(chat);
  request.sampling.seed = seed;
  return request;
}

struct Ended {
  Fold fold;
  StreamEnd end;
};

Ended wait_for_end(const Generation& generation) {
  Ended out{Fold(generation.num_prompts * generation.n), {}};
  for (;;) {
    std::optional<StreamItem> item = generation.stream->try_take();
    if (!item.has_value()) {
      std::this_thread::sleep_for(std::chrono::milliseconds(1));
    } else if (auto* info = std::get_if<PromptInfo>(&*item)) {
      out.fold.add(std::move(*info));
    } else if (auto* delta = std::get_if<Delta>(&*item)) {
      out.fold.add(std::move(*delta));
    } else {
      out.end = std::get<StreamEnd>(*item);
      return out;
    }
  }
}

class GenerationServiceTest : public ::testing::Test {
 protected:
  Serving serving;
  GenerationService& service = *serving.state.service();
};

TEST_F(GenerationServiceTest, UsageOfTheEndEqualsTheFoldOfTheDeltas) {
  serving.script(1, "<think>\na b c\n</think>\n\nd e f");
  GenerateRequest request = chat_request(1);
  request.sampling.n = 3;
  const Ended ended = wait_for_end(service.generate(request).value());
  ASSERT_TRUE(ended.end.status.is_ok());
  const Usage &end = ended.end.usage, &fold = ended.fold.usage();
  EXPECT_EQ(end.prompt_tokens, fold.prompt_tokens);
  EXPECT_EQ(end.completion_tokens, fold.completion_tokens);
  EXPECT_EQ(end.reasoning_tokens, fold.reasoning_tokens);
  EXPECT_EQ(end.completion_tokens, 3 * ended.fold.choices()[0].num_tokens);
  for (const FoldedChoice& choice : ended.fold.choices()) EXPECT_EQ(choice.content, "d e f");
}

TEST_F(GenerationServiceTest, CountsTokensServedFromThePrefixCache) {
  GenerateRequest request;
  request.prompts.emplace_back(TokenPrompt(400, 7));
  request.stopping.max_tokens = 2;
  EXPECT_EQ(wait_for_end(service.generate(request).value()).end.usage.cached_tokens, 0);
  ASSERT_TRUE(serving.wait_idle());
  EXPECT_EQ(wait_for_end(service.generate(request).value()).end.usage.cached_tokens, 384);
  request.cache.salt = "mine";
  EXPECT_EQ(wait_for_end(service.generate(request).value()).end.usage.cached_tokens, 0);
}

TEST_F(GenerationServiceTest, GivesEveryGenerationAnIdOfItsOwn) {
  std::set<std::string> ids;
  for (int i = 0; i < 50; ++i) {
    GenerateRequest request = chat_request(1);
    request.stopping.max_tokens = 1;
    request.id_prefix = "chatcmpl-";
    const Generation generation = service.generate(request).value();
    EXPECT_EQ(generation.id.size(), 9u + 16u);
    EXPECT_TRUE(ids.insert(generation.id).second);
    wait_for_end(generation);
  }
}

TEST_F(GenerationServiceTest, CancelEndsTheStreamAtOnceAndFreesTheBlocks) {
  GenerateRequest request = chat_request(5);
  const Generation generation = service.generate(request).value();
  service.cancel(generation, {StatusCode::kCancelled, "client_gone", "gone"});
  EXPECT_EQ(wait_for_end(generation).end.status.reason(), "client_gone");
  EXPECT_TRUE(serving.wait_idle());
}

TEST_F(GenerationServiceTest, NamesTheParametersOfTheDoorThatAsked) {
  GenerateRequest request = chat_request(1);
  request.names = &kGrpcParams;
  request.sampling.top_p = 2;
  EXPECT_EQ(service.generate(request).status().param(), "sampling.top_p");
  request.sampling.top_p.reset();
  request.stopping.max_tokens = 4090;
  const Status status = service.generate(request).status();
  EXPECT_EQ(status.reason(), "context_length_exceeded");
  EXPECT_EQ(status.param(), "chat.messages");
}

TEST_F(GenerationServiceTest, RendersThinkingAsAsked) {
  ChatPrompt chat = std::get<ChatPrompt>(chat_request(1).prompts.front());
  const auto text = [&] { return service.render_chat(chat, kHttpParams).value().text; };
  const std::string open = "<|im_start|>assistant\n";
  EXPECT_TRUE(text().ends_with(open)) << text();
  chat.enable_thinking = false;
  EXPECT_TRUE(text().ends_with(open + "<think>\n\n</think>\n\n")) << text();
  chat.enable_thinking.reset();
  chat.reasoning_effort = "none";
  EXPECT_TRUE(text().ends_with("<think>\n\n</think>\n\n")) << text();
  chat.add_generation_prompt = false;
  EXPECT_TRUE(text().ends_with("<|im_end|>\n")) << text();
}

TEST_F(GenerationServiceTest, CountsExactlyInTheMetrics) {
  serving.script(1, "one two");
  const size_t tokens = demo_tokenizer().encode("one two").size() + 1;
  wait_for_end(service.generate(chat_request(1)).value());
  ASSERT_TRUE(serving.wait_idle());
  const std::string page = serving.state.metrics.render(serving.stats());
  const auto has = [&](const std::string& line) { return page.find(line) != std::string::npos; };
  const std::string labels = "{model_name=\"demo\",engine=\"0\"} ";
  EXPECT_TRUE(has("vllm:generation_tokens_total" + labels + std::to_string(tokens) + "\n"));
  EXPECT_TRUE(has("vllm:time_to_first_token_seconds_count" + labels + "1\n"));
  EXPECT_TRUE(
      has("vllm:inter_token_latency_seconds_count" + labels + std::to_string(tokens - 1) + "\n"));
  EXPECT_TRUE(has("vllm:e2e_request_latency_seconds_count" + labels + "1\n"));
  EXPECT_TRUE(has("finished_reason=\"stop\"} 1\n"));
  EXPECT_TRUE(has("vllm:num_requests_running" + labels + "0\n"));
}

TEST(GenerationConfigFile, GivesDefaultsAndEos) {
  const GenerationConfig config =
      parse_generation_config(
          R"({"temperature":0.6,"top_k":20,"top_p":0.95,"eos_token_id":[5,6],"max_new_tokens":9})",
          "generation_config.json")
          .value();
  EXPECT_EQ(config.sampling.temperature, 0.6);
  EXPECT_EQ(config.sampling.top_k, 20);
  EXPECT_EQ(config.sampling.max_new_tokens, 9);
  EXPECT_EQ(config.eos_token_ids, (std::vector<int32_t>{5, 6}));
}

// Destroyed by its last holder, the service would be joined by one of its own workers.
TEST(ServerStateTest, ClosingWaitsForTheLastHolderWhoeverItIs) {
  Serving serving;
  serving.http->stop(std::chrono::milliseconds(0));
  std::shared_ptr<GenerationService> held = serving.state.service();
  std::atomic<bool> released{false};
  std::thread holder([&] {
    std::this_thread::sleep_for(std::chrono::milliseconds(50));
    released = true;
    held.reset();
  });
  serving.state.close_service();
  EXPECT_TRUE(released);
  EXPECT_EQ(serving.state.service(), nullptr);
  holder.join();
}

TEST(GenerationConfigFile, NamesFileKeyAndRangeOfABadValue) {
  for (const auto& [json, culprit] : std::vector<std::pair<const char*, const char*>>{
           {"[]", "not a JSON object"},
           {"{", "not a JSON object"},
           {R"({"temperature":-1})", "'temperature' must be 0..2"},
           {R"({"top_p":"x"})", "'top_p' must be a number"},
           {R"({"eos_token_id":"x"})", "'eos_token_id'"},
           {R"({"repetition_penalty":0})", "'repetition_penalty'"}}) {
    const Status status = parse_generation_config(json, "dir/generation_config.json").status();
    EXPECT_NE(status.message().find("dir/generation_config.json"), std::string::npos);
    EXPECT_NE(status.message().find(culprit), std::string::npos) << status.message();
  }
}

}  // namespace
}  // namespace kvarn::test
