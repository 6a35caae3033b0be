// Everything the engine does between two waits: membership, planning, running and publishing one
// step. No thread, no lock, no clock of its own waiting: engine.cpp adds those, and tests drive it
// step by step.
//
// Engine thread only (check() excepted).
#pragma once

#include <chrono>
#include <cstdint>
#include <future>
#include <memory>
#include <vector>

#include "engine/block_manager.h"
#include "engine/config.h"
#include "engine/engine.h"
#include "engine/model_runner.h"
#include "engine/scheduler.h"
#include "engine/step_plan.h"

namespace kvarn {

// The longest prompt + output: what the model supports and the whole pool holds for one sequence.
// An error names the flag and the number that fits.
Result<int> resolve_max_model_len(const EngineConfig& config, const ModelRunner& runner);

class EngineCore {
 public:
  // `observer` may be null and must outlive the core.
  static Result<std::unique_ptr<EngineCore>> create(const EngineConfig& config,
                                                    std::unique_ptr<ModelRunner> runner,
                                                    EngineObserver* observer);

  // What submit() refuses whatever the load: bad tokens, over the context. Thread-safe.
  Status check(const EngineRequest& request) const;
  void add(EngineRequest request) { scheduler_.add(std::move(request), now()); }
  void cancel(RequestId id, const Status& why) { deliver(scheduler_.end_request(id, why)); }
  void cancel_all(const Status& why);
  void finish_choice(RequestId id, int32_t choice) { scheduler_.end_choice(id, choice); }
  void end_expired() { deliver(scheduler_.end_expired(now())); }
  // Answers everybody while a step still runs; finish_step() then drops them all.
  void answer_all(const Status& why);

  // Plans a step and hands it to the runner. False: there is nothing to run.
  bool start_step();
  bool wait_step(std::chrono::milliseconds timeout);  // true: it ended
  // Publishes the step or fails its requests. False: the device is lost.
  bool finish_step();
  bool run_step() { return start_step() && finish_step(); }

  // Counts pages anew when no sequence is left; a leak is logged and counted.
  void check_integrity();

  Scheduler& scheduler() { return scheduler_; }
  const BlockManager& blocks() const { return blocks_; }
  const ModelRunner& runner() const { return *runner_; }
  int max_model_len() const { return max_model_len_; }
  // Without `state` and `heartbeat`, which are the loop's.
  EngineStats stats() const;

 private:
  EngineCore(const EngineConfig& config, std::unique_ptr<ModelRunner> runner,
             EngineObserver* observer, int max_model_len);
  static TimePoint now() { return std::chrono::steady_clock::now(); }
  static void deliver(std::vector<OutgoingEvent> events);

  std::unique_ptr<ModelRunner> runner_;
  EngineObserver* observer_;
  int max_model_len_;
  int64_t capacity_tokens_;
  ReadingRule rule_;
  BlockManager blocks_;
  Scheduler scheduler_;
  StepPlan plan_;
  StepBatch batch_;
  std::future<StepResult> running_step_;
  TimePoint step_started_;
  TimePoint last_step_;
  double encode_seconds_ = 0;
  int64_t leaked_pages_ = 0;
};

}  // namespace kvarn
