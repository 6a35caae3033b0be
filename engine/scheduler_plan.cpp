// plan_step(): decodes first, then prefill chunks in what is left of the token budget.
#include <algorithm>
#include <optional>
#include <tuple>

#include "engine/kv_capacity.h"
#include "engine/scheduler.h"
#include "kernels/core/check.h"

namespace kvarn {

StepPlan Scheduler::plan_step(TimePoint now) {
  blocks_.begin_step();
  StepPlan plan;
  plan.step = ++step_;
  plan_decodes(plan);
  plan_prefills(plan, now);
  // Nothing fits although sequences hold pages: unfinished prefills stand in each other's way.
  while (plan.empty() && running_.size() > 1) {
    preempt_running(*running_.back(), &plan);
    plan.step = ++step_;  // everyone is looked at again
    plan_prefills(plan, now);
  }
  plan_encodes_of_unused_blocks(plan);
  CHECK(!plan.empty() || (running_.empty() && waiting_.empty()),
        "submit() refused what can never fit, so something can run");
  return plan;
}

// Decodes go first: they hold blocks already, and a skipped step is a pause some reader sees.
void Scheduler::plan_decodes(StepPlan& plan) {
  for (size_t i = 0; i < running_.size(); ++i) {
    Sequence& s = *running_[i];
    if (s.state != SequenceState::kDecoding) continue;
    if (plan.num_rows >= limits_.token_budget) return;  // only with budgets that tests lower
    while (!try_append_slot(s, plan)) {
      const bool was_last = i + 1 == running_.size();
      preempt_running(*running_.back(), &plan);  // the newest has the least work to repeat
      if (was_last) return;
    }
    s.planned_in = plan.step;
    add_rows(plan, plan.decodes, {&s, s.num_computed, 1, true});
  }
}

bool Scheduler::try_append_slot(Sequence& s, StepPlan& plan) {
  const int32_t position = s.num_computed;
  const int32_t block = position / kBlockTokens;
  encode_last_block(s, block, plan);
  if (position % kBlockTokens != 0) {
    return blocks_.try_grow(s.blocks.back(), position % kBlockTokens + 1);
  }
  const BlockId id = blocks_.try_new_block(block, 1);
  if (id == kNoBlock) return false;
  s.blocks.push_back(id);
  return true;
}

// Queries from position 128 * num_blocks on read these blocks coded. All but the last are coded
// already: nobody feeds a position beyond a block before it is, and publish() never trades a record
// for exact rows.
void Scheduler::encode_last_block(Sequence& s, int32_t num_blocks, StepPlan& plan) {
  if (!blocks_.layout().coded() || num_blocks <= kSinkBlocks) return;
  const BlockId id = s.blocks[static_cast<size_t>(num_blocks - 1)];
  if (blocks_.block(id).coded) return;
  const std::optional<EncodeTile> tile = blocks_.try_encode(id);
  CHECK(tile.has_value(), "a running sequence has its reserve page");
  plan.encodes.push_back({id, *tile, {}});
  ++plan.tiles_encoded;
}

void Scheduler::plan_prefills(StepPlan& plan, TimePoint now) {
  // After a preemption nobody is let in who would take the pages right away.
  bool may_admit = plan.preempted.empty() || running_.empty();
  while (Sequence* const s =
             next_prefill(plan, may_admit && num_running() < limits_.max_num_seqs)) {
    if (s->state == SequenceState::kWaiting && !try_admit(*s, plan, now)) {
      // Whoever does not fit is not overtaken in the queue, else a long prompt would starve. Those
      // that have begun go on: they hold the pages that it waits for.
      may_admit = false;
      continue;
    }
    if (!try_plan_chunk(*s, plan)) return;
  }
}

// By priority, then in turn between tenants, then by arrival. A sequence gets one chunk a step.
Sequence* Scheduler::next_prefill(const StepPlan& plan, bool may_admit) {
  Sequence* best = nullptr;
  uint64_t best_turn = 0;
  const bool one_tenant = tenant_requests_.size() <= 1;
  // Returns false once nothing behind `s` can be better.
  const auto consider = [&](Sequence* s) {
    if (s->state == SequenceState::kDecoding || s->planned_in == plan.step) return true;
    const int32_t priority = s->request->request.priority;
    if (best != nullptr && priority > best->request->request.priority) return false;
    const auto turn_it = tenant_turn_.find(s->request->request.tenant);
    const uint64_t turn = turn_it == tenant_turn_.end() ? 0 : turn_it->second;
    if (best == nullptr || std::tuple(priority, turn, s->request->arrival, s->choice) <
                               std::tuple(best->request->request.priority, best_turn,
                                          best->request->arrival, best->choice)) {
      best = s;
      best_turn = turn;
    }
    return !one_tenant;
  };
  for (Sequence* s : running_) {
    if (!consider(s)) break;
  }
  if (!may_admit) return best;
  for (Sequence* s : waiting_) {
    if (!consider(s)) break;
  }
  return best;
}

// Lets `s` out of the queue if its whole prefill fits beside those that have begun.
bool Scheduler::try_admit(Sequence& s, StepPlan& plan, TimePoint now) {
  const KvLayout& layout = blocks_.layout();
  std::vector<BlockId> hits =
      blocks_.find_prefix(s.tokens, max_hit_blocks(s.num_tokens()), s.request->request.cache_salt);
  for (const BlockId id : hits) blocks_.acquire(id);
  int64_t freed_by_encode = 0;
  if (!hits.empty()) {
    const Block& last = blocks_.block(hits.back());
    if (!last.coded && is_coded_block(layout, last.index, last.num_tokens)) {
      const int64_t prefilling = std::count_if(running_.begin(), running_.end(), [](Sequence* r) {
        return r->state == SequenceState::kPrefilling;
      });
      if (blocks_.encode_targets() > prefilling) {  // those may need a target each
        freed_by_encode = last.num_pages - 1;
      } else {
        blocks_.release(hits.back());
        hits.pop_back();
      }
    }
  }
  const auto first_position = static_cast<int32_t>(hits.size()) * kBlockTokens;
  const int32_t rows_left = s.num_tokens() - first_position;
  const int32_t budget = limits_.token_budget - plan.num_rows;
  const int64_t reserve = layout.coded() ? num_running() + 1 : 0;
  const int64_t needed =
      pages_after_prefill(layout, s.num_tokens()) - pages_after_prefill(layout, first_position);
  const int64_t left = blocks_.available_pages() + freed_by_encode - reserve;
  if ((rows_left > budget && budget < kBlockTokens) ||
      needed + pages_of_unfinished_prefills() > left) {
    blocks_.release(hits);
    return false;
  }
  if (!s.started) {
    counters_.prefix_queries += static_cast<uint64_t>(s.prompt_tokens);
    counters_.prefix_hits += static_cast<uint64_t>(first_position);
    if (!s.request->scheduled_at) {
      s.request->scheduled_at = now;
      s.request->cached_tokens = first_position;
    }
  }
  s.blocks = std::move(hits);
  s.num_computed = first_position;
  s.num_published = static_cast<int32_t>(s.blocks.size());
  start_running(s);
  return true;
}

bool Scheduler::try_plan_chunk(Sequence& s, StepPlan& plan) {
  s.planned_in = plan.step;
  const int32_t first = s.num_computed;
  const int32_t budget = limits_.token_budget - plan.num_rows;
  int32_t end = s.num_tokens();
  if (end - first > budget) end = first + budget / kBlockTokens * kBlockTokens;
  if (end <= first) return false;
  encode_last_block(s, first / kBlockTokens, plan);
  for (int32_t position = first; position < end; position += kBlockTokens) {
    const BlockId id =
        blocks_.try_new_block(position / kBlockTokens, std::min(kBlockTokens, end - position));
    if (id == kNoBlock) {
      end = position;  // decodes took the pages meanwhile: the rest waits
      break;
    }
    s.blocks.push_back(id);
  }
  if (end == first) return false;
  tenant_turn_[s.request->request.tenant] = next_turn_++;
  const bool sample = end == s.num_tokens() && s.request->request.stop.max_tokens > 0;
  add_rows(plan, plan.prefills, {&s, first, end - first, sample});
  plan.prefill_rows += end - first;
  if (blocks_.layout().coded()) {
    // A chunk that ends inside the sink encodes nothing.
    plan.tiles_encoded +=
        std::max(end / kBlockTokens - std::max(first / kBlockTokens, kSinkBlocks), 0);
  }
  return true;
}

int64_t Scheduler::pages_of_unfinished_prefills() const {
  const KvLayout& layout = blocks_.layout();
  int64_t pages = 0;
  for (const Sequence* s : running_) {
    if (s->state != SequenceState::kPrefilling) continue;
    const auto planned = static_cast<int64_t>(s->blocks.size()) * kBlockTokens;
    if (planned >= s->num_tokens()) continue;
    pages += pages_after_prefill(layout, s->num_tokens()) - pages_after_prefill(layout, planned);
  }
  return pages;
}

// Blocks that ended sequences left exact. Last, so that no row of this step lacks their target; no
// more than buffers for two of each sequence hold (make_step_limits), the rest waits.
void Scheduler::plan_encodes_of_unused_blocks(StepPlan& plan) {
  for (const BlockId id : blocks_.take_blocks_to_encode()) {
    // An earlier target of this loop may have evicted it; its id was not given out since.
    if (blocks_.block(id).num_pages == 0 || blocks_.block(id).coded) continue;
    std::vector<BlockId> pinned = blocks_.acquire_chain(id);
    const bool room = plan.encodes.size() < 2 * static_cast<size_t>(limits_.max_num_seqs) &&
                      blocks_.encode_targets() > 0 && blocks_.available_pages() > blocks_.reserve();
    const std::optional<EncodeTile> tile = room ? blocks_.try_encode(id) : std::nullopt;
    if (!tile) {
      blocks_.release(pinned);  // asks again in the next step
      continue;
    }
    plan.encodes.push_back({id, *tile, std::move(pinned)});
    ++plan.tiles_encoded;
  }
}

void Scheduler::add_rows(StepPlan& plan, std::vector<PlannedRows>& to, const PlannedRows& rows) {
  to.push_back(rows);
  plan.num_rows += rows.num_rows;
  if (!blocks_.layout().coded()) return;
  for (int32_t row = 0; row < rows.num_rows; ++row) {
    plan.coded_reads += std::max(0, (rows.first_position + row) / kBlockTokens - kSinkBlocks);
  }
}

}  // namespace kvarn
