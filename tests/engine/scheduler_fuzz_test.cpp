// Thousands of random requests, cancels, preemptions and failures against a runner that checks
// every page it is told to read. What must hold: no violation, every request ends once with the
// tokens of its true prefix, every page is accounted for after each step, and none is held at the
// end.
#include <gtest/gtest.h>

#include <algorithm>
#include <iostream>
#include <random>

#include "kernels/core/log.h"
#include "tests/support/core_driver.h"

namespace kvarn {
namespace {

using test::CoreDriver;
using test::FakeRunnerOptions;

struct Totals {
  int64_t requests = 0, steps = 0, encode_only_steps = 0, failed_steps = 0;
  uint64_t hits = 0, preemptions = 0, mixed = 0, coded_reads = 0, tiles = 0;
};

class FuzzRun {
 public:
  FuzzRun(uint64_t seed, Totals& totals) : random_(seed), totals_(totals) {}

  void run(int num_requests) {
    FakeRunnerOptions options;
    options.format = std::array{KvFormat::kFp16, KvFormat::kKvarnK4V2,
                                KvFormat::kKvarnK4V4}[static_cast<size_t>(below(3))];
    options.num_pages = 12 + below(120);
    options.vocab_size = 50;
    const bool may_fail = below(3) == 0;
    options.before_step = [this, may_fail](int64_t, const StepBatch&) {
      if (!may_fail || below(150) != 0) return;
      ++totals_.failed_steps;
      throw std::runtime_error("scripted");
    };
    EngineConfig config;
    config.max_num_seqs = 1 + below(12);
    config.max_num_batched_tokens = config.max_num_seqs + 128 + below(600);
    config.enable_prefix_caching = below(5) != 0;
    config.scheduling_policy = below(2) == 0 ? "fcfs" : "priority";
    CoreDriver driver(options, config);
    max_len_ = std::min(driver.core().max_model_len(), 1400);
    if (max_len_ < 2) return;

    int submitted = 0;
    const bool slow = below(3) == 0;  // the engine runs empty now and then
    for (int step = 0; submitted < num_requests || !driver.scheduler().idle(); ++step) {
      ASSERT_LT(step, 200000) << "the schedule does not end";
      while (submitted < num_requests && (slow ? below(300) == 0 : below(4) != 0)) {
        submit(driver);
        ++submitted;
      }
      if (below(20) == 0) cancel_one(driver);
      if (below(12) == 0) preempt_one(driver);
      driver.scheduler().set_token_budget(config.max_num_seqs + 128 + below(600));
      driver.step();
      if (testing::Test::HasFailure()) return;
    }
    while (driver.step()) {
    }
    driver.core().check_integrity();
    EXPECT_EQ(driver.core().stats().leaked_pages, 0);
    EXPECT_EQ(driver.pages().pages_in_use, 0);
    EXPECT_EQ(driver.scheduler().num_unstarted(), 0);
    EXPECT_EQ(driver.scheduler().num_deferred(), 0);
    for (const auto& entry : live_) check_end(driver, entry);
    count(driver);
  }

 private:
  struct Entry {
    CoreDriver::Handle handle;
    int max_tokens;
    int n;
    std::vector<int> ended_choices;
  };

  int below(int bound) { return static_cast<int>(random_() % static_cast<uint64_t>(bound)); }

  int length(int most) {
    static constexpr int kBorders[] = {1,   26,  27,  28,  127, 128, 129,
                                       255, 256, 257, 383, 384, 385, 640};
    const int value = below(2) == 0 ? kBorders[below(std::size(kBorders))] : 1 + below(700);
    return std::min(value, most);
  }

  // Prompts share prefixes: a few base texts, some continued by another's output.
  std::vector<int32_t> prompt() {
    const int tokens = length(max_len_ - 1);
    std::vector<int32_t> prompt = test::make_prompt(tokens, below(4), 50);
    if (!live_.empty() && below(3) == 0) {
      const Entry& other = live_[static_cast<size_t>(below(static_cast<int>(live_.size())))];
      prompt = other.handle.prompt;
      const std::vector<int32_t> more = other.handle.sink->tokens();
      prompt.insert(prompt.end(), more.begin(), more.end());
      prompt.resize(static_cast<size_t>(
          std::min<int>(max_len_ - 1, 1 + below(static_cast<int>(prompt.size()) + 3))));
    }
    for (int32_t& id : prompt) id = std::clamp(id, 0, 49);
    return prompt;
  }

  void submit(CoreDriver& driver) {
    Entry entry;
    std::vector<int32_t> tokens = prompt();
    const int room = max_len_ - static_cast<int>(tokens.size());
    entry.max_tokens = below(30) == 0 ? 0 : std::min(room, length(400));
    if (below(3) == 0) {  // the last computed position fills a block
      const int to_border = kBlockTokens - (static_cast<int>(tokens.size()) - 1) % kBlockTokens;
      entry.max_tokens = std::min(room, to_border);
    }
    entry.n = below(4) == 0 ? 2 + below(3) : 1;
    EngineRequest request = driver.request(std::move(tokens), entry.max_tokens, entry.n);
    request.sampling.seed = static_cast<uint64_t>(below(3));  // equal ones decode the same blocks
    request.priority = below(3);
    request.tenant = below(3) == 0 ? "t" + std::to_string(below(3)) : "";
    request.cache_salt = below(6) == 0 ? "salt" : "";
    entry.handle = driver.add(std::move(request));
    live_.push_back(std::move(entry));
    ++totals_.requests;
  }

  void cancel_one(CoreDriver& driver) {
    if (live_.empty()) return;
    Entry& entry = live_[static_cast<size_t>(below(static_cast<int>(live_.size())))];
    if (entry.handle.sink->over()) return;
    if (below(2) == 0) {
      driver.core().cancel(entry.handle.id, Status(StatusCode::kCancelled, "client_gone", "gone"));
    } else {
      const int choice = below(entry.n);
      driver.core().finish_choice(entry.handle.id, choice);
      entry.ended_choices.push_back(choice);
    }
  }

  void preempt_one(CoreDriver& driver) {
    const auto& running = driver.scheduler().running();
    if (running.empty()) return;
    driver.scheduler().preempt(
        running[static_cast<size_t>(below(static_cast<int>(running.size())))]->id);
  }

  void check_end(const CoreDriver& driver, const Entry& entry) {
    const auto& sink = *entry.handle.sink;
    for (int choice = 0; choice < entry.n; ++choice) {
      const size_t tokens = sink.tokens(choice).size();
      driver.expect_true_tokens(entry.handle, tokens, static_cast<uint32_t>(choice));
      const bool whole =
          !sink.error() && std::find(entry.ended_choices.begin(), entry.ended_choices.end(),
                                     choice) == entry.ended_choices.end();
      if (whole) {
        EXPECT_EQ(tokens, static_cast<size_t>(entry.max_tokens));
      }
    }
    if (!sink.error() && entry.ended_choices.empty()) {
      EXPECT_TRUE(sink.over());
    }
  }

  void count(CoreDriver& driver) {
    const EngineStats stats = driver.core().stats();
    totals_.steps += driver.runner().steps();
    totals_.encode_only_steps += driver.runner().encode_only_steps();
    totals_.hits += stats.prefix_hits;
    totals_.preemptions += stats.preemptions;
    totals_.mixed += stats.steps_mixed;
    totals_.tiles += stats.tiles_encoded;
    totals_.coded_reads += stats.coded_block_reads;
    if (totals_.failed_steps == 0) {
      EXPECT_EQ(static_cast<int64_t>(stats.coded_block_reads), driver.runner().coded_reads());
    }
  }

  std::mt19937_64 random_;
  Totals& totals_;
  int max_len_ = 0;
  std::vector<Entry> live_;
};

TEST(SchedulerFuzzTest, RandomWorkloadsReadTheRightPagesAndLeaveNoneBehind) {
  set_log_level(LogLevel::kOff);  // scripted failures would fill the log
  Totals totals;
  for (uint64_t seed = 1; seed <= 120; ++seed) {
    SCOPED_TRACE(testing::Message() << "seed " << seed);
    FuzzRun(seed, totals).run(40);
    if (HasFailure()) break;
  }
  std::cout << "requests=" << totals.requests << " steps=" << totals.steps
            << " mixed=" << totals.mixed << " preemptions=" << totals.preemptions
            << " hit_tokens=" << totals.hits << " tiles=" << totals.tiles
            << " coded_reads=" << totals.coded_reads
            << " encode_only_steps=" << totals.encode_only_steps
            << " failed_steps=" << totals.failed_steps << "\n";
  // A fuzz run that never gets there proves nothing.
  EXPECT_GT(totals.requests, 4000);
  EXPECT_GT(totals.preemptions, 1000u);
  EXPECT_GT(totals.hits, 100000u);
  EXPECT_GT(totals.mixed, 1000u);
  EXPECT_GT(totals.tiles, 1000u);
  EXPECT_GT(totals.encode_only_steps, 10);
  EXPECT_GT(totals.failed_steps, 50);
}

}  // namespace
}  // namespace kvarn
