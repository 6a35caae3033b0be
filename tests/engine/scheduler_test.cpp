#include "engine/scheduler.h"

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

// The example of the design: pages of a prompt of 1000 on its way over two borders.
class ThePromptOf1000Test : public testing::TestWithParam<int> {};

TEST_P(ThePromptOf1000Test, TakesThePagesThatTheDesignNames) {
  CoreDriver driver({}, with_budget(GetParam()));
  const auto handle = driver.add(make_prompt(1000), 40);
  while (driver.sequence(handle.id) == nullptr ||
         driver.sequence(handle.id)->state != SequenceState::kDecoding) {
    ASSERT_TRUE(driver.step());
  }
  EXPECT_EQ(driver.pages().pages_in_use, 15);
  EXPECT_EQ(driver.pages().sink_pages, 5);
  EXPECT_EQ(driver.pages().coded_pages, 6);
  EXPECT_EQ(driver.pages().tail_pages, 4);
  const Sequence& s = *driver.sequence(handle.id);
  for (int position = 1000; position < 1030; ++position) {
    ASSERT_EQ(s.num_computed, position);
    ASSERT_TRUE(driver.step());  // feeds `position`
    const int expected = position < 1004 ? 15 : position < 1024 ? 16 : 13;
    ASSERT_EQ(driver.pages().pages_in_use, expected) << position;
  }
  driver.run_all();
  driver.expect_true_tokens(handle, 40);
}
INSTANTIATE_TEST_SUITE_P(AnyChunk, ThePromptOf1000Test, testing::Values(256, 384, 2048));

TEST(SchedulerTest, ASequencePreemptedAt1010KeepsSevenBlocksAndResumesAt896) {
  CoreDriver driver({}, with_budget(384));
  const auto handle = driver.add(make_prompt(1000), 40);
  while (driver.sequence(handle.id) == nullptr || driver.sequence(handle.id)->num_computed < 1010) {
    ASSERT_TRUE(driver.step());
  }
  ASSERT_TRUE(driver.scheduler().preempt(driver.sequence(handle.id)->id));
  EXPECT_EQ(driver.pages().pages_cached, 5 + 6);
  EXPECT_EQ(driver.pages().pages_in_use, 0);
  const int64_t rows = driver.runner().rows();
  ASSERT_TRUE(driver.step());
  EXPECT_EQ(driver.runner().rows() - rows, 1011 - 896);
  driver.run_all();
  driver.expect_true_tokens(handle, 40);
  EXPECT_EQ(driver.core().stats().preemptions, 1u);
}

TEST(SchedulerTest, ASequencePreemptedOnABorderEncodesItsLastBlockAndHitsIt) {
  CoreDriver driver({}, with_budget(384));
  const auto handle = driver.add(make_prompt(1000), 40);
  while (driver.sequence(handle.id) == nullptr || driver.sequence(handle.id)->num_computed < 1024) {
    ASSERT_TRUE(driver.step());
  }
  ASSERT_TRUE(driver.scheduler().preempt(driver.sequence(handle.id)->id));
  EXPECT_EQ(driver.pages().pages_cached, 5 + 6 + 5) << "block 7 is full but still exact";
  const int64_t rows = driver.runner().rows();
  ASSERT_TRUE(driver.step());
  EXPECT_EQ(driver.runner().rows() - rows, 1) << "only position 1024 is computed";
  EXPECT_EQ(driver.pages().pages_in_use, 13);
  driver.run_all();
  driver.expect_true_tokens(handle, 40);
}

TEST(SchedulerTest, Fp16SharesFullBlocksExact) {
  CoreDriver driver({.format = KvFormat::kFp16}, with_budget(256));
  const auto first = driver.add(make_prompt(400), 4);
  driver.run_all();
  EXPECT_EQ(driver.pages().pages_cached, 12);
  EXPECT_EQ(driver.pages().dense_pages, 12);
  const auto second = driver.add(make_prompt(400), 4);
  driver.run_all();
  EXPECT_EQ(second.sink->prefill()->cached_tokens, 384);
  EXPECT_EQ(driver.core().stats().tiles_encoded, 0u);
  driver.expect_true_tokens(first, 4);
  driver.expect_true_tokens(second, 4);
}

TEST(SchedulerTest, AHitTakesAtMostTheBlocksBeforeTheLastToken) {
  CoreDriver driver({}, with_budget(512));
  for (const int length : {127, 128, 129, 255, 256, 257}) {
    const auto first = driver.add(make_prompt(length, length), 2);
    driver.run_all();
    const auto again = driver.add(make_prompt(length, length), 2);
    driver.run_all();
    EXPECT_EQ(first.sink->prefill()->cached_tokens, 0);
    EXPECT_EQ(again.sink->prefill()->cached_tokens, (length - 1) / 128 * 128) << length;
    driver.expect_true_tokens(again, 2);
  }
}

TEST(SchedulerTest, AnotherSaltSharesNothing) {
  CoreDriver driver({}, with_budget(512));
  auto request = driver.request(make_prompt(300), 2);
  request.cache_salt = "a";
  driver.add(request);
  driver.run_all();
  request = driver.request(make_prompt(300), 2);
  request.cache_salt = "b";
  const auto other = driver.add(request);
  driver.run_all();
  EXPECT_EQ(other.sink->prefill()->cached_tokens, 0);
  request = driver.request(make_prompt(300), 2);
  request.cache_salt = "a";
  const auto same = driver.add(request);
  driver.run_all();
  EXPECT_EQ(same.sink->prefill()->cached_tokens, 256);
}

TEST(SchedulerTest, ABlockThatADecodeFilledIsEncodedAtReleaseInAStepOfItsOwn) {
  CoreDriver driver({}, with_budget(512));
  const auto handle = driver.add(make_prompt(250), 7);  // positions 0..255 are computed, 256 is not
  while (!handle.sink->over()) ASSERT_TRUE(driver.step());
  EXPECT_EQ(driver.pages().pages_cached, 5 + 5);
  ASSERT_TRUE(driver.step());
  EXPECT_EQ(driver.runner().encode_only_steps(), 1);
  EXPECT_EQ(driver.pages().pages_cached, 5 + 1);
  EXPECT_FALSE(driver.step());
  EXPECT_EQ(driver.core().stats().tiles_encoded, 1u);
}

TEST(SchedulerTest, AHitOnABlockThatIsNotCodedYetPlansItsEncodeFirst) {
  CoreDriver driver({}, with_budget(512));
  const auto first = driver.add(make_prompt(250), 7);
  while (!first.sink->over()) ASSERT_TRUE(driver.step());
  std::vector<int32_t> prompt = make_prompt(250);
  for (const int32_t token : first.sink->tokens()) prompt.push_back(token);
  ASSERT_EQ(prompt.size(), 257u);
  const auto second = driver.add(prompt, 3);
  ASSERT_TRUE(driver.step());
  EXPECT_EQ(driver.runner().encode_only_steps(), 0);
  EXPECT_EQ(driver.core().stats().tiles_encoded, 1u);
  EXPECT_EQ(second.sink->prefill()->cached_tokens, 256);
  driver.run_all();
  driver.expect_true_tokens(second, 3);
}

TEST(SchedulerTest, ChoicesWaitForTheFirstsPrefillAndRecomputeOnlyWhatFollowsItsLastHit) {
  CoreDriver driver({}, with_budget(512));
  const auto handle = driver.add(make_prompt(300), 5, /*n=*/4);
  EXPECT_EQ(driver.core().stats().waiting_deferred, 3);
  ASSERT_TRUE(driver.step());
  EXPECT_EQ(driver.runner().rows(), 300);
  EXPECT_EQ(driver.core().stats().waiting_deferred, 0);
  ASSERT_TRUE(driver.step());
  EXPECT_EQ(driver.runner().rows(), 300 + 1 + 3 * (300 - 256));
  driver.run_all();
  for (uint32_t choice = 0; choice < 4; ++choice) driver.expect_true_tokens(handle, 5, choice);
  EXPECT_EQ(handle.sink->prefill()->cached_tokens, 0);
  EXPECT_EQ(driver.core().stats().prompt_tokens, 300u) << "the prompt counts once";
}

TEST(SchedulerTest, WithTheCacheOffEachChoicePrefillsWhole) {
  EngineConfig config = with_budget(2048);
  config.enable_prefix_caching = false;
  CoreDriver driver({}, config);
  const auto handle = driver.add(make_prompt(300), 5, /*n=*/3);
  ASSERT_TRUE(driver.step());
  EXPECT_EQ(driver.runner().rows(), 900);
  driver.run_all();
  EXPECT_EQ(driver.pages().pages_free, driver.pages().pages_total);
  for (uint32_t choice = 0; choice < 3; ++choice) driver.expect_true_tokens(handle, 5, choice);
}

TEST(SchedulerTest, TheNextChoicePrefillsWhenTheFirstIsEndedBeforeItsOwn) {
  CoreDriver driver({}, with_budget(256));
  const auto handle = driver.add(make_prompt(600), 5, /*n=*/3);
  ASSERT_TRUE(driver.step());
  driver.core().finish_choice(handle.id, 0);
  while (driver.step()) {
  }
  driver.expect_true_tokens(handle, 5, 1);
  driver.expect_true_tokens(handle, 5, 2);
  EXPECT_TRUE(handle.sink->tokens(0).empty());
  EXPECT_TRUE(driver.scheduler().idle());
}

TEST(SchedulerTest, DecodesComeFirstAndPrefillsFillTheBudgetInChunksToABorder) {
  CoreDriver driver({}, with_budget(300, 8));
  const auto first = driver.add(make_prompt(100, 1), 50);
  ASSERT_TRUE(driver.step());
  driver.add(make_prompt(1000, 2), 5);
  const int64_t rows = driver.runner().rows();
  ASSERT_TRUE(driver.step());
  EXPECT_EQ(driver.runner().rows() - rows, 1 + 256) << "299 left: two whole blocks";
  EXPECT_EQ(first.sink->tokens().size(), 2u);
  EXPECT_EQ(driver.core().stats().steps_mixed, 1u);
  driver.run_all();
}

TEST(SchedulerTest, PrioritiesGoBeforeArrivalWhereThePolicySaysSo) {
  for (const char* policy : {"fcfs", "priority"}) {
    EngineConfig config = with_budget(136, 8);
    config.scheduling_policy = policy;
    CoreDriver driver({}, config);
    auto late = driver.request(make_prompt(128, 1), 1);
    late.priority = 5;
    auto early = driver.request(make_prompt(128, 2), 1);
    early.priority = -5;
    const auto a = driver.add(late);
    const auto b = driver.add(early);
    ASSERT_TRUE(driver.step());
    EXPECT_EQ(b.sink->over(), policy == std::string("priority"));
    EXPECT_EQ(a.sink->over(), policy == std::string("fcfs"));
    driver.run_all();
  }
}

TEST(SchedulerTest, TenantsTakeTurns) {
  CoreDriver driver({}, with_budget(136, 8));
  std::vector<CoreDriver::Handle> busy;
  for (int i = 0; i < 4; ++i) {
    auto request = driver.request(make_prompt(128, i), 1);
    request.tenant = "busy";
    busy.push_back(driver.add(request));
  }
  auto request = driver.request(make_prompt(128, 9), 1);
  request.tenant = "quiet";
  const auto quiet = driver.add(request);
  ASSERT_TRUE(driver.step());
  ASSERT_TRUE(driver.step());
  EXPECT_TRUE(busy[0].sink->over());
  EXPECT_TRUE(quiet.sink->over()) << "its turn comes before the busy tenant's second request";
  EXPECT_FALSE(busy[1].sink->over());
  driver.run_all();
}

TEST(SchedulerTest, NoMoreThanMaxNumSeqsRunAtOnce) {
  CoreDriver driver({}, with_budget(512, 3));
  for (int i = 0; i < 10; ++i) driver.add(make_prompt(20, i), 10);
  while (driver.step()) EXPECT_LE(driver.scheduler().num_running(), 3);
}

TEST(SchedulerTest, PreemptsTheNewestWhenPagesRunOut) {
  CoreDriver driver({.num_pages = 19}, with_budget(512, 4));
  const auto old = driver.add(make_prompt(300, 1), 200);
  const auto young = driver.add(make_prompt(200, 2), 200);
  bool seen = false;
  while (driver.step()) {
    if (driver.core().stats().preemptions == 0 || seen) continue;
    seen = true;
    EXPECT_NE(driver.sequence(old.id), nullptr);
    EXPECT_EQ(driver.sequence(young.id), nullptr);
  }
  EXPECT_TRUE(seen);
  driver.expect_true_tokens(old, 200);
  driver.expect_true_tokens(young, 200);
}

TEST(SchedulerTest, ALongPromptThatMustWaitIsNotOvertaken) {
  CoreDriver driver({.num_pages = 26}, with_budget(512, 8));
  const auto running = driver.add(make_prompt(500, 1), 30);
  ASSERT_TRUE(driver.step());
  const auto big = driver.add(make_prompt(1500, 2), 1);
  const auto small = driver.add(make_prompt(10, 3), 1);
  while (!small.sink->over()) ASSERT_TRUE(driver.step());
  EXPECT_TRUE(running.sink->over());
  EXPECT_TRUE(big.sink->prefill().has_value());
  driver.run_all();
}

TEST(SchedulerTest, AnUrgentRequestThatDoesNotFitDoesNotStopAPrefillThatHasBegun) {
  EngineConfig config = with_budget(136, 8);
  config.scheduling_policy = "priority";
  CoreDriver driver({.num_pages = 20}, config);
  const auto begun = driver.add(make_prompt(1200, 1), 3);
  ASSERT_TRUE(driver.step());
  auto request = driver.request(make_prompt(1200, 2), 3);
  request.priority = -1;
  const auto urgent = driver.add(request);
  ASSERT_TRUE(driver.step());
  EXPECT_EQ(driver.sequence(begun.id)->num_computed, 256);
  driver.run_all();
  driver.expect_true_tokens(begun, 3);
  driver.expect_true_tokens(urgent, 3);
}

TEST(SchedulerTest, TheLongestSequenceThatThePoolHoldsRunsAloneToItsEnd) {
  for (const KvFormat format : {KvFormat::kFp16, KvFormat::kKvarnK4V2, KvFormat::kKvarnK4V4}) {
    for (const int64_t pages : {2, 7, 11, 12, 15, 16, 17}) {
      CoreDriver driver({.format = format, .num_pages = pages}, with_budget(256, 4));
      const int length = driver.core().max_model_len();
      // Others fill the cache and the queue first.
      driver.add(make_prompt(std::min(length - 1, 300), 5), 1, 2);
      const auto handle = driver.add(make_prompt(1), length - 1);
      const auto last = driver.add(make_prompt(length - 1), 1);
      driver.run_all();
      driver.expect_true_tokens(handle, static_cast<size_t>(length - 1));
      driver.expect_true_tokens(last, 1);
    }
  }
}

TEST(SchedulerTest, StopsAtEosAtStopIdsAndAtTheLimit) {
  FakeRunnerOptions options;
  options.next_token = [](uint64_t, const SamplingRow& row) {
    return static_cast<int32_t>(100 + row.output_position);
  };
  CoreDriver driver(options);
  auto eos = driver.request(make_prompt(10), 50);
  eos.stop.eos_token_ids = {105};
  eos.stop.stop_token_ids = {107};
  const auto a = driver.add(eos);
  auto stop = driver.request(make_prompt(10), 50);
  stop.stop = eos.stop;
  stop.stop.ignore_eos = true;
  const auto b = driver.add(stop);
  auto late = driver.request(make_prompt(10), 50);
  late.stop = eos.stop;
  late.stop.min_tokens = 7;  // the runner answers the next id for a banned one: 106, 106, 108
  const auto c = driver.add(late);
  const auto d = driver.add(make_prompt(10), 3);
  driver.run_all();
  EXPECT_EQ(a.sink->tokens().size(), 6u);
  EXPECT_EQ(a.sink->finish(), FinishReason::kStop);
  EXPECT_FALSE(a.sink->finished_by_stop_id());
  EXPECT_EQ(b.sink->tokens().size(), 8u);
  EXPECT_TRUE(b.sink->finished_by_stop_id());
  EXPECT_EQ(c.sink->tokens(), (std::vector<int32_t>{100, 101, 102, 103, 104, 106, 106, 107}));
  EXPECT_EQ(d.sink->tokens().size(), 3u);
  EXPECT_EQ(d.sink->finish(), FinishReason::kLength);
}

TEST(SchedulerTest, MaxTokensZeroRunsThePrefillOnly) {
  CoreDriver driver;
  const auto handle = driver.add(make_prompt(300), 0, 2);
  driver.run_all();
  EXPECT_TRUE(handle.sink->over());
  EXPECT_TRUE(handle.sink->tokens().empty());
  EXPECT_EQ(handle.sink->finish(), FinishReason::kLength);
  EXPECT_EQ(handle.sink->finish(1), FinishReason::kLength);
  EXPECT_EQ(driver.core().stats().generation_tokens, 0u);
}

TEST(SchedulerTest, CancelFreesTheBlocksWhereverTheRequestIs) {
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

TEST(SchedulerTest, QueueTimeAndDeadlinesEndARequest) {
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

TEST(SchedulerTest, AFailedStepFailsItsRequestsAndTheRestGoesOn) {
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

TEST(SchedulerTest, BlocksOfAFailedStepAreNotCached) {
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

TEST(SchedulerTest, ABlockWhoseEncodeFailedIsForgotten) {
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

TEST(SchedulerTest, WhoSharesABlockWhoseEncodeFailedComputesItAgain) {
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

TEST(SchedulerTest, NonFiniteLogitsFailTheStep) {
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

TEST(SchedulerTest, WhatCanNeverFitIsRefusedWithTheNumbers) {
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

TEST(SchedulerTest, TheContextIsLoweredToThePoolOrRefusedWithTheNumberThatFits) {
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
