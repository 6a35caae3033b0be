// The health state that both doors show (docs/api.md, "Health"). Thread-safe. Listeners hear every
// change, on the thread that made it, and must not block.
#pragma once

#include <functional>
#include <map>
#include <mutex>

namespace kvarn {

enum class HealthState { kLoading, kOk, kDraining, kStalled, kFailed };
const char* health_state_name(HealthState state);  // "loading", "ok", ...

class Health {
 public:
  HealthState state() const;
  // kFailed is final.
  void set(HealthState state);
  bool ready() const { return state() == HealthState::kOk; }

  // The listener is called with the present state at once, then at each change, until removed.
  // After unsubscribe() returns it is not running. Returns a handle.
  int subscribe(std::function<void(HealthState)> listener);
  void unsubscribe(int handle);

 private:
  mutable std::mutex mutex_;
  std::mutex notify_mutex_;  // taken before mutex_: listeners hear changes in order
  HealthState state_ = HealthState::kLoading;
  int next_handle_ = 1;
  std::map<int, std::function<void(HealthState)>> listeners_;
};

}  // namespace kvarn
