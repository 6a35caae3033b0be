#include "tests/support/sequence_driver.h"

#include <algorithm>
#include <numeric>

namespace kvarn::test {
SequenceDriver::SequenceDriver(Model& model, Backend& backend, KvFormat format, int max_tokens,
                               int max_rows)
    : model_(model),
      backend_(backend),
      layout_(make_kv_layout(format, model.config().head_dim)),
      limits_(make_step_limits(model.config(), layout_, max_tokens, max_rows, 1, max_rows)),
      arena_(backend.allocate(model.workspace_bytes(max_rows, max_rows))),
      logits_(backend.allocate(static_cast<size_t>(max_rows) *
                               static_cast<size_t>(model.config().vocab_size) * sizeof(float))) {
  const ModelConfig& config = model.config();
  const int64_t pages = int64_t{max_tokens / kBlockTokens + 1} * layout_.pages_per_exact_block + 1;
  const auto layer_bytes = static_cast<size_t>(pages * config.num_kv_heads * layout_.page_bytes);
  pool_ = backend.allocate(layer_bytes * static_cast<size_t>(config.num_layers));
  for (int layer = 0; layer < config.num_layers; ++layer) {
    layers_.push_back({pool_.data() + static_cast<size_t>(layer) * layer_bytes, pages,
                       config.num_kv_heads, layout_});
  }
  for (int64_t page = 0; page < pages; ++page) free_.push_back(static_cast<int32_t>(page));
}

int32_t SequenceDriver::take_page() {
  CHECK(!free_.empty(), "the driver's pool is too small for this sequence");
  const int32_t page = free_.back();
  free_.pop_back();
  return page;
}

// The slot of a row that stays exact; takes the block's next page when this row opens it.
int64_t SequenceDriver::exact_slot(int position) {
  const int rows = layout_.exact_rows;
  Block& block = blocks_[static_cast<size_t>(position / kBlockTokens)];
  const int row = position % kBlockTokens;
  if (row % rows == 0) block.pages.push_back(take_page());
  return int64_t{block.pages.back()} * rows + row % rows;
}

// The decode at this border needs the block before it coded: into a new page, its own are free
// for this very step.
void SequenceDriver::encode_full_block(Step& step) {
  const int block_index = length_ / kBlockTokens - 1;
  if (!layout_.coded() || length_ % kBlockTokens != 0 || block_index < kSinkBlocks) return;
  Block& block = blocks_[static_cast<size_t>(block_index)];
  if (block.coded) return;
  EncodeTile tile{.first_row = -1, .source_pages = {}, .target_page = take_page()};
  tile.source_pages.fill(-1);
  std::copy(block.pages.begin(), block.pages.end(), tile.source_pages.begin());
  free_.insert(free_.end(), block.pages.begin(), block.pages.end());
  block = {{tile.target_page}, true};
  step.encode_before.push_back(tile);
}

std::vector<float> SequenceDriver::prefill(std::span<const int32_t> tokens) {
  CHECK(length_ % kBlockTokens == 0, "a chunk starts at a block border");
  Step step;
  encode_full_block(step);
  const int end = length_ + static_cast<int>(tokens.size());
  for (int position = length_; position < end; ++position) {
    const int block_index = position / kBlockTokens;
    if (position % kBlockTokens == 0) {
      Block& block = blocks_.emplace_back();
      block.coded =
          layout_.coded() && block_index >= kSinkBlocks && kBlockTokens * (block_index + 1) <= end;
      if (block.coded) {
        block.pages = {take_page()};
        EncodeTile tile{
            .first_row = position - length_, .source_pages = {}, .target_page = block.pages[0]};
        tile.source_pages.fill(-1);
        step.encode_in_layer.push_back(tile);
      }
    }
    step.positions.push_back(position);
    step.slots.push_back(blocks_.back().coded ? -1 : exact_slot(position));
  }
  return run(tokens, step, /*is_decode=*/false);
}

std::vector<float> SequenceDriver::decode(int32_t token) {
  Step step;
  encode_full_block(step);
  if (length_ % kBlockTokens == 0) blocks_.emplace_back();
  step.positions = {length_};
  step.slots = {exact_slot(length_)};
  return run({&token, 1}, step, /*is_decode=*/true);
}

std::vector<float> SequenceDriver::prefill_in_chunks(std::span<const int32_t> tokens, int chunk) {
  std::vector<float> logits;
  for (size_t at = 0; at < tokens.size(); at += static_cast<size_t>(chunk)) {
    const std::vector<float> part =
        prefill(tokens.subspan(at, std::min(static_cast<size_t>(chunk), tokens.size() - at)));
    logits.insert(logits.end(), part.begin(), part.end());
  }
  return logits;
}

std::vector<float> SequenceDriver::run(std::span<const int32_t> tokens, const Step& step,
                                       bool is_decode) {
  std::vector<BlockPages> table(blocks_.size());
  for (size_t i = 0; i < blocks_.size(); ++i) {
    table[i].fill(-1);
    std::copy(blocks_[i].pages.begin(), blocks_[i].pages.end(), table[i].begin());
  }
  const auto rows = static_cast<int32_t>(tokens.size());
  const AttentionSequence sequence{
      .first_row = 0, .num_rows = rows, .first_position = length_, .first_block = 0};
  std::vector<int32_t> logit_rows(tokens.size());
  std::iota(logit_rows.begin(), logit_rows.end(), 0);
  if (logit_rows_) logit_rows = *logit_rows_;
  const auto num_logits = static_cast<int64_t>(logit_rows.size());
  std::vector<float> logits(logit_rows.size() * static_cast<size_t>(model_.config().vocab_size));
  arena_.reset();
  backend_.reserve(limits_);
  const StepInput input{.token_ids = tokens,
                        .positions = step.positions,
                        .slots = step.slots,
                        .sequences = {&sequence, 1},
                        .num_decode_sequences = is_decode ? 1 : 0,
                        .block_pages = table,
                        .encode_before = step.encode_before,
                        .encode_in_layer = step.encode_in_layer,
                        .logit_rows = logit_rows,
                        .rule = ReadingRule::kPosition};
  const Tensor device_logits(logits_.data(), DType::kF32, {num_logits, model_.config().vocab_size});
  model_.forward(backend_.begin_step(input, {}), {layers_, layout_}, arena_, device_logits,
                 nullptr);
  backend_.end_step({});
  backend_.download(device_logits.raw(), device_logits.bytes(), logits.data());
  length_ += rows;
  tiles_encoded_ += static_cast<int64_t>(step.encode_before.size() + step.encode_in_layer.size());
  return logits;
}

}  // namespace kvarn::test
