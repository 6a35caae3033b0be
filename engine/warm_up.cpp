#include "engine/warm_up.h"

#include <algorithm>

#include "engine/kv_capacity.h"

namespace kvarn {
namespace {

SamplingRow greedy() {
  SamplingRow row;
  row.temperature = 0;
  return row;
}

EncodeTile tile_from(int32_t first_row, const BlockPages& sources, int32_t target) {
  return {.first_row = first_row, .source_pages = sources, .target_page = target};
}

}  // namespace

StepBatch warm_up_row() {
  StepBatch batch;
  batch.token_ids = {0};
  batch.positions = {0};
  batch.slots = {-1};
  batch.sequences = {{.first_row = 0, .num_rows = 1, .first_position = 0, .first_block = 0}};
  BlockPages none;
  none.fill(-1);
  batch.block_pages = {none};
  batch.logit_rows = {0};
  batch.sampling = {greedy()};
  return batch;
}

StepBatch warm_up_prefill(const KvLayout& layout, int rows, int max_len, int max_sequences) {
  BlockPages none, exact, coded;
  none.fill(-1);
  exact = coded = none;
  for (int i = 0; i < layout.pages_per_exact_block; ++i) exact[static_cast<size_t>(i)] = i;
  coded[0] = layout.pages_per_exact_block;

  StepBatch batch;
  for (int n = 0; n < max_sequences && batch.num_rows() < rows; ++n) {
    const int32_t first_row = batch.num_rows();
    const int length = std::min(max_len, rows - first_row);
    batch.sequences.push_back({.first_row = first_row,
                               .num_rows = length,
                               .first_position = 0,
                               .first_block = static_cast<int32_t>(batch.block_pages.size())});
    for (int first = 0; first < length; first += kBlockTokens) {
      const bool is_coded =
          is_coded_block(layout, first / kBlockTokens, std::min(kBlockTokens, length - first));
      batch.block_pages.push_back(is_coded ? coded : exact);
      if (is_coded && batch.encode_in_layer.empty()) {
        batch.encode_in_layer = {tile_from(first_row + first, none, coded[0])};
      }
    }
    for (int position = 0; position < length; ++position) {
      batch.token_ids.push_back(0);
      batch.positions.push_back(position);
      batch.slots.push_back(-1);
    }
  }
  if (layout.coded()) batch.encode_before = {tile_from(-1, exact, coded[0])};
  batch.logit_rows = {batch.num_rows() - 1};
  batch.sampling = {greedy()};
  return batch;
}

std::vector<int> warm_up_sizes(int max_rows) {
  constexpr int kSmallest = 16;
  std::vector<int> sizes;
  for (int octave = kSmallest; octave < max_rows; octave *= 2) {
    sizes.push_back(octave);
    if (octave / 2 * 3 < max_rows) sizes.push_back(octave / 2 * 3);
  }
  sizes.push_back(max_rows);
  return sizes;
}

}  // namespace kvarn
