// Closed-loop load on an engine, in tokens: keeps `concurrency` requests running until all are
// answered, and notes when each token came. What `kvarn bench` measures with.
#pragma once

#include <chrono>
#include <cstdint>
#include <functional>
#include <vector>

#include "engine/engine.h"

namespace kvarn::commands {

struct BenchLoad {
  int requests = 1, concurrency = 1;
  int prompt_len = 512;  // random tokens, different for every request (no prefix is shared)
  int output_len = 128;  // 0: prefill only
  int vocab_size = 0;
  uint64_t seed = 0;
};

using BenchClock = std::chrono::steady_clock;

struct RequestTimes {
  BenchClock::time_point submitted, first_token, last_token;
  std::vector<float> gaps;  // seconds between tokens
  int output_tokens = 0;
};

struct BenchResult {
  std::vector<RequestTimes> requests;
  BenchClock::time_point started, ended;
  double seconds() const { return std::chrono::duration<double>(ended - started).count(); }
};

// Blocks until every request is answered. An error of any request ends the run. `progress` hears
// how many are done.
Result<BenchResult> run_load(Engine& engine, const BenchLoad& load,
                             const std::function<void(int64_t)>& progress);

// Output tokens per second of all sequences together, over the span in which all of them decode:
// from the last first token to the first last token. For loads with requests == concurrency.
double joint_decode_rate(const BenchResult& result);

// The value below which `share` of the values lie (nearest rank); 0 for none.
double percentile(std::vector<double> values, double share);

}  // namespace kvarn::commands
