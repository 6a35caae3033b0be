// The fold of a stream: what all its deltas add up to. The answer that is not streamed is made from
// this and from nothing else, so both answers agree byte for byte. Pure; not thread-safe.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "server/generate_output.h"

namespace kvarn {

struct FoldedChoice {
  std::string content, reasoning;
  std::vector<ToolCallDelta> tool_calls;  // whole calls, by index
  std::vector<int32_t> token_ids;
  std::vector<TokenLogprobs> logprobs;
  int64_t num_tokens = 0;
  std::optional<Finish> finish;
};

class Fold {
 public:
  explicit Fold(int32_t num_choices) : choices_(static_cast<size_t>(num_choices)) {}

  void add(PromptInfo info);
  void add(Delta delta);

  const std::vector<FoldedChoice>& choices() const { return choices_; }
  const std::vector<PromptInfo>& prompts() const { return prompts_; }
  // What has been seen so far; equals StreamEnd::usage at the end.
  const Usage& usage() const { return usage_; }

 private:
  std::vector<FoldedChoice> choices_;
  std::vector<PromptInfo> prompts_;
  Usage usage_;
};

}  // namespace kvarn
