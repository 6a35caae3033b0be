// What the engine is asked for and what it answers, in tokens. No text, no JSON, no sockets: the
// server turns text into this and back. Plain data.
#pragma once

#include <chrono>
#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <variant>
#include <vector>

#include "kernels/core/status.h"
#include "kernels/sampling.h"

namespace kvarn {

using RequestId = uint64_t;  // the engine's, unique in the process, from Engine::next_request_id()

struct SamplingParams {
  float temperature = 1.f;
  float top_p = 1.f;
  int32_t top_k = 0;
  float min_p = 0.f;
  float repetition_penalty = 1.f, presence_penalty = 0.f, frequency_penalty = 0.f;
  std::vector<LogitBias> logit_bias;
  uint64_t seed = 0;          // the server draws one where the client gave none
  int32_t num_logprobs = -1;  // -1 none, 0 of the sampled token, n top alternatives too
};

struct StopParams {
  int32_t max_tokens = 0;               // >= 0; 0 runs the prefill only and finishes with kLength
  int32_t min_tokens = 0;               // until then EOS and stop ids are masked
  std::vector<int32_t> eos_token_ids;   // of the model
  std::vector<int32_t> stop_token_ids;  // of the request
  bool ignore_eos = false;              // EOS is an ordinary token; stop_token_ids still end
};

enum class FinishReason : uint8_t { kStop, kLength };

// One sequence got one token. `finish` is set on its last event. Tokens of one choice arrive in
// order.
struct TokenEvent {
  int32_t choice = 0;    // index within the request
  SampledToken sampled;  // token == -1: no token (max_tokens 0)
  std::optional<FinishReason> finish;
  bool finished_by_stop_id = false;  // the token is one of stop_token_ids (not EOS)
};
// The request's first news: its prompt is prefilled (sent before the first TokenEvent).
struct PrefillEvent {
  int32_t prompt_tokens = 0;
  int32_t cached_tokens = 0;  // of the first choice, served from the prefix cache
  std::chrono::steady_clock::time_point scheduled_at;  // when the request left the queue
};
// The request failed or was aborted; the last event. Status::reason() is the wire code.
struct ErrorEvent {
  Status status;
};
using EngineEvent = std::variant<PrefillEvent, TokenEvent, ErrorEvent>;

// Implemented by the server. Called on the engine thread, in order, never after the last event
// (ErrorEvent, or the finish of the last choice). Must not block and must not call back into the
// engine synchronously.
class EventSink {
 public:
  virtual ~EventSink() = default;
  virtual void on_event(RequestId id, EngineEvent event) = 0;
};

struct EngineRequest {
  RequestId id = 0;
  std::string label;            // X-Request-Id, for logs
  std::vector<int32_t> prompt;  // 1.. tokens
  int32_t n = 1;                // choices
  SamplingParams sampling;
  StopParams stop;
  int32_t priority = 0;    // lower runs earlier; 0 unless --scheduling-policy priority
  std::string cache_salt;  // prefix blocks are shared only under an equal salt
  std::string tenant;      // API key digest; prefills take turns between tenants; empty: none
  std::optional<std::chrono::steady_clock::time_point>
      deadline;  // then: kDeadlineExceeded "deadline_exceeded"
  std::shared_ptr<EventSink> sink;
};

}  // namespace kvarn
