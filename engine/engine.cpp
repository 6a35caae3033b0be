// The engine thread and its inbox. The thread never blocks except on the inbox (at most half a
// second, so that the heartbeat goes on) and on the running step (in short waits, for the stall
// watch). Everything it decides is in engine_core.
#include "engine/engine.h"

#include <fmt/format.h>

#include <algorithm>
#include <condition_variable>
#include <mutex>
#include <thread>
#include <utility>
#include <variant>

#include "engine/engine_core.h"
#include "kernels/core/log.h"

namespace kvarn {
namespace {

using Clock = std::chrono::steady_clock;
using namespace std::chrono_literals;

constexpr auto kIdleWait = 500ms;  // between heartbeats without work; at most a second is promised
constexpr auto kStepWait = 100ms;  // between looks at a long step; a short one wakes us at once

struct Cancel {
  RequestId id;
  Status why;
};
struct FinishChoice {
  RequestId id;
  int32_t choice;
};
struct CancelAll {
  Status why;
};
using Message = std::variant<EngineRequest, Cancel, FinishChoice, CancelAll>;

Status unavailable(const char* what) {
  return {StatusCode::kUnavailable, "engine_unavailable", what};
}
Status draining() {
  return {StatusCode::kUnavailable, "server_draining",
          "the server is shutting down and takes no new requests"};
}
Status shut_down() {
  return {StatusCode::kUnavailable, "server_shutdown",
          "the server was shut down before the request ended"};
}

}  // namespace

class Engine::Impl {
 public:
  Impl(const EngineConfig& config, std::unique_ptr<EngineCore> engine_core)
      : core(std::move(engine_core)),
        max_queued_(config.max_queued_requests),
        stall_after_(config.engine_stall_seconds),
        stats_(core->stats()) {
    stats_.heartbeat = Clock::now();
    thread_ = std::thread([this] { loop(); });
  }

  ~Impl() {
    {
      const std::lock_guard lock(mutex_);
      stopping_ = true;
    }
    inbox_changed_.notify_all();
    thread_.join();
  }

  Status submit(EngineRequest request) {
    {
      const std::lock_guard lock(mutex_);
      KVARN_RETURN_IF_ERROR(may_submit());
    }
    KVARN_RETURN_IF_ERROR(core->check(request));
    {
      const std::lock_guard lock(mutex_);
      KVARN_RETURN_IF_ERROR(may_submit());
      const int64_t queued = inbox_sequences_ + unstarted_;
      if (queued + request.n > max_queued_) {
        return {StatusCode::kResourceExhausted, "queue_full",
                fmt::format("{} sequences wait and the request has {}; the queue takes {} "
                            "(--max-queued-requests); try again later",
                            queued, request.n, max_queued_)};
      }
      inbox_sequences_ += request.n;
      inbox_.emplace_back(std::move(request));
    }
    inbox_changed_.notify_one();
    return {};
  }

  void post(Message message) {
    {
      const std::lock_guard lock(mutex_);
      inbox_.push_back(std::move(message));
    }
    inbox_changed_.notify_one();
  }

  void begin_drain() {
    const std::lock_guard lock(mutex_);
    draining_ = true;
  }

  bool wait_idle(std::chrono::milliseconds timeout) {
    std::unique_lock lock(mutex_);
    return idle_changed_.wait_for(lock, timeout, [&] { return inbox_.empty() && !busy_; });
  }

  EngineStats stats() const {
    const std::lock_guard lock(mutex_);
    EngineStats copy = stats_;
    copy.waiting += inbox_sequences_;
    if (stopped_) {
      copy.state = EngineState::kStopped;
    } else if (failed_) {
      copy.state = EngineState::kFailed;
    } else if (stalled_ || Clock::now() - stats_.heartbeat > stall_after_) {
      copy.state = EngineState::kStalled;
    } else if (draining_) {
      copy.state = EngineState::kDraining;
    }
    return copy;
  }

  const std::unique_ptr<EngineCore> core;  // check(), max_model_len() and runner() from any thread
  std::atomic<RequestId> last_id{0};

 private:
  // Needs the lock.
  Status may_submit() const {
    if (failed_) return unavailable("the engine failed and takes no requests");
    if (stalled_) return unavailable("the engine makes no progress");
    if (draining_ || stopping_) return draining();
    return {};
  }

  void loop() {
    bool checked = false;  // pages, since the last step
    while (!drain_inbox()) {
      if (!failed_) core->end_expired();
      const bool started = !failed_ && core->start_step();
      if (started) {
        publish_stats();
        run_step();
        checked = false;
      } else if (!checked && core->scheduler().idle()) {
        core->check_integrity();
        checked = true;
      }
      publish_stats();
      if (!started) wait_for_messages();
    }
    core->cancel_all(shut_down());
    publish_stats();
    const std::lock_guard lock(mutex_);
    stopped_ = true;
  }

  // Messages in the order they came. True: the engine is to stop.
  bool drain_inbox() {
    std::vector<Message> messages;
    bool stopping = false;
    {
      const std::lock_guard lock(mutex_);
      messages.swap(inbox_);
      unstarted_ += inbox_sequences_;  // until the next publish_stats() counts them
      inbox_sequences_ = 0;
      busy_ = busy_ || !messages.empty();
      stopping = stopping_;
    }
    for (Message& message : messages) {
      if (auto* const request = std::get_if<EngineRequest>(&message)) {
        accept(std::move(*request), stopping);
      } else if (auto* const cancel = std::get_if<Cancel>(&message)) {
        core->cancel(cancel->id, cancel->why);
      } else if (auto* const finish = std::get_if<FinishChoice>(&message)) {
        core->finish_choice(finish->id, finish->choice);
      } else {
        core->cancel_all(std::get<CancelAll>(message).why);
      }
    }
    return stopping;
  }

  // Accepted before the engine failed or stopped, but not seen by it yet: an answer is owed.
  void accept(EngineRequest request, bool stopping) {
    if (!stopping && !failed_) {
      core->add(std::move(request));
      return;
    }
    const std::shared_ptr<EventSink> sink = request.sink;
    sink->on_event(request.id,
                   ErrorEvent{stopping ? shut_down() : unavailable("the engine failed")});
  }

  void run_step() {
    const Clock::time_point started = Clock::now();
    bool stalled = false;
    while (!core->wait_step(kStepWait)) {
      const Clock::time_point now = Clock::now();
      const auto quiet = now - std::max(started, core->runner().last_progress());
      const bool now_stalled = quiet > stall_after_;
      if (now_stalled && !stalled) {
        stalled = true;
        log_error(fmt::format("engine_stalled seconds={:.1f}",
                              std::chrono::duration<double>(quiet).count()));
        core->answer_all(unavailable("the engine makes no progress"));
      }
      {
        const std::lock_guard lock(mutex_);
        stats_.heartbeat = now;
        stalled_ = stalled;
        if (quiet > 2 * stall_after_) fail_locked();
      }
      if (stalled) answer_inbox();
    }
    const bool device_ok = core->finish_step();
    if (stalled) core->cancel_all(unavailable("the engine makes no progress"));
    {
      const std::lock_guard lock(mutex_);
      stalled_ = false;
      if (!device_ok) fail_locked();
    }
    if (failed_) core->cancel_all(unavailable("the engine failed"));
  }

  // While a step hangs: what was accepted just before is answered too. The other messages are about
  // requests that have had their answer.
  void answer_inbox() {
    std::vector<Message> messages;
    {
      const std::lock_guard lock(mutex_);
      messages.swap(inbox_);
      inbox_sequences_ = 0;
    }
    for (Message& message : messages) {
      auto* const request = std::get_if<EngineRequest>(&message);
      if (request == nullptr) continue;
      request->sink->on_event(request->id, ErrorEvent{unavailable("the engine makes no progress")});
    }
  }

  void fail_locked() {
    if (!failed_) log_error("engine_failed");
    failed_ = true;
  }

  void publish_stats() {
    bool idle = false;
    {
      const std::lock_guard lock(mutex_);
      stats_ = core->stats();
      stats_.heartbeat = Clock::now();
      unstarted_ = core->scheduler().num_unstarted();
      busy_ = !core->scheduler().idle();
      idle = !busy_;
    }
    if (idle) idle_changed_.notify_all();
  }

  void wait_for_messages() {
    std::unique_lock lock(mutex_);
    inbox_changed_.wait_for(lock, kIdleWait, [&] { return stopping_ || !inbox_.empty(); });
  }

  const int64_t max_queued_;
  const std::chrono::duration<double> stall_after_;

  mutable std::mutex mutex_;  // everything below but thread_
  std::condition_variable inbox_changed_, idle_changed_;
  std::vector<Message> inbox_;
  int64_t inbox_sequences_ = 0;  // in inbox_
  int64_t unstarted_ = 0;        // taken by the engine, never started
  bool busy_ = false;            // a sequence is left
  bool draining_ = false, stopping_ = false, stalled_ = false, stopped_ = false;
  std::atomic<bool> failed_{false};  // written under the lock, by the engine thread alone
  EngineStats stats_;
  std::thread thread_;
};

Result<std::unique_ptr<Engine>> Engine::create(const EngineConfig& config,
                                               std::unique_ptr<ModelRunner> runner,
                                               EngineObserver* observer) {
  KVARN_ASSIGN_OR_RETURN(auto core, EngineCore::create(config, std::move(runner), observer));
  return std::unique_ptr<Engine>(new Engine(std::make_unique<Impl>(config, std::move(core))));
}

Engine::Engine(std::unique_ptr<Impl> impl) : impl_(std::move(impl)) {}
Engine::~Engine() = default;

RequestId Engine::next_request_id() { return ++impl_->last_id; }
Status Engine::submit(EngineRequest request) { return impl_->submit(std::move(request)); }
void Engine::cancel(RequestId id, Status why) { impl_->post(Cancel{id, std::move(why)}); }
void Engine::finish_choice(RequestId id, int32_t choice) { impl_->post(FinishChoice{id, choice}); }
void Engine::begin_drain() { impl_->begin_drain(); }
bool Engine::wait_idle(std::chrono::milliseconds timeout) { return impl_->wait_idle(timeout); }
void Engine::cancel_all(const Status& why) { impl_->post(CancelAll{why}); }
EngineStats Engine::stats() const { return impl_->stats(); }
int Engine::max_model_len() const { return impl_->core->max_model_len(); }
const ModelRunner& Engine::runner() const { return impl_->core->runner(); }

}  // namespace kvarn
