// OutputWorkers: N threads that turn the engine's tokens into deltas. One generation stays on one
// thread, so its state needs no lock and its deltas keep their order. Per choice: ChoiceOutput ->
// TokenStream. The engine thread only enqueues. Thread-safe.
#pragma once

#include <chrono>
#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "engine/engine.h"
#include "engine/request.h"
#include "engine/tokenizer/tokenizer.h"
#include "server/generate_request.h"
#include "server/output_parser.h"
#include "server/token_stream.h"

namespace kvarn {

class Metrics;

// How one prompt's output is to be treated. One per engine request.
struct OutputPlan {
  RequestId engine_id = 0;
  int32_t prompt_index = 0;
  int32_t n = 1;
  int32_t first_choice = 0;  // index in the response of this prompt's choice 0
  std::vector<int32_t> prompt;
  std::string echo;    // text that precedes the output; empty: none
  bool parse = false;  // chats: split reasoning from content
  std::vector<std::string> stop;
  int32_t min_tokens = 0;  // until then stop strings are not looked for
  int32_t max_tokens = 0;
  bool include_stop_string = false;
  ResponseOptions response;
};

class OutputWorkers {
 public:
  // All borrowed; they outlive the workers. `format` is that of chats.
  OutputWorkers(int threads, const Tokenizer& tokenizer, const OutputFormat& format, Engine& engine,
                Metrics& metrics);
  ~OutputWorkers();  // the engine must have stopped: no event may follow

  // One sink per plan, all writing to `stream`, which ends when the last choice of the last plan
  // has, or with the first error (then the others are cancelled). `on_end` runs once on a worker
  // thread, when no further engine event matters, just before the stream ends.
  // `response_id` is named in errors that are not the client's fault.
  std::vector<std::shared_ptr<EventSink>> open(std::vector<OutputPlan> plans,
                                               std::string response_id,
                                               std::shared_ptr<TokenStream> stream,
                                               std::chrono::steady_clock::time_point accepted_at,
                                               std::function<void(const Status&)> on_end);
  // Ends every generation with `why` without waiting for the engine: it may be stuck in a step.
  void fail_all(const Status& why);
  size_t active() const;  // generations that have not ended

 private:
  class Impl;
  std::unique_ptr<Impl> impl_;
};

}  // namespace kvarn
