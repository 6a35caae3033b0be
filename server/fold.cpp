#include "server/fold.h"

#include <iterator>
#include <utility>

#include "kernels/core/check.h"

namespace kvarn {

void Fold::add(PromptInfo info) {
  usage_.prompt_tokens += info.num_prompt_tokens;
  usage_.cached_tokens += info.num_cached_tokens;
  prompts_.push_back(std::move(info));
}

void Fold::add(Delta delta) {
  CHECK(delta.choice >= 0 && static_cast<size_t>(delta.choice) < choices_.size(),
        "a delta of a choice that was not asked for");
  FoldedChoice& choice = choices_[static_cast<size_t>(delta.choice)];
  switch (delta.kind) {
    case DeltaKind::kContent:
      choice.content += delta.text;
      break;
    case DeltaKind::kReasoning:
      choice.reasoning += delta.text;
      break;
    case DeltaKind::kToolCall: {
      const auto index = static_cast<size_t>(delta.tool_call.index);
      if (index >= choice.tool_calls.size()) choice.tool_calls.resize(index + 1);
      ToolCallDelta& call = choice.tool_calls[index];
      call.index = delta.tool_call.index;
      if (!delta.tool_call.id.empty()) call.id = std::move(delta.tool_call.id);
      if (!delta.tool_call.name.empty()) call.name = std::move(delta.tool_call.name);
      call.arguments += delta.tool_call.arguments;
      break;
    }
    case DeltaKind::kFinish:
      choice.finish = std::move(delta.finish);
      break;
  }
  choice.num_tokens += delta.num_tokens;
  usage_.completion_tokens += delta.num_tokens;
  usage_.reasoning_tokens += delta.num_reasoning_tokens;
  choice.token_ids.insert(choice.token_ids.end(), delta.token_ids.begin(), delta.token_ids.end());
  choice.logprobs.insert(choice.logprobs.end(), std::make_move_iterator(delta.logprobs.begin()),
                         std::make_move_iterator(delta.logprobs.end()));
}

}  // namespace kvarn
