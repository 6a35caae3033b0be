// What a request's output is made of, for both doors: deltas while it runs, then usage or an error.
// The answer that is not streamed is the fold of the same deltas (fold.h). Plain data.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <variant>
#include <vector>

#include "kernels/core/status.h"

namespace kvarn {

struct TokenText {
  int32_t id = 0;
  float logprob = 0.f;
  std::string bytes;  // exact; need not be valid UTF-8
};
struct TokenLogprobs {
  TokenText token;
  bool in_text = true;  // false: a special or ending token whose characters are left out
  std::vector<TokenText> top;  // most likely first
};

// The first delta of a call has id and name; later ones only arguments.
struct ToolCallDelta {
  int32_t index = 0;
  std::string id, name;
  std::string arguments;
};

enum class FinishKind : uint8_t { kStop, kLength, kToolCalls };
struct Finish {
  FinishKind kind = FinishKind::kStop;
  // What stopped it, for kStop; all unset for kLength.
  std::optional<int32_t> eos_token_id, stop_token_id;
  std::optional<std::string> stop_string;
};

enum class DeltaKind : uint8_t { kContent, kReasoning, kToolCall, kFinish };

// New output of one choice, of one kind. A delta that releases no text (ids only) is kContent with
// an empty text. The last one of a choice is kFinish and has no text, but may account for tokens.
struct Delta {
  int32_t choice = 0;
  DeltaKind kind = DeltaKind::kContent;
  std::string text;  // kContent (raw text where nothing is parsed) and kReasoning
  ToolCallDelta tool_call;
  int32_t num_tokens = 0;            // generated tokens that this delta accounts for
  int32_t num_reasoning_tokens = 0;  // of those, reasoning
  std::vector<int32_t> token_ids;    // those tokens, where asked for
  std::vector<TokenLogprobs> logprobs;
  std::optional<Finish> finish;  // set for kFinish
};

// Once per prompt, before its first delta.
struct PromptInfo {
  int32_t prompt_index = 0;
  int32_t num_prompt_tokens = 0;
  int32_t num_cached_tokens = 0;
  std::vector<int32_t> token_ids;  // where asked for
};

struct Usage {
  int64_t prompt_tokens = 0, completion_tokens = 0, cached_tokens = 0, reasoning_tokens = 0;
};

// The last item of a stream: complete (`status` OK, usage final), or failed.
struct StreamEnd {
  Status status;
  Usage usage;
};

using StreamItem = std::variant<PromptInfo, Delta, StreamEnd>;

}  // namespace kvarn
