#include "engine/step_batch.h"

#include "engine/step_plan.h"
#include "kernels/core/check.h"

namespace kvarn {
namespace {

void add_rows(const PlannedRows& rows, const BlockManager& blocks, StepBatch& batch) {
  const KvLayout& layout = blocks.layout();
  const Sequence& sequence = *rows.sequence;
  const int32_t first_row = batch.num_rows();
  batch.sequences.push_back({.first_row = first_row,
                             .num_rows = rows.num_rows,
                             .first_position = rows.first_position,
                             .first_block = static_cast<int32_t>(batch.block_pages.size())});
  for (const BlockId id : sequence.blocks) batch.block_pages.push_back(blocks.block(id).pages);

  const int32_t end = rows.first_position + rows.num_rows;
  CHECK(end <= sequence.num_tokens(), "only known tokens are fed");
  for (int32_t position = rows.first_position; position < end; ++position) {
    const Block& block =
        blocks.block(sequence.blocks[static_cast<size_t>(position / kBlockTokens)]);
    const int32_t in_block = position % kBlockTokens;
    batch.token_ids.push_back(sequence.tokens[static_cast<size_t>(position)]);
    batch.positions.push_back(position);
    if (!block.coded) {
      const PageId page = block.pages[static_cast<size_t>(in_block / layout.exact_rows)];
      batch.slots.push_back(int64_t{page} * layout.exact_rows + in_block % layout.exact_rows);
      continue;
    }
    batch.slots.push_back(
        -1);  // a complete tile: coded from this step's rows, stored nowhere exact
    if (in_block == 0) {
      EncodeTile tile{.first_row = first_row + position - rows.first_position,
                      .source_pages = {},
                      .target_page = block.pages[0]};
      tile.source_pages.fill(kNoPage);
      batch.encode_in_layer.push_back(tile);
    }
  }
  if (rows.sample) {
    batch.logit_rows.push_back(batch.num_rows() - 1);
    batch.sampling.push_back(sampling_row(sequence));
  }
}

}  // namespace

void build_step_batch(const StepPlan& plan, const BlockManager& blocks, ReadingRule rule,
                      StepBatch& batch) {
  // Cleared one by one: capacities stay, so that a step of a running engine allocates little.
  batch.token_ids.clear();
  batch.positions.clear();
  batch.slots.clear();
  batch.sequences.clear();
  batch.block_pages.clear();
  batch.encode_before.clear();
  batch.encode_in_layer.clear();
  batch.logit_rows.clear();
  batch.sampling.clear();
  batch.rule = rule;
  batch.num_decode_sequences = static_cast<int>(plan.decodes.size());
  for (const PlannedEncode& encode : plan.encodes) batch.encode_before.push_back(encode.tile);
  for (const PlannedRows& rows : plan.decodes) add_rows(rows, blocks, batch);
  for (const PlannedRows& rows : plan.prefills) add_rows(rows, blocks, batch);
}

}  // namespace kvarn
