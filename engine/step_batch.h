// StepPlan (ids and decisions, made by the scheduler) -> StepBatch (flat arrays, read by the
// runner).
#pragma once

#include <cstdint>
#include <vector>

#include "kernels/sampling.h"
#include "kernels/step_input.h"

namespace kvarn {

// Owns every array of one step. Sampling rows borrow spans of the sequences' token vectors, which
// stay untouched until the step's result is published.
struct StepBatch {
  std::vector<int32_t> token_ids, positions;  // [rows]
  std::vector<int64_t> slots;                 // [rows]
  std::vector<AttentionSequence> sequences;   // decodes first
  int num_decode_sequences = 0;
  std::vector<BlockPages> block_pages;
  std::vector<EncodeTile> encode_before, encode_in_layer;
  std::vector<int32_t> logit_rows;  // one per entry of `sampling`
  std::vector<SamplingRow> sampling;
  ReadingRule rule = ReadingRule::kPosition;

  int num_rows() const { return static_cast<int>(token_ids.size()); }
  StepInput step_input() const {
    return {token_ids,   positions,     slots,           sequences,  num_decode_sequences,
            block_pages, encode_before, encode_in_layer, logit_rows, rule};
  }
  void clear() { *this = {}; }
};

}  // namespace kvarn
