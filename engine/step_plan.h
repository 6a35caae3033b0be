// What one step does, in ids: made by the scheduler, turned into flat arrays for the runner.
#pragma once

#include <cstdint>
#include <utility>
#include <vector>

#include "engine/block_manager.h"
#include "engine/sequence.h"
#include "engine/step_batch.h"

namespace kvarn {

// Consecutive positions of one sequence: a decode row, or a prefill chunk, which starts at a block
// border and ends at one or at the last token.
struct PlannedRows {
  Sequence* sequence;
  int32_t first_position;
  int32_t num_rows;
  bool sample;  // the last row's logits choose the next token
};

// A full exact block that is coded before anything else in the step.
struct PlannedEncode {
  BlockId block;
  EncodeTile tile;
  std::vector<BlockId> pinned;  // held until the step is published, where no sequence holds them
};

struct StepPlan {
  uint64_t step = 0;
  std::vector<PlannedEncode> encodes;
  std::vector<PlannedRows> decodes, prefills;
  int32_t num_rows = 0, prefill_rows = 0;
  int64_t coded_reads = 0;                               // (row, block) pairs read coded
  int64_t tiles_encoded = 0;                             // before the step and inside its layers
  std::vector<std::pair<RequestId, int32_t>> preempted;  // request, choice

  bool has_rows() const { return num_rows > 0; }
  bool empty() const { return num_rows == 0 && encodes.empty(); }
};

// Fills `batch`, which borrows token vectors of the plan's sequences.
void build_step_batch(const StepPlan& plan, const BlockManager& blocks, ReadingRule rule,
                      StepBatch& batch);

}  // namespace kvarn
