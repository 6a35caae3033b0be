// An EventSink that keeps what it got, and fails the test where the order of events is broken.
// Thread-safe.
#pragma once

#include <gtest/gtest.h>

#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <map>
#include <mutex>
#include <optional>
#include <vector>

#include "engine/request.h"

namespace kvarn::test {

class RecordingSink : public EventSink {
 public:
  explicit RecordingSink(int32_t num_choices = 1) : num_choices_(num_choices) {}

  void on_event(RequestId, EngineEvent event) override {
    const std::lock_guard lock(mutex_);
    EXPECT_FALSE(over_) << "an event after the last one";
    if (const auto* const prefill = std::get_if<PrefillEvent>(&event)) {
      EXPECT_FALSE(prefill_.has_value()) << "one PrefillEvent a request";
      EXPECT_TRUE(tokens_.empty()) << "the PrefillEvent comes first";
      prefill_ = *prefill;
    } else if (const auto* const token = std::get_if<TokenEvent>(&event)) {
      EXPECT_TRUE(prefill_.has_value()) << "the PrefillEvent comes before tokens";
      EXPECT_EQ(finish_.count(token->choice), 0u) << "a token after the choice's end";
      if (token->sampled.token >= 0) {
        tokens_[token->choice].push_back(token->sampled.token);
        logprobs_[token->choice].push_back(token->sampled.logprob);
      }
      if (token->finish) {
        finish_[token->choice] = *token;
        over_ = static_cast<int32_t>(finish_.size()) == num_choices_;
      }
    } else {
      error_ = std::get<ErrorEvent>(event).status;
      over_ = true;
    }
    changed_.notify_all();
  }

  bool wait_over(std::chrono::milliseconds timeout = std::chrono::seconds(20)) const {
    std::unique_lock lock(mutex_);
    return changed_.wait_for(lock, timeout, [&] { return over_; });
  }
  bool wait_tokens(size_t count, int32_t choice = 0) const {
    std::unique_lock lock(mutex_);
    return changed_.wait_for(lock, std::chrono::seconds(20), [&] {
      const auto it = tokens_.find(choice);
      return over_ || (it != tokens_.end() && it->second.size() >= count);
    });
  }

  bool over() const { return locked(over_); }
  std::vector<int32_t> tokens(int32_t choice = 0) const { return locked(tokens_)[choice]; }
  std::vector<float> logprobs(int32_t choice = 0) const { return locked(logprobs_)[choice]; }
  std::optional<PrefillEvent> prefill() const { return locked(prefill_); }
  std::optional<Status> error() const { return locked(error_); }
  std::optional<FinishReason> finish(int32_t choice = 0) const {
    const auto all = locked(finish_);
    const auto it = all.find(choice);
    return it == all.end() ? std::nullopt : it->second.finish;
  }
  bool finished_by_stop_id(int32_t choice = 0) const {
    return locked(finish_)[choice].finished_by_stop_id;
  }

 private:
  template <typename T>
  T locked(const T& value) const {
    const std::lock_guard lock(mutex_);
    return value;
  }

  const int32_t num_choices_;
  mutable std::mutex mutex_;
  mutable std::condition_variable changed_;
  bool over_ = false;
  std::map<int32_t, std::vector<int32_t>> tokens_;
  std::map<int32_t, std::vector<float>> logprobs_;
  std::map<int32_t, TokenEvent> finish_;
  std::optional<PrefillEvent> prefill_;
  std::optional<Status> error_;
};

}  // namespace kvarn::test
