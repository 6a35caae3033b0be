// Who runs in the next step. Owns every sequence; decides by ids alone, so it is tested without a
// model. plan_step() takes pages and names the work; complete_step() or fail_step() applies what
// the runner made of it. Between the two nothing else may be called but the const members.
//
// Invariants: running sequences are sorted by (priority, arrival, choice), and the last is
// preempted first, so the first always gets on. Pages left for anybody >= one per running sequence
// (the reserve of block_manager.h) wherever blocks are coded.
//
// Engine thread only.
#pragma once

#include <chrono>
#include <cstdint>
#include <memory>
#include <set>
#include <string>
#include <tuple>
#include <unordered_map>
#include <utility>
#include <vector>

#include "engine/block_manager.h"
#include "engine/model_runner.h"
#include "engine/request.h"
#include "engine/sequence.h"
#include "engine/step_plan.h"

namespace kvarn {

struct SchedulerLimits {
  int max_num_seqs = 256;
  int token_budget = 512;     // of a step; at least max_num_seqs + 128
  int max_model_len = 0;      // prompt + output of a sequence; its peak fits the pool
  bool use_priority = false;  // else every priority counts as 0
  std::chrono::duration<double> max_queue_time{0};  // 0: no limit
};

// Ever since start.
struct SchedulerCounters {
  uint64_t steps_prefill = 0, steps_decode = 0, steps_mixed = 0;
  uint64_t prompt_tokens = 0, prompt_tokens_cached = 0, generation_tokens = 0;
  uint64_t prefix_queries = 0, prefix_hits = 0;  // tokens, at a sequence's first start
  uint64_t preemptions = 0, tiles_encoded = 0, coded_block_reads = 0;
};

struct OutgoingEvent {
  std::shared_ptr<EventSink> sink;
  RequestId id;
  EngineEvent event;
};

class Scheduler {
 public:
  // `blocks` must outlive the scheduler.
  Scheduler(const SchedulerLimits& limits, BlockManager& blocks);

  // The request was checked: n >= 1, a prompt of 1 token at least, prompt + max_tokens within
  // max_model_len, a sink.
  void add(EngineRequest request, TimePoint now);
  // Takes a request, or one choice of it, out of the schedule and gives up its blocks. Unknown ids
  // are ignored. The events tell the request's sink (none for a choice).
  std::vector<OutgoingEvent> end_request(RequestId id, const Status& why);
  void end_choice(RequestId id, int32_t choice);
  // Ends what waited or ran for too long.
  std::vector<OutgoingEvent> end_expired(TimePoint now);
  // Every request gets `why` as its last event now, while a step may still run on its blocks. They
  // leave the schedule by end_request().
  std::vector<OutgoingEvent> answer_all(const Status& why);
  std::vector<RequestId> request_ids() const;

  StepPlan plan_step(TimePoint now);
  // `result` is the runner's answer to `plan`, with finite logits.
  std::vector<OutgoingEvent> complete_step(const StepPlan& plan, StepResult result);
  // The step's requests end with `why`; blocks it was to write or encode are forgotten.
  std::vector<OutgoingEvent> fail_step(const StepPlan& plan, const Status& why);

  // Takes a running sequence off its blocks; it prefills again later. False where it does not run.
  bool preempt(SequenceId id);
  void set_token_budget(int tokens) { limits_.token_budget = tokens; }

  bool idle() const { return requests_.empty(); }
  int64_t num_running() const { return static_cast<int64_t>(running_.size()); }
  int64_t num_waiting() const { return static_cast<int64_t>(waiting_.size()); }
  int64_t num_deferred() const { return num_deferred_; }
  int64_t num_unstarted() const { return num_unstarted_; }  // never left the queue
  const std::vector<Sequence*>& running() const { return running_; }
  const SchedulerCounters& counters() const { return counters_; }

 private:
  // Arrival order within a priority.
  static auto rank(const Sequence& s) {
    return std::tuple(s.request->request.priority, s.request->arrival, s.choice);
  }
  struct Earlier {
    bool operator()(const Sequence* a, const Sequence* b) const { return rank(*a) < rank(*b); }
  };

  // scheduler.cpp: membership
  void start_running(Sequence& s);
  void stop_running(Sequence& s);  // its blocks go; the state is the caller's to set
  void make_waiting(Sequence& s);
  void remove(Sequence& s);  // out of whichever list, and destroys it
  void preempt_running(Sequence& s, StepPlan* plan);
  void let_siblings_in(RequestState& request);
  void update_reserve();

  // scheduler_plan.cpp
  void plan_decodes(StepPlan& plan);
  void plan_prefills(StepPlan& plan, TimePoint now);
  void plan_encodes_of_unused_blocks(StepPlan& plan);
  bool try_append_slot(Sequence& s, StepPlan& plan);
  void encode_last_block(Sequence& s, int32_t num_blocks, StepPlan& plan);
  Sequence* next_prefill(const StepPlan& plan, bool may_admit);
  bool try_admit(Sequence& s, StepPlan& plan, TimePoint now);
  bool try_plan_chunk(Sequence& s, StepPlan& plan);
  int64_t pages_of_unfinished_prefills() const;
  void add_rows(StepPlan& plan, std::vector<PlannedRows>& to, const PlannedRows& rows);

  // scheduler_publish.cpp
  void publish_full_blocks(Sequence& s);
  void publish_sequence(const PlannedRows& rows, SampledToken* sampled,
                        std::vector<OutgoingEvent>& events);
  void count_step(const StepPlan& plan);

  SchedulerLimits limits_;
  BlockManager& blocks_;
  std::unordered_map<RequestId, std::unique_ptr<RequestState>> requests_;
  std::vector<Sequence*> running_;  // sorted by rank()
  std::set<Sequence*, Earlier> waiting_;
  std::unordered_map<std::string, uint64_t> tenant_turn_;  // the last turn it had; of live tenants
  std::unordered_map<std::string, int64_t> tenant_requests_;
  int64_t num_deferred_ = 0, num_unstarted_ = 0;
  uint64_t next_arrival_ = 0, next_turn_ = 1, step_ = 0;
  SequenceId next_sequence_id_ = 1;
  SchedulerCounters counters_;
};

}  // namespace kvarn
