#include "server/lifecycle.h"

#include <algorithm>
#include <thread>

#include <fmt/format.h>

#include "kernels/core/log.h"

namespace kvarn {
namespace {

using Clock = std::chrono::steady_clock;
using namespace std::chrono_literals;

constexpr auto kPoll = 20ms;
// After the last item of a request, time for its bytes to reach the client.
constexpr auto kFlush = 2s;

}  // namespace

void Lifecycle::watch() {
  const std::shared_ptr<GenerationService> service = state_.service();
  if (service == nullptr) return;
  switch (service->engine().stats().state) {
    case EngineState::kRunning:
    case EngineState::kDraining:
      if (state_.health.state() == HealthState::kStalled) {
        state_.health.set(draining_ ? HealthState::kDraining : HealthState::kOk);
      }
      break;
    case EngineState::kStalled:
      state_.health.set(HealthState::kStalled);
      break;
    case EngineState::kFailed:
    case EngineState::kStopped:
      state_.health.set(HealthState::kFailed);
      service->fail_all(Status::unavailable("the engine failed"));
      break;
  }
}

bool Lifecycle::wait_until_idle(Clock::time_point until, const std::function<bool()>& hurry) {
  const std::shared_ptr<GenerationService> service = state_.service();
  while (service != nullptr && service->active() > 0) {
    if (Clock::now() >= until || hurry()) return false;
    watch();
    std::this_thread::sleep_for(kPoll);
  }
  return true;
}

bool Lifecycle::drain(const std::function<bool()>& hurry) {
  draining_ = true;
  state_.health.set(HealthState::kDraining);
  const std::shared_ptr<GenerationService> service = state_.service();
  if (service != nullptr) service->engine().begin_drain();
  http_.close_idle();
  const auto until = Clock::now() + std::chrono::duration_cast<Clock::duration>(
                                        std::chrono::duration<double>(state_.config.drain_seconds));
  const bool complete = wait_until_idle(until, hurry);
  if (!complete) {
    const Status why(StatusCode::kUnavailable, "server_shutdown",
                     "the server shut down before the request was complete");
    log_warning(fmt::format("drain cut_off={}", service->active()));
    service->engine().cancel_all(why);
    service->fail_all(why);
    wait_until_idle(Clock::now() + kFlush, [] { return false; });
  }
  http_.stop(std::chrono::duration_cast<std::chrono::milliseconds>(kFlush));
  if (grpc_ != nullptr) grpc_->shutdown(Clock::now() + kFlush);
  return complete;
}

}  // namespace kvarn
