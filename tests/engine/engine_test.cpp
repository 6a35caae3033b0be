#include "engine/engine.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <atomic>
#include <future>
#include <thread>

#include "tests/support/core_driver.h"

namespace kvarn {
namespace {

using namespace std::chrono_literals;
using test::FakeRunnerOptions;
using test::make_prompt;
using test::RecordingSink;

struct Running {
  explicit Running(FakeRunnerOptions options = {}, EngineConfig config = {},
                   EngineObserver* observer = nullptr) {
    auto made = std::make_unique<test::FakeModelRunner>(std::move(options));
    runner = made.get();
    auto result = Engine::create(config, std::move(made), observer);
    EXPECT_TRUE(result.is_ok()) << result.status().message();
    engine = std::move(result).value();
  }
  ~Running() {
    if (engine) expect_no_violations();
  }
  void expect_no_violations() {
    EXPECT_TRUE(engine->wait_idle(20s));
    for (const std::string& what : runner->violations()) ADD_FAILURE() << what;
    EXPECT_EQ(engine->stats().leaked_pages, 0);
  }
  EngineRequest request(std::vector<int32_t> prompt, int max_tokens,
                        std::shared_ptr<RecordingSink> sink, int n = 1) {
    EngineRequest r;
    r.id = engine->next_request_id();
    r.prompt = std::move(prompt);
    r.n = n;
    r.stop.max_tokens = max_tokens;
    r.sampling.seed = 5;
    r.sink = std::move(sink);
    return r;
  }
  test::FakeModelRunner* runner = nullptr;
  std::unique_ptr<Engine> engine;
};

// A gate that steps wait at, so that a test knows what the engine thread does.
class Gate {
 public:
  void close() { open_ = std::promise<void>(), future_ = open_.get_future().share(); }
  void open() { open_.set_value(); }
  void wait() const {
    if (future_.valid()) future_.wait();
  }

 private:
  std::promise<void> open_;
  std::shared_future<void> future_;
};

TEST(EngineTest, ARequestGetsItsPrefillItsTokensAndOneEnd) {
  Running running;
  const auto sink = std::make_shared<RecordingSink>();
  const std::vector<int32_t> prompt = make_prompt(300);
  ASSERT_TRUE(running.engine->submit(running.request(prompt, 20, sink)).is_ok());
  ASSERT_TRUE(sink->wait_over());
  std::vector<int32_t> tokens = prompt;
  for (const int32_t token : sink->tokens()) {
    EXPECT_EQ(token, test::fake_next_token(tokens, 5, 0, 1000));
    tokens.push_back(token);
  }
  EXPECT_EQ(tokens.size(), 320u);
  EXPECT_EQ(sink->finish(), FinishReason::kLength);
  ASSERT_TRUE(running.engine->wait_idle(5s));
  const EngineStats stats = running.engine->stats();
  EXPECT_EQ(stats.state, EngineState::kRunning);
  EXPECT_EQ(stats.running + stats.waiting, 0);
  EXPECT_EQ(stats.pages_free + stats.pages_cached + stats.pages_in_use, stats.pages_total);
  EXPECT_EQ(stats.pages_in_use, 0);
  EXPECT_EQ(stats.prompt_tokens, 300u);
  EXPECT_EQ(stats.generation_tokens, 20u);
  EXPECT_GT(stats.capacity_tokens, stats.pages_total);
}

TEST(EngineTest, ManyThreadsSubmitAndCancelAtOnce) {
  EngineConfig config;
  config.max_num_seqs = 16;
  Running running({.num_pages = 300}, config);
  std::atomic<int> refused{0};
  std::vector<std::thread> clients;
  for (int t = 0; t < 4; ++t) {
    clients.emplace_back([&, t] {
      for (int i = 0; i < 60; ++i) {
        const auto sink = std::make_shared<RecordingSink>(1 + i % 3);
        EngineRequest request =
            running.request(make_prompt(50 + 37 * i % 400, t), 10, sink, 1 + i % 3);
        const RequestId id = request.id;
        if (!running.engine->submit(std::move(request)).is_ok()) {
          ++refused;
          continue;
        }
        if (i % 5 == 0) {
          running.engine->cancel(id, Status(StatusCode::kCancelled, "client_gone", "gone"));
        }
        if (i % 4 == 0) {
          EXPECT_TRUE(sink->wait_over());
        }
        (void)running.engine->stats();
      }
    });
  }
  for (std::thread& client : clients) client.join();
  EXPECT_TRUE(running.engine->wait_idle(20s));
  EXPECT_EQ(refused, 0);
  EXPECT_EQ(running.engine->stats().pages_in_use, 0);
}

TEST(EngineTest, TheQueueTakesWhatItsLimitSaysAndNoMore) {
  Gate gate;
  FakeRunnerOptions options;
  options.step_time = 1ms;
  options.before_step = [&](int64_t, const StepBatch&) { gate.wait(); };
  EngineConfig config;
  config.max_num_seqs = 1;
  config.max_queued_requests = 5;
  Running running(options, config);
  gate.close();
  const auto first = std::make_shared<RecordingSink>();
  ASSERT_TRUE(running.engine->submit(running.request(make_prompt(10), 3, first)).is_ok());
  while (running.engine->stats().running == 0) std::this_thread::sleep_for(1ms);
  int refused = 0;
  std::vector<std::shared_ptr<RecordingSink>> accepted;
  for (int i = 0; i < 8; ++i) {
    const auto sink = std::make_shared<RecordingSink>();
    const Status status = running.engine->submit(running.request(make_prompt(10), 3, sink));
    if (status.is_ok()) {
      accepted.push_back(sink);
    } else {
      ++refused;
      EXPECT_EQ(status.reason(), "queue_full");
      EXPECT_EQ(status.code(), StatusCode::kResourceExhausted);
    }
  }
  EXPECT_EQ(refused, 3);
  EXPECT_EQ(running.engine->stats().waiting, 5);
  gate.open();
  for (const auto& sink : accepted) EXPECT_TRUE(sink->wait_over());
}

TEST(EngineTest, ARequestIsTakenWholeOrNotAtAll) {
  EngineConfig config;
  config.max_queued_requests = 3;
  Running running({}, config);
  const auto sink = std::make_shared<RecordingSink>(4);
  const Status status = running.engine->submit(running.request(make_prompt(10), 3, sink, 4));
  EXPECT_EQ(status.reason(), "queue_full");
  EXPECT_TRUE(running.engine->wait_idle(5s));
  EXPECT_FALSE(sink->over());
}

TEST(EngineTest, RefusesWhatExceedsTheContext) {
  EngineConfig config;
  config.max_model_len = 100;
  Running running({}, config);
  const auto sink = std::make_shared<RecordingSink>();
  EXPECT_EQ(running.engine->submit(running.request(make_prompt(90), 11, sink)).reason(),
            "context_length_exceeded");
  EXPECT_EQ(running.engine->max_model_len(), 100);
}

TEST(EngineTest, CancelEndsTheRequestWithItsStatus) {
  Running running({.step_time = 1ms});
  const auto sink = std::make_shared<RecordingSink>();
  EngineRequest request = running.request(make_prompt(10), 10000, sink);
  const RequestId id = request.id;
  ASSERT_TRUE(running.engine->submit(std::move(request)).is_ok());
  ASSERT_TRUE(sink->wait_tokens(3));
  running.engine->cancel(id, Status(StatusCode::kCancelled, "client_gone", "the client left"));
  ASSERT_TRUE(sink->wait_over());
  EXPECT_EQ(sink->error()->reason(), "client_gone");
  ASSERT_TRUE(running.engine->wait_idle(5s));
  EXPECT_EQ(running.engine->stats().pages_in_use, 0);
}

TEST(EngineTest, FinishChoiceEndsOneChoiceSilentlyAndTheOthersGoOn) {
  Running running({.step_time = 1ms});
  const auto sink = std::make_shared<RecordingSink>(2);
  EngineRequest request = running.request(make_prompt(10), 60, sink, 2);
  const RequestId id = request.id;
  ASSERT_TRUE(running.engine->submit(std::move(request)).is_ok());
  ASSERT_TRUE(sink->wait_tokens(2, 0));
  running.engine->finish_choice(id, 0);
  ASSERT_TRUE(running.engine->wait_idle(10s));
  EXPECT_EQ(sink->finish(1), FinishReason::kLength);
  EXPECT_EQ(sink->tokens(1).size(), 60u);
  EXPECT_FALSE(sink->finish(0).has_value());
  EXPECT_LT(sink->tokens(0).size(), 60u);
}

TEST(EngineTest, AFailedStepIsAnsweredAndTheEngineGoesOn) {
  FakeRunnerOptions options;
  options.before_step = [](int64_t step, const StepBatch&) {
    if (step == 1) throw std::runtime_error("a kernel failed at /some/path");
  };
  Running running(options);
  const auto first = std::make_shared<RecordingSink>();
  ASSERT_TRUE(running.engine->submit(running.request(make_prompt(10), 5, first)).is_ok());
  ASSERT_TRUE(first->wait_over());
  EXPECT_EQ(first->error()->reason(), "engine_error");
  EXPECT_EQ(first->error()->code(), StatusCode::kInternal);
  EXPECT_THAT(first->error()->message(), testing::Not(testing::HasSubstr("path")));
  const auto second = std::make_shared<RecordingSink>();
  ASSERT_TRUE(running.engine->submit(running.request(make_prompt(10), 5, second)).is_ok());
  ASSERT_TRUE(second->wait_over());
  EXPECT_EQ(second->finish(), FinishReason::kLength);
}

TEST(EngineTest, ALostDeviceEndsEverybodyAndRefusesTheNext) {
  FakeRunnerOptions options;
  options.before_step = [](int64_t step, const StepBatch&) {
    if (step == 2) throw DeviceLost("device 0 is gone");
  };
  EngineConfig config;
  config.max_num_seqs = 1;
  Running running(options, config);
  const auto first = std::make_shared<RecordingSink>();
  const auto waiting = std::make_shared<RecordingSink>();
  EngineRequest a = running.request(make_prompt(10), 50, first);
  EngineRequest b = running.request(make_prompt(10), 50, waiting);
  ASSERT_TRUE(running.engine->submit(std::move(a)).is_ok());
  const Status second = running.engine->submit(std::move(b));
  ASSERT_TRUE(first->wait_over());
  EXPECT_EQ(first->error()->reason(), "engine_unavailable");
  if (second.is_ok()) {
    ASSERT_TRUE(waiting->wait_over());
    EXPECT_EQ(waiting->error()->reason(), "engine_unavailable");
  }
  ASSERT_TRUE(running.engine->wait_idle(5s));
  EXPECT_EQ(running.engine->stats().state, EngineState::kFailed);
  const auto late = std::make_shared<RecordingSink>();
  EXPECT_EQ(running.engine->submit(running.request(make_prompt(10), 5, late)).reason(),
            "engine_unavailable");
}

TEST(EngineTest, AStalledStepAnswersEverybodyAndTheEngineRecoversWhenItReturns) {
  Gate gate;
  std::atomic<bool> hold{true};
  FakeRunnerOptions options;
  options.step_time = 1ms;
  options.before_step = [&](int64_t, const StepBatch&) {
    if (hold) gate.wait();
  };
  EngineConfig config;
  config.engine_stall_seconds = 0.6;
  Running running(options, config);
  gate.close();
  const auto sink = std::make_shared<RecordingSink>();
  ASSERT_TRUE(running.engine->submit(running.request(make_prompt(300), 50, sink)).is_ok());
  while (running.engine->stats().running == 0) std::this_thread::sleep_for(1ms);
  const auto in_inbox = std::make_shared<RecordingSink>();
  ASSERT_TRUE(running.engine->submit(running.request(make_prompt(10), 5, in_inbox)).is_ok());
  ASSERT_TRUE(sink->wait_over());
  EXPECT_EQ(sink->error()->reason(), "engine_unavailable");
  ASSERT_TRUE(in_inbox->wait_over());
  EXPECT_EQ(in_inbox->error()->reason(), "engine_unavailable");
  while (running.engine->stats().state != EngineState::kStalled) std::this_thread::sleep_for(1ms);
  const auto refused = std::make_shared<RecordingSink>();
  EXPECT_EQ(running.engine->submit(running.request(make_prompt(10), 5, refused)).reason(),
            "engine_unavailable");
  hold = false;
  gate.open();
  ASSERT_TRUE(running.engine->wait_idle(5s));
  while (running.engine->stats().state != EngineState::kRunning) std::this_thread::sleep_for(1ms);
  EXPECT_EQ(running.engine->stats().pages_in_use, 0);
  const auto next = std::make_shared<RecordingSink>();
  ASSERT_TRUE(running.engine->submit(running.request(make_prompt(10), 5, next)).is_ok());
  ASSERT_TRUE(next->wait_over());
  EXPECT_EQ(next->finish(), FinishReason::kLength);
}

TEST(EngineTest, TwiceTheStallTimeIsAFailure) {
  Gate gate;
  FakeRunnerOptions options;
  options.step_time = 1ms;
  options.before_step = [&](int64_t, const StepBatch&) { gate.wait(); };
  EngineConfig config;
  config.engine_stall_seconds = 0.3;
  Running running(options, config);
  gate.close();
  const auto sink = std::make_shared<RecordingSink>();
  ASSERT_TRUE(running.engine->submit(running.request(make_prompt(300), 50, sink)).is_ok());
  for (int i = 0; i < 5000 && running.engine->stats().state != EngineState::kFailed; ++i) {
    std::this_thread::sleep_for(1ms);
  }
  EXPECT_EQ(running.engine->stats().state, EngineState::kFailed);
  gate.open();
}

TEST(EngineTest, DrainingRefusesTheNewAndRunsWhatWasAccepted) {
  EngineConfig config;
  config.max_num_seqs = 1;
  Running running({.step_time = 1ms}, config);
  std::vector<std::shared_ptr<RecordingSink>> sinks;
  for (int i = 0; i < 3; ++i) {
    sinks.push_back(std::make_shared<RecordingSink>());
    ASSERT_TRUE(running.engine->submit(running.request(make_prompt(10), 10, sinks.back())).is_ok());
  }
  running.engine->begin_drain();
  EXPECT_EQ(running.engine->stats().state, EngineState::kDraining);
  const auto late = std::make_shared<RecordingSink>();
  const Status status = running.engine->submit(running.request(make_prompt(10), 5, late));
  EXPECT_EQ(status.reason(), "server_draining");
  EXPECT_EQ(status.code(), StatusCode::kUnavailable);
  EXPECT_TRUE(running.engine->wait_idle(10s));
  for (const auto& sink : sinks) EXPECT_EQ(sink->finish(), FinishReason::kLength);
}

TEST(EngineTest, CancelAllAndDestructionEndWhatIsLeft) {
  Running running({.step_time = 1ms});
  const auto first = std::make_shared<RecordingSink>();
  ASSERT_TRUE(running.engine->submit(running.request(make_prompt(10), 5000, first)).is_ok());
  running.engine->cancel_all(Status(StatusCode::kUnavailable, "server_shutdown", "bye"));
  ASSERT_TRUE(first->wait_over());
  EXPECT_EQ(first->error()->reason(), "server_shutdown");
  const auto second = std::make_shared<RecordingSink>();
  ASSERT_TRUE(running.engine->submit(running.request(make_prompt(10), 5000, second)).is_ok());
  running.engine.reset();
  ASSERT_TRUE(second->over());
  EXPECT_EQ(second->error()->reason(), "server_shutdown");
  EXPECT_EQ(second->error()->code(), StatusCode::kUnavailable);
}

TEST(EngineTest, TheHeartbeatGoesOnWithoutWork) {
  Running running;
  const auto before = running.engine->stats().heartbeat;
  std::this_thread::sleep_for(1200ms);
  EXPECT_GT(running.engine->stats().heartbeat, before);
}

TEST(EngineTest, TheObserverSeesStepsAndPreemptions) {
  struct Counting : EngineObserver {
    void on_step(double seconds, int prefill_tokens, int decode_tokens) override {
      EXPECT_GE(seconds, 0.0);
      prefill += prefill_tokens;
      decode += decode_tokens;
    }
    void on_preemption(RequestId, int) override { ++preemptions; }
    void on_device_lost() override {}
    int prefill = 0, decode = 0, preemptions = 0;
  } observer;
  {
    Running running({.num_pages = 19}, {}, &observer);
    const auto a = std::make_shared<RecordingSink>();
    const auto b = std::make_shared<RecordingSink>();
    ASSERT_TRUE(running.engine->submit(running.request(make_prompt(300, 1), 200, a)).is_ok());
    ASSERT_TRUE(running.engine->submit(running.request(make_prompt(200, 2), 200, b)).is_ok());
    ASSERT_TRUE(a->wait_over());
    ASSERT_TRUE(b->wait_over());
    ASSERT_TRUE(running.engine->wait_idle(5s));
    EXPECT_EQ(static_cast<uint64_t>(observer.preemptions), running.engine->stats().preemptions);
  }
  EXPECT_GE(observer.prefill, 500);
  EXPECT_GE(observer.decode, 300);
  EXPECT_GT(observer.preemptions, 0);
}

}  // namespace
}  // namespace kvarn
