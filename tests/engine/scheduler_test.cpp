#include "engine/scheduler.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

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

TEST(SchedulerTest, APromptInsideTheSinkEncodesNoTile) {
  CoreDriver driver({}, with_budget(256));
  const auto handle = driver.add(make_prompt(20), 4);
  driver.run_all();
  EXPECT_EQ(driver.core().stats().tiles_encoded, 0u);
  driver.expect_true_tokens(handle, 4);
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

}  // namespace
}  // namespace kvarn
