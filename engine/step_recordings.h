// Decode-only steps as recordings (CUDA graphs), one for each batch size of a short list. A batch
// is filled up to the next size with rows that attend to nothing and are stored nowhere; what is
// recorded reads everything that changes from step to step out of the backend's fixed arrays.
// Worker thread only.
#pragma once

#include <functional>
#include <memory>
#include <vector>

#include "engine/step_batch.h"
#include "kernels/backend.h"

namespace kvarn {

// Batch sizes that are recorded, ascending: small ones dense, as a row more costs more there. The
// largest is max_num_seqs or 256.
std::vector<int> recorded_batch_sizes(int max_num_seqs);

class StepRecordings {
 public:
  // Launches forward and sampling of an open step. Called again by a replay where the backend
  // records by keeping the call.
  using Launch = std::function<void(const StepInput& input)>;

  StepRecordings(Backend& backend, int max_num_seqs);

  // Runs a step of filler rows for each size without recording it: a recording must not meet a
  // kernel or a plan for the first time.
  void warm_up(const Launch& launch);
  // Records all sizes. Afterwards `launch` must never see other addresses.
  void record(const Launch& launch);

  // The recorded size that this batch runs at, or 0: it has prompt rows, rows without logits or
  // more rows than were recorded, or nothing was recorded.
  int size_for(const StepBatch& batch) const;
  // The batch filled up to `size` rows; borrows from the batch and from *this until the next call.
  StepInput filled(const StepBatch& batch, int size);
  void replay(int size);

 private:
  StepInput fillers(int size);

  Backend& backend_;
  std::vector<int> sizes_;
  std::vector<std::unique_ptr<Recording>> recordings_;  // one per size, or empty
  // Rows of the batch and then fillers.
  std::vector<int32_t> token_ids_, positions_, logit_rows_;
  std::vector<int64_t> slots_;
  std::vector<AttentionSequence> sequences_;
};

}  // namespace kvarn
