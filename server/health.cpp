#include "server/health.h"

#include <utility>
#include <vector>

namespace kvarn {

const char* health_state_name(HealthState state) {
  switch (state) {
    case HealthState::kLoading:
      return "loading";
    case HealthState::kOk:
      return "ok";
    case HealthState::kDraining:
      return "draining";
    case HealthState::kStalled:
      return "stalled";
    case HealthState::kFailed:
      return "failed";
  }
  return "failed";
}

HealthState Health::state() const {
  const std::lock_guard lock(mutex_);
  return state_;
}

void Health::set(HealthState state) {
  const std::lock_guard notify_lock(notify_mutex_);
  std::vector<std::function<void(HealthState)>> listeners;
  {
    const std::lock_guard lock(mutex_);
    if (state_ == state || state_ == HealthState::kFailed) return;
    state_ = state;
    for (const auto& [handle, listener] : listeners_) listeners.push_back(listener);
  }
  for (const auto& listener : listeners) listener(state);
}

int Health::subscribe(std::function<void(HealthState)> listener) {
  const std::lock_guard notify_lock(notify_mutex_);
  int handle = 0;
  HealthState state = HealthState::kLoading;
  {
    const std::lock_guard lock(mutex_);
    handle = next_handle_++;
    state = state_;
    listeners_[handle] = listener;
  }
  listener(state);
  return handle;
}

void Health::unsubscribe(int handle) {
  const std::lock_guard notify_lock(notify_mutex_);
  const std::lock_guard lock(mutex_);
  listeners_.erase(handle);
}

}  // namespace kvarn
