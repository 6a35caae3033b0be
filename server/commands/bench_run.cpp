#include "server/commands/bench_run.h"

#include <algorithm>
#include <cmath>
#include <condition_variable>
#include <mutex>
#include <random>

namespace kvarn::commands {
namespace {

// What the sinks share with the thread that submits.
struct Shared {
  std::mutex mutex;
  std::condition_variable changed;
  int done = 0;
  Status error;
};

class TimingSink : public EventSink {
 public:
  TimingSink(RequestTimes& times, Shared& shared) : times_(times), shared_(shared) {}

  void on_event(RequestId, EngineEvent event) override {
    const BenchClock::time_point now = BenchClock::now();
    if (const auto* error = std::get_if<ErrorEvent>(&event)) {
      finish(error->status);
      return;
    }
    const auto* token = std::get_if<TokenEvent>(&event);
    if (token == nullptr) return;
    if (times_.output_tokens == 0) {
      times_.first_token = now;
    } else {
      times_.gaps.push_back(std::chrono::duration<float>(now - times_.last_token).count());
    }
    times_.last_token = now;
    if (token->sampled.token >= 0) ++times_.output_tokens;
    if (token->finish) finish(Status::ok());
  }

 private:
  void finish(const Status& status) {
    const std::lock_guard lock(shared_.mutex);
    ++shared_.done;
    if (!status.is_ok() && shared_.error.is_ok()) shared_.error = status;
    shared_.changed.notify_one();
  }

  RequestTimes& times_;
  Shared& shared_;
};

EngineRequest make_request(Engine& engine, const BenchLoad& load, std::mt19937_64& random) {
  EngineRequest request;
  request.id = engine.next_request_id();
  request.label = "bench";
  request.prompt.resize(static_cast<size_t>(load.prompt_len));
  for (int32_t& token : request.prompt) {
    token = static_cast<int32_t>(random() % static_cast<uint64_t>(load.vocab_size));
  }
  request.sampling.temperature = 0;
  request.stop.max_tokens = load.output_len;
  request.stop.ignore_eos = true;
  return request;
}

}  // namespace

Result<BenchResult> run_load(Engine& engine, const BenchLoad& load,
                             const std::function<void(int64_t)>& progress) {
  BenchResult result;
  result.requests.resize(static_cast<size_t>(load.requests));
  Shared shared;
  std::mt19937_64 random(load.seed);
  std::vector<EngineRequest> waiting;
  waiting.reserve(result.requests.size());
  for (RequestTimes& times : result.requests) {
    times.gaps.reserve(static_cast<size_t>(load.output_len));
    waiting.push_back(make_request(engine, load, random));
    waiting.back().sink = std::make_shared<TimingSink>(times, shared);
  }

  result.started = BenchClock::now();
  int submitted = 0;
  std::unique_lock lock(shared.mutex);
  while (shared.done < submitted || (submitted < load.requests && shared.error.is_ok())) {
    if (submitted < load.requests && submitted - shared.done < load.concurrency &&
        shared.error.is_ok()) {
      lock.unlock();
      const auto index = static_cast<size_t>(submitted);
      result.requests[index].submitted = BenchClock::now();
      const Status status = engine.submit(std::move(waiting[index]));
      lock.lock();
      if (status.is_ok()) {
        ++submitted;
      } else {
        shared.error = status;
      }
      continue;
    }
    const int done = shared.done;
    shared.changed.wait(lock, [&] { return shared.done != done; });
    progress(shared.done);
  }
  result.ended = BenchClock::now();
  if (!shared.error.is_ok()) return shared.error;
  return result;
}

double joint_decode_rate(const BenchResult& result) {
  BenchClock::time_point from = result.started, to = BenchClock::time_point::max();
  for (const RequestTimes& times : result.requests) {
    from = std::max(from, times.first_token);
    to = std::min(to, times.last_token);
  }
  const double seconds = std::chrono::duration<double>(to - from).count();
  if (seconds <= 0) return 0;
  double tokens = 0;
  for (const RequestTimes& times : result.requests) {
    BenchClock::time_point at = times.first_token;
    for (const float gap : times.gaps) {
      at += std::chrono::duration_cast<BenchClock::duration>(std::chrono::duration<float>(gap));
      // Half a microsecond of slack: the sum of rounded gaps may miss the end by less.
      if (at > from && at <= to + std::chrono::microseconds(1)) tokens += 1;
    }
  }
  return tokens / seconds;
}

double percentile(std::vector<double> values, double share) {
  if (values.empty()) return 0;
  std::sort(values.begin(), values.end());
  const auto rank = static_cast<size_t>(std::ceil(share * static_cast<double>(values.size())));
  return values[std::clamp<size_t>(rank, 1, values.size()) - 1];
}

}  // namespace kvarn::commands
