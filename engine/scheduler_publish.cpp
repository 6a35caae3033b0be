// After a step: tokens are appended, full blocks cached, finished sequences let go. Or, where the
// step failed, its requests ended and what it was to write forgotten.
#include <algorithm>
#include <unordered_set>

#include "engine/scheduler.h"
#include "kernels/core/check.h"

namespace kvarn {

std::vector<OutgoingEvent> Scheduler::complete_step(const StepPlan& plan, StepResult result) {
  std::vector<OutgoingEvent> events;
  for (const PlannedEncode& encode : plan.encodes) blocks_.release(encode.pinned);
  size_t next_token = 0;
  for (const auto* const list : {&plan.decodes, &plan.prefills}) {
    for (const PlannedRows& rows : *list) {
      SampledToken* const sampled = rows.sample ? &result.tokens[next_token++] : nullptr;
      publish_sequence(rows, sampled, events);
    }
  }
  CHECK(next_token == result.tokens.size(), "one token per sampling row");
  count_step(plan);
  return events;
}

void Scheduler::publish_sequence(const PlannedRows& rows, SampledToken* sampled,
                                 std::vector<OutgoingEvent>& events) {
  Sequence& s = *rows.sequence;
  RequestState& request = *s.request;
  const RequestId id = request.request.id;
  const auto send = [&](EngineEvent event) {
    if (!request.answered) events.push_back({request.request.sink, id, std::move(event)});
  };
  s.num_computed += rows.num_rows;
  publish_full_blocks(s);
  if (s.num_computed < s.num_tokens()) return;  // the prefill goes on

  s.state = SequenceState::kDecoding;
  if (!request.prefilled) {
    request.prefilled = true;
    counters_.prompt_tokens += static_cast<uint64_t>(s.prompt_tokens);
    counters_.prompt_tokens_cached += static_cast<uint64_t>(request.cached_tokens);
    send(PrefillEvent{s.prompt_tokens, request.cached_tokens, *request.scheduled_at});
    let_siblings_in(request);
  }
  TokenEvent event;
  event.choice = s.choice;
  if (sampled == nullptr) {  // max_tokens 0
    event.finish = FinishReason::kLength;
  } else {
    s.tokens.push_back(sampled->token);
    ++counters_.generation_tokens;
    event.sampled = std::move(*sampled);
    const Finish finish = finish_of(s, limits_.max_model_len);
    event.finish = finish.reason;
    event.finished_by_stop_id = finish.by_stop_id;
  }
  const bool finished = event.finish.has_value();
  send(std::move(event));
  if (finished) remove(s);
}

void Scheduler::publish_full_blocks(Sequence& s) {
  if (!blocks_.cache_enabled()) return;
  const int32_t num_full = s.num_computed / kBlockTokens;
  for (int32_t& k = s.num_published; k < num_full; ++k) {
    const auto i = static_cast<size_t>(k);
    const auto ids = std::span<const int32_t>(s.tokens).subspan(i * kBlockTokens, kBlockTokens);
    const BlockId parent = k == 0 ? kNoBlock : s.blocks[i - 1];
    s.blocks[i] = blocks_.publish(s.blocks[i], parent, ids, s.request->request.cache_salt);
  }
}

std::vector<OutgoingEvent> Scheduler::fail_step(const StepPlan& plan, const Status& why) {
  std::unordered_set<RequestId> failed;
  for (const auto* const list : {&plan.decodes, &plan.prefills}) {
    for (const PlannedRows& rows : *list) failed.insert(rows.sequence->request->request.id);
  }
  // Their exact rows are given up and their records may not be written: nobody may read them.
  std::vector<BlockId> lost;
  for (const PlannedEncode& encode : plan.encodes) {
    blocks_.acquire(encode.block);
    lost.push_back(encode.block);
  }
  std::vector<OutgoingEvent> events;
  for (const RequestId id : failed) {
    for (OutgoingEvent& event : end_request(id, why)) events.push_back(std::move(event));
  }
  const auto holds_lost_block = [&](const Sequence* s) {
    return std::any_of(s->blocks.begin(), s->blocks.end(), [&](BlockId id) {
      return std::find(lost.begin(), lost.end(), id) != lost.end();
    });
  };
  if (!lost.empty()) {
    const std::vector<Sequence*> running = running_;
    for (Sequence* s : running) {
      if (holds_lost_block(s)) preempt_running(*s, nullptr);
    }
  }
  for (const PlannedEncode& encode : plan.encodes) {
    blocks_.forget(encode.block);
    blocks_.release(encode.pinned);
    blocks_.release(encode.block);
  }
  return events;
}

void Scheduler::count_step(const StepPlan& plan) {
  if (plan.has_rows()) {
    if (plan.prefills.empty()) {
      ++counters_.steps_decode;
    } else if (plan.decodes.empty()) {
      ++counters_.steps_prefill;
    } else {
      ++counters_.steps_mixed;
    }
  }
  counters_.tiles_encoded += static_cast<uint64_t>(plan.tiles_encoded);
  counters_.coded_block_reads += static_cast<uint64_t>(plan.coded_reads);
}

}  // namespace kvarn
