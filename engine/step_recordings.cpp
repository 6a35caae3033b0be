#include "engine/step_recordings.h"

#include <algorithm>
#include <numeric>

#include "kernels/core/check.h"

namespace kvarn {

std::vector<int> recorded_batch_sizes(int max_num_seqs) {
  constexpr int kSizes[] = {1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 160, 192, 224, 256};
  const int largest = std::min(max_num_seqs, kSizes[std::size(kSizes) - 1]);
  std::vector<int> sizes;
  for (const int size : kSizes) {
    if (size < largest) sizes.push_back(size);
  }
  sizes.push_back(largest);
  return sizes;
}

StepRecordings::StepRecordings(Backend& backend, int max_num_seqs)
    : backend_(backend), sizes_(recorded_batch_sizes(max_num_seqs)) {
  const auto rows = static_cast<size_t>(sizes_.back());
  token_ids_.reserve(rows);
  positions_.reserve(rows);
  slots_.reserve(rows);
  sequences_.reserve(rows);
  logit_rows_.resize(rows);
  std::iota(logit_rows_.begin(), logit_rows_.end(), 0);
}

void StepRecordings::warm_up(const Launch& launch) {
  for (const int size : sizes_) {
    launch(backend_.begin_step(fillers(size), {}));
    backend_.end_step({});
  }
}

void StepRecordings::record(const Launch& launch) {
  for (const int size : sizes_) {
    const StepInput input = backend_.begin_step(fillers(size), {});
    std::unique_ptr<Recording> recording = backend_.record([launch, input] { launch(input); });
    backend_.end_step({});
    if (recording == nullptr) return;  // this backend gains nothing by it
    recordings_.push_back(std::move(recording));
  }
}

int StepRecordings::size_for(const StepBatch& batch) const {
  const int rows = batch.num_rows();
  if (recordings_.empty() || rows == 0 || rows > sizes_.back() ||
      batch.num_decode_sequences != rows || batch.logit_rows.size() != batch.token_ids.size()) {
    return 0;
  }
  return *std::lower_bound(sizes_.begin(), sizes_.end(), rows);
}

StepInput StepRecordings::fillers(int size) { return filled(StepBatch{}, size); }

StepInput StepRecordings::filled(const StepBatch& batch, int size) {
  const auto rows = static_cast<size_t>(size);
  token_ids_ = batch.token_ids;
  positions_ = batch.positions;
  slots_ = batch.slots;
  sequences_ = batch.sequences;
  token_ids_.resize(rows, 0);
  positions_.resize(rows, 0);
  slots_.resize(rows, -1);
  while (sequences_.size() < rows) {
    sequences_.push_back({.first_row = static_cast<int32_t>(sequences_.size()),
                          .num_rows = 0,
                          .first_position = 0,
                          .first_block = 0});
  }
  return {.token_ids = token_ids_,
          .positions = positions_,
          .slots = slots_,
          .sequences = sequences_,
          .num_decode_sequences = size,
          .block_pages = batch.block_pages,
          .encode_before = batch.encode_before,
          .encode_in_layer = {},
          .logit_rows = std::span<const int32_t>(logit_rows_).first(rows),
          .rule = batch.rule};
}

void StepRecordings::replay(int size) {
  const auto at = std::lower_bound(sizes_.begin(), sizes_.end(), size);
  CHECK(at != sizes_.end() && *at == size, "only recorded sizes can be replayed");
  recordings_[static_cast<size_t>(at - sizes_.begin())]->replay();
}

}  // namespace kvarn
