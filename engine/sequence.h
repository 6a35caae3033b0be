// One token stream and its request. A sequence's tokens are prompt + output; the first
// `num_computed` of them have K and V in its blocks. A decoding sequence has computed all but its
// last token. A preempted one has computed none and prefills prompt + output again: the reading
// rule makes that the same result.
//
// Owned by the scheduler; engine thread only.
#pragma once

#include <chrono>
#include <cstdint>
#include <memory>
#include <optional>
#include <vector>

#include "engine/block.h"
#include "engine/request.h"
#include "kernels/sampling.h"

namespace kvarn {

using SequenceId = uint64_t;
using TimePoint = std::chrono::steady_clock::time_point;

// kDeferred: waits for a sibling's prefill, whose blocks it will share. kWaiting: holds no block.
enum class SequenceState : uint8_t { kDeferred, kWaiting, kPrefilling, kDecoding };

struct Sequence;

struct RequestState {
  EngineRequest request;
  uint64_t arrival = 0;  // order of acceptance
  TimePoint accepted_at;
  std::optional<TimePoint> scheduled_at;  // when its first chunk was planned
  std::vector<int32_t> end_ids;           // EOS and stop ids, masked until min_tokens
  int32_t cached_tokens = 0;              // prompt tokens that choice 0 found in the prefix cache
  bool prefilled = false;                 // PrefillEvent was sent
  bool answered = false;                  // its last event was sent: what still comes is dropped
  std::vector<std::unique_ptr<Sequence>> sequences;  // the live ones, in order of choice
};

struct Sequence {
  SequenceId id = 0;
  RequestState* request = nullptr;
  int32_t choice = 0;
  SequenceState state = SequenceState::kWaiting;
  bool started = false;  // left the queue once
  std::vector<int32_t> tokens;
  int32_t prompt_tokens = 0;
  int32_t num_computed = 0;
  std::vector<BlockId> blocks;
  int32_t num_published = 0;  // leading blocks that the prefix cache knows
  uint64_t planned_in = 0;    // the step that looked at it last (scheduler)

  int32_t num_tokens() const { return static_cast<int32_t>(tokens.size()); }
  int32_t num_outputs() const { return num_tokens() - prompt_tokens; }
  bool running() const {
    return state == SequenceState::kPrefilling || state == SequenceState::kDecoding;
  }
};

// Blocks that a prefill of `tokens` tokens may take from the cache: the last token's query needs
// its own tile exact.
constexpr int32_t max_hit_blocks(int32_t tokens) { return (tokens - 1) / kBlockTokens; }

// How the next token of the sequence is to be sampled. Borrows the sequence's and request's
// vectors.
SamplingRow sampling_row(const Sequence& sequence);

struct Finish {
  std::optional<FinishReason> reason;
  bool by_stop_id = false;  // one of stop_token_ids, not EOS
};
// Whether the sequence ends with its last token.
Finish finish_of(const Sequence& sequence, int32_t max_model_len);

std::unique_ptr<RequestState> make_request_state(EngineRequest request, uint64_t arrival,
                                                 TimePoint accepted_at, SequenceId first_id);

}  // namespace kvarn
