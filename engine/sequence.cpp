#include "engine/sequence.h"

#include <algorithm>
#include <span>
#include <utility>

namespace kvarn {

SamplingRow sampling_row(const Sequence& sequence) {
  const EngineRequest& request = sequence.request->request;
  const SamplingParams& params = request.sampling;
  const std::span<const int32_t> tokens = sequence.tokens;
  const auto prompt_tokens = static_cast<size_t>(sequence.prompt_tokens);
  SamplingRow row;
  row.temperature = params.temperature;
  row.top_p = params.top_p;
  row.min_p = params.min_p;
  row.top_k = params.top_k;
  row.repetition_penalty = params.repetition_penalty;
  row.presence_penalty = params.presence_penalty;
  row.frequency_penalty = params.frequency_penalty;
  row.seed = params.seed;
  row.choice = static_cast<uint32_t>(sequence.choice);
  row.output_position = static_cast<uint32_t>(sequence.num_outputs());
  row.logit_bias = params.logit_bias;
  if (sequence.num_outputs() < request.stop.min_tokens) row.banned = sequence.request->end_ids;
  row.prompt_tokens = tokens.first(prompt_tokens);
  row.output_tokens = tokens.subspan(prompt_tokens);
  row.num_logprobs = params.num_logprobs;
  return row;
}

Finish finish_of(const Sequence& sequence, int32_t max_model_len) {
  const StopParams& stop = sequence.request->request.stop;
  const auto contains = [](const std::vector<int32_t>& ids, int32_t id) {
    return std::find(ids.begin(), ids.end(), id) != ids.end();
  };
  const int32_t token = sequence.tokens.back();
  if (!stop.ignore_eos && contains(stop.eos_token_ids, token)) return {FinishReason::kStop, false};
  if (contains(stop.stop_token_ids, token)) return {FinishReason::kStop, true};
  if (sequence.num_outputs() >= stop.max_tokens || sequence.num_tokens() >= max_model_len) {
    return {FinishReason::kLength, false};
  }
  return {};
}

std::unique_ptr<RequestState> make_request_state(EngineRequest request, uint64_t arrival,
                                                 TimePoint accepted_at, SequenceId first_id) {
  auto state = std::make_unique<RequestState>();
  state->arrival = arrival;
  state->accepted_at = accepted_at;
  state->end_ids = request.stop.eos_token_ids;
  state->end_ids.insert(state->end_ids.end(), request.stop.stop_token_ids.begin(),
                        request.stop.stop_token_ids.end());
  for (int32_t choice = 0; choice < request.n; ++choice) {
    auto sequence = std::make_unique<Sequence>();
    sequence->id = first_id + static_cast<SequenceId>(choice);
    sequence->request = state.get();
    sequence->choice = choice;
    sequence->tokens = request.prompt;
    sequence->prompt_tokens = static_cast<int32_t>(request.prompt.size());
    state->sequences.push_back(std::move(sequence));
  }
  state->request = std::move(request);
  return state;
}

}  // namespace kvarn
