#include "engine/engine_core.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <thread>

#include "engine/kv_capacity.h"
#include "tests/support/core_driver.h"

namespace kvarn {
namespace {

using test::CoreDriver;
using test::FakeRunnerOptions;
using test::make_prompt;

EngineConfig with_budget(int tokens, int max_num_seqs = 8) {
  EngineConfig config;
  config.max_num_seqs = max_num_seqs;
  config.max_num_batched_tokens = tokens;
  return config;
}

TEST(EngineCoreTest, CancelFreesTheBlocksWhereverTheRequestIs) {
  CoreDriver driver({}, with_budget(256));
  const Status why(StatusCode::kCancelled, "client_gone", "gone");
  const auto queued = driver.add(make_prompt(600, 1), 5, 2);
  driver.core().cancel(queued.id, why);
  EXPECT_EQ(queued.sink->error()->reason(), "client_gone");
  const auto prefilling = driver.add(make_prompt(600, 2), 5, 2);
  ASSERT_TRUE(driver.step());
  driver.core().cancel(prefilling.id, why);
  const auto decoding = driver.add(make_prompt(200, 3), 50, 2);
  for (int i = 0; i < 5; ++i) ASSERT_TRUE(driver.step());
  EXPECT_FALSE(decoding.sink->tokens().empty());
  driver.core().cancel(decoding.id, why);
  driver.core().cancel(decoding.id, why);
  driver.core().cancel(12345, why);
  EXPECT_TRUE(driver.scheduler().idle());
  EXPECT_EQ(driver.pages().pages_in_use, 0);
  driver.core().check_integrity();
  EXPECT_EQ(driver.core().stats().leaked_pages, 0);
}

TEST(EngineCoreTest, QueueTimeAndDeadlinesEndARequest) {
  EngineConfig config = with_budget(256, 1);
  config.max_queue_seconds = 0.02;
  CoreDriver driver({}, config);
  const auto running = driver.add(make_prompt(10, 1), 100);
  ASSERT_TRUE(driver.step());
  const auto queued = driver.add(make_prompt(10, 2), 5);
  auto request = driver.request(make_prompt(10, 3), 5);
  request.deadline = std::chrono::steady_clock::now();
  const auto dead = driver.add(request);
  driver.core().end_expired();
  EXPECT_EQ(dead.sink->error()->reason(), "deadline_exceeded");
  EXPECT_EQ(dead.sink->error()->code(), StatusCode::kDeadlineExceeded);
  std::this_thread::sleep_for(std::chrono::milliseconds(30));
  driver.core().end_expired();
  EXPECT_EQ(queued.sink->error()->reason(), "queue_timeout");
  EXPECT_EQ(queued.sink->error()->code(), StatusCode::kResourceExhausted);
  EXPECT_FALSE(running.sink->over()) << "it left the queue in time";
}

TEST(EngineCoreTest, AFailedStepFailsItsRequestsAndTheRestGoesOn) {
  FakeRunnerOptions options;
  bool fail = false;
  options.before_step = [&](int64_t, const StepBatch&) {
    if (fail) throw std::runtime_error("a kernel failed");
  };
  CoreDriver driver(options, with_budget(256, 2));
  const auto a = driver.add(make_prompt(300, 1), 50);
  const auto b = driver.add(make_prompt(300, 2), 50);
  const auto waiting = driver.add(make_prompt(300, 3), 5);
  for (int i = 0; i < 8; ++i) ASSERT_TRUE(driver.step());
  fail = true;
  ASSERT_TRUE(driver.step());
  fail = false;
  EXPECT_EQ(a.sink->error()->reason(), "engine_error");
  EXPECT_EQ(a.sink->error()->code(), StatusCode::kInternal);
  EXPECT_TRUE(b.sink->error().has_value());
  driver.run_all();
  driver.expect_true_tokens(waiting, 5);
}

TEST(EngineCoreTest, BlocksOfAFailedStepAreNotCached) {
  FakeRunnerOptions options;
  options.before_step = [](int64_t step, const StepBatch&) {
    if (step == 0) throw std::runtime_error("a kernel failed");
  };
  CoreDriver driver(options, with_budget(512));
  driver.add(make_prompt(300), 5);
  ASSERT_TRUE(driver.step());
  EXPECT_EQ(driver.pages().pages_free, driver.pages().pages_total);
  const auto again = driver.add(make_prompt(300), 5);
  driver.run_all();
  EXPECT_EQ(again.sink->prefill()->cached_tokens, 0);
  driver.expect_true_tokens(again, 5);
}

TEST(EngineCoreTest, ABlockWhoseEncodeFailedIsForgotten) {
  FakeRunnerOptions options;
  bool fail = false;
  options.before_step = [&](int64_t, const StepBatch& batch) {
    if (fail && !batch.encode_before.empty()) throw std::runtime_error("a kernel failed");
  };
  CoreDriver driver(options, with_budget(512));
  fail = true;
  const auto first = driver.add(make_prompt(250), 20);
  while (!first.sink->over()) ASSERT_TRUE(driver.step());
  EXPECT_EQ(first.sink->error()->reason(), "engine_error");
  EXPECT_EQ(first.sink->tokens().size(), 7u);
  EXPECT_EQ(driver.pages().pages_cached, 5) << "the sink is as good as before";
  fail = false;
  std::vector<int32_t> prompt = make_prompt(250);
  for (const int32_t token : first.sink->tokens()) prompt.push_back(token);
  const auto second = driver.add(prompt, 20);
  driver.run_all();
  EXPECT_EQ(second.sink->prefill()->cached_tokens, 128);
  driver.expect_true_tokens(second, 20);
}

TEST(EngineCoreTest, WhoSharesABlockWhoseEncodeFailedComputesItAgain) {
  FakeRunnerOptions options;
  bool fail = false;
  options.before_step = [&](int64_t, const StepBatch&) {
    if (fail) throw std::runtime_error("a kernel failed");
  };
  CoreDriver driver(options, with_budget(512));
  auto request = driver.request(make_prompt(250), 20);
  request.sampling.seed = 1;
  const auto first = driver.add(request);
  request.id = driver.request({}, 0).id;
  const auto second = driver.add(request);
  while (first.sink->tokens().size() < 7) ASSERT_TRUE(driver.step());
  ASSERT_EQ(driver.sequence(first.id)->blocks[1], driver.sequence(second.id)->blocks[1]);
  driver.scheduler().set_token_budget(1);  // only the first decodes, and encodes the shared block
  fail = true;
  ASSERT_TRUE(driver.step());
  fail = false;
  EXPECT_TRUE(first.sink->error().has_value());
  EXPECT_FALSE(second.sink->over());
  EXPECT_EQ(driver.sequence(second.id), nullptr) << "preempted";
  driver.scheduler().set_token_budget(512);
  driver.run_all();
  driver.expect_true_tokens(second, 20);
}

TEST(EngineCoreTest, NonFiniteLogitsFailTheStep) {
  struct NanRunner : test::FakeModelRunner {
    std::future<StepResult> run(const StepBatch& batch) override {
      StepResult result = FakeModelRunner::run(batch).get();
      for (SampledToken& token : result.tokens) token.non_finite = true;
      std::promise<StepResult> promise;
      promise.set_value(std::move(result));
      return promise.get_future();
    }
  };
  auto core = EngineCore::create({}, std::make_unique<NanRunner>(), nullptr);
  ASSERT_TRUE(core.is_ok());
  EngineRequest request;
  request.id = 1;
  request.prompt = make_prompt(10);
  request.stop.max_tokens = 5;
  const auto sink = std::make_shared<test::RecordingSink>();
  request.sink = sink;
  (*core)->add(request);
  EXPECT_TRUE((*core)->run_step());
  EXPECT_EQ(sink->error()->reason(), "engine_error");
}

TEST(EngineCoreTest, WhatCanNeverFitIsRefusedWithTheNumbers) {
  EngineConfig config;
  config.max_model_len = 1000;
  CoreDriver driver({}, config);
  auto request = driver.request(make_prompt(990), 11);
  request.sink = std::make_shared<test::RecordingSink>();
  const Status status = driver.core().check(request);
  EXPECT_EQ(status.reason(), "context_length_exceeded");
  EXPECT_EQ(status.code(), StatusCode::kInvalidArgument);
  EXPECT_EQ(status.message(),
            "this model's context is 1000 tokens; the prompt has 990 and 11 were requested: 1001 > "
            "1000");
  request.stop.max_tokens = 10;
  EXPECT_TRUE(driver.core().check(request).is_ok());
  request.prompt[5] = 1000;
  EXPECT_THAT(driver.core().check(request).message(), testing::HasSubstr("0..999, got 1000"));
  request.prompt.clear();
  EXPECT_EQ(driver.core().check(request).reason(), "invalid_value");
}

TEST(EngineCoreTest, TheContextIsLoweredToThePoolOrRefusedWithTheNumberThatFits) {
  const auto create = [](int max_model_len, int64_t pages) {
    EngineConfig config;
    config.max_model_len = max_model_len;
    return EngineCore::create(config,
                              std::make_unique<test::FakeModelRunner>(
                                  FakeRunnerOptions{.num_pages = pages, .model_max_len = 4096}),
                              nullptr);
  };
  EXPECT_EQ((*create(0, 1000))->max_model_len(), 4096);
  const KvLayout layout = make_kv_layout(KvFormat::kKvarnK4V2, 128);
  const auto fits = static_cast<int>(longest_sequence(layout, 20));
  EXPECT_EQ((*create(0, 20))->max_model_len(), fits);
  EXPECT_EQ((*create(fits, 20))->max_model_len(), fits);
  const auto refused = create(fits + 1, 20);
  ASSERT_FALSE(refused.is_ok());
  EXPECT_THAT(refused.status().message(),
              testing::HasSubstr("set --max-model-len " + std::to_string(fits)));
  EXPECT_THAT(create(5000, 1000).status().message(), testing::HasSubstr("4096 positions"));
  EXPECT_THAT(create(0, 1).status().message(), testing::HasSubstr("--kv-memory"));
}

}  // namespace
}  // namespace kvarn
