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

StepBatch warm_up_prefill(const KvLayout& layout, int rows) {
  BlockPages exact, coded;
  exact.fill(-1);
  coded.fill(-1);
  for (int i = 0; i < layout.pages_per_exact_block; ++i) exact[static_cast<size_t>(i)] = i;
  coded[0] = layout.pages_per_exact_block;

  StepBatch batch;
  for (int row = 0; row < rows; ++row) {
    batch.token_ids.push_back(0);
    batch.positions.push_back(row);
    batch.slots.push_back(-1);
  }
  batch.sequences = {{.first_row = 0, .num_rows = rows, .first_position = 0, .first_block = 0}};
  for (int first = 0; first < rows; first += kBlockTokens) {
    const bool is_coded =
        is_coded_block(layout, first / kBlockTokens, std::min(kBlockTokens, rows - first));
    batch.block_pages.push_back(is_coded ? coded : exact);
    if (is_coded && batch.encode_in_layer.empty()) {
      BlockPages none;
      none.fill(-1);
      batch.encode_in_layer = {tile_from(first, none, coded[0])};
    }
  }
  if (layout.coded()) batch.encode_before = {tile_from(-1, exact, coded[0])};
  batch.logit_rows = {rows - 1};
  batch.sampling = {greedy()};
  return batch;
}

}  // namespace kvarn
