// Membership: requests come, wait, run and leave. Planning is in scheduler_plan.cpp, what happens
// after a step in scheduler_publish.cpp.
#include "engine/scheduler.h"

#include <fmt/format.h>

#include <algorithm>

#include "kernels/core/check.h"

namespace kvarn {

// Cached blocks are coded, so a window of exact rows would be missing after a hit (docs/kvarn.md,
// "the price of W > 0").
static_assert(kWindowTokens == 0, "sharing and recompute need the window's exact rows");

Scheduler::Scheduler(const SchedulerLimits& limits, BlockManager& blocks)
    : limits_(limits), blocks_(blocks) {}

void Scheduler::add(EngineRequest request, TimePoint now) {
  const RequestId id = request.id;
  if (!limits_.use_priority) request.priority = 0;
  const auto n = static_cast<SequenceId>(request.n);
  auto state = make_request_state(std::move(request), next_arrival_++, now, next_sequence_id_);
  next_sequence_id_ += n;
  ++tenant_requests_[state->request.tenant];
  num_unstarted_ += static_cast<int64_t>(n);
  // Without a cache there is nothing to wait for: each prefills whole.
  const bool defer = blocks_.cache_enabled();
  for (const auto& sequence : state->sequences) {
    if (defer && sequence->choice > 0) {
      sequence->state = SequenceState::kDeferred;
      ++num_deferred_;
    } else {
      make_waiting(*sequence);
    }
  }
  const bool is_new = requests_.emplace(id, std::move(state)).second;
  CHECK(is_new, "request ids are unique");
}

std::vector<OutgoingEvent> Scheduler::end_request(RequestId id, const Status& why) {
  std::vector<OutgoingEvent> events;
  const auto it = requests_.find(id);
  if (it == requests_.end()) return events;
  RequestState& request = *it->second;
  if (!request.answered) events.push_back({request.request.sink, id, ErrorEvent{why}});
  request.answered = true;
  // Deferred siblings first, so that none is let in for nothing.
  while (!request.sequences.empty()) {
    const bool was_last = request.sequences.size() == 1;
    remove(*request.sequences.back());
    if (was_last) break;  // and the request with it
  }
  return events;
}

void Scheduler::end_choice(RequestId id, int32_t choice) {
  const auto it = requests_.find(id);
  if (it == requests_.end()) return;
  const auto& sequences = it->second->sequences;
  const auto found = std::find_if(sequences.begin(), sequences.end(),
                                  [&](const auto& s) { return s->choice == choice; });
  if (found != sequences.end()) remove(**found);
}

std::vector<OutgoingEvent> Scheduler::end_expired(TimePoint now) {
  std::vector<std::pair<RequestId, Status>> expired;
  for (const auto& [id, state] : requests_) {
    const std::chrono::duration<double> age = now - state->accepted_at;
    if (state->request.deadline && *state->request.deadline <= now) {
      expired.emplace_back(
          id,
          Status(StatusCode::kDeadlineExceeded, "deadline_exceeded",
                 fmt::format("the request's deadline passed {} after {:.1f} s",
                             state->scheduled_at ? "while it ran" : "in the queue", age.count())));
    } else if (!state->scheduled_at && limits_.max_queue_time.count() > 0 &&
               age > limits_.max_queue_time) {
      expired.emplace_back(
          id, Status(StatusCode::kResourceExhausted, "queue_timeout",
                     fmt::format("the request waited {:.1f} s in the queue, longer than {} s; try "
                                 "again later",
                                 age.count(), limits_.max_queue_time.count())));
    }
  }
  std::vector<OutgoingEvent> events;
  for (const auto& [id, why] : expired) {
    for (OutgoingEvent& event : end_request(id, why)) events.push_back(std::move(event));
  }
  return events;
}

std::vector<OutgoingEvent> Scheduler::answer_all(const Status& why) {
  std::vector<OutgoingEvent> events;
  for (const auto& [id, state] : requests_) {
    if (state->answered) continue;
    state->answered = true;
    events.push_back({state->request.sink, id, ErrorEvent{why}});
  }
  return events;
}

std::vector<RequestId> Scheduler::request_ids() const {
  std::vector<RequestId> ids;
  ids.reserve(requests_.size());
  for (const auto& entry : requests_) ids.push_back(entry.first);
  return ids;
}

bool Scheduler::preempt(SequenceId id) {
  const auto it =
      std::find_if(running_.begin(), running_.end(), [&](Sequence* s) { return s->id == id; });
  if (it == running_.end()) return false;
  preempt_running(**it, nullptr);
  return true;
}

void Scheduler::start_running(Sequence& s) {
  waiting_.erase(&s);
  if (!s.started) --num_unstarted_;
  s.started = true;
  s.state = SequenceState::kPrefilling;
  running_.insert(std::upper_bound(running_.begin(), running_.end(), &s, Earlier{}), &s);
  update_reserve();
}

void Scheduler::stop_running(Sequence& s) {
  running_.erase(std::find(running_.begin(), running_.end(), &s));
  update_reserve();
  blocks_.release(s.blocks);
  s.blocks.clear();
  s.num_computed = 0;
  s.num_published = 0;
}

void Scheduler::make_waiting(Sequence& s) {
  s.state = SequenceState::kWaiting;
  waiting_.insert(&s);
}

void Scheduler::preempt_running(Sequence& s, StepPlan* plan) {
  stop_running(s);
  make_waiting(s);
  ++counters_.preemptions;
  if (plan != nullptr) plan->preempted.push_back({s.request->request.id, s.choice});
}

void Scheduler::remove(Sequence& s) {
  RequestState& request = *s.request;
  if (s.running()) {
    stop_running(s);
  } else if (s.state == SequenceState::kWaiting) {
    waiting_.erase(&s);
  } else {
    --num_deferred_;
  }
  if (!s.started) --num_unstarted_;
  auto& siblings = request.sequences;
  siblings.erase(
      std::find_if(siblings.begin(), siblings.end(), [&](const auto& p) { return p.get() == &s; }));
  if (!siblings.empty()) {
    // The one whose prefill the others waited for may be gone: the next one prefills.
    const bool all_deferred = std::all_of(siblings.begin(), siblings.end(), [](const auto& p) {
      return p->state == SequenceState::kDeferred;
    });
    if (all_deferred) {
      --num_deferred_;
      make_waiting(*siblings.front());
    }
    return;
  }
  const auto tenant = tenant_requests_.find(request.request.tenant);
  if (--tenant->second == 0) {
    tenant_turn_.erase(tenant->first);
    tenant_requests_.erase(tenant);
  }
  requests_.erase(request.request.id);
}

void Scheduler::let_siblings_in(RequestState& request) {
  for (const auto& sibling : request.sequences) {
    if (sibling->state != SequenceState::kDeferred) continue;
    --num_deferred_;
    make_waiting(*sibling);
  }
}

void Scheduler::update_reserve() {
  blocks_.set_reserve(blocks_.layout().coded() ? static_cast<int64_t>(running_.size()) : 0);
}

}  // namespace kvarn
