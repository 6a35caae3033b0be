#include "server/commands/model_session.h"

#include <algorithm>
#include <numeric>

namespace kvarn::commands {
namespace {

// Exact blocks before a prefill's tiles are coded, the coded ones, and a target for one encode.
int64_t pages_needed(const KvLayout& layout, int max_tokens) {
  const int64_t blocks = (max_tokens + kBlockTokens - 1) / kBlockTokens;
  const int64_t exact_blocks = layout.coded() ? std::min<int64_t>(blocks, kSinkBlocks + 1) : blocks;
  return exact_blocks * layout.pages_per_exact_block + (blocks - exact_blocks) + 1;
}

size_t logits_bytes(int vocab, int rows) {  // as Arena rounds
  return (static_cast<size_t>(vocab) * static_cast<size_t>(rows) * sizeof(float) + 63) / 64 * 64;
}

EncodeTile tile_of(int32_t first_row, int32_t target_page) {
  EncodeTile tile{.first_row = first_row, .source_pages = {}, .target_page = target_page};
  tile.source_pages.fill(-1);
  return tile;
}

}  // namespace

ModelSession::ModelSession(Model& model, Backend& backend, KvFormat format, ReadingRule rule,
                           int max_tokens, int chunk)
    : model_(model),
      backend_(backend),
      rule_(rule),
      chunk_(chunk),
      limits_(make_step_limits(model.config(), make_kv_layout(format, model.config().head_dim),
                               max_tokens, chunk, 1, chunk)),
      pool_(backend, make_kv_layout(format, model.config().head_dim), model.config().num_layers,
            model.config().num_kv_heads,
            pages_needed(make_kv_layout(format, model.config().head_dim), max_tokens)),
      arena_(backend.allocate(model.workspace_bytes(chunk, chunk) +
                              logits_bytes(model.config().vocab_size, chunk))) {
  CHECK(chunk % kBlockTokens == 0, "chunks end at block borders");
  reset();
}

void ModelSession::reset() {
  length_ = 0;
  blocks_.clear();
  free_.resize(static_cast<size_t>(pool_.num_pages()));
  std::iota(free_.rbegin(), free_.rend(), 0);
}

int32_t ModelSession::take_page() {
  CHECK(!free_.empty(), "the session is longer than it was made for");
  const int32_t page = free_.back();
  free_.pop_back();
  return page;
}

// At a border the block before it is read coded from now on.
void ModelSession::plan_encode_of_full_tail() {
  const int block_idx = length_ / kBlockTokens - 1;
  if (!pool_.layout().coded() || length_ % kBlockTokens != 0 || block_idx < kSinkBlocks) return;
  Block& block = blocks_[static_cast<size_t>(block_idx)];
  if (block.coded) return;
  EncodeTile tile = tile_of(-1, take_page());
  std::copy(block.pages.begin(), block.pages.end(), tile.source_pages.begin());
  free_.insert(free_.end(), block.pages.begin(), block.pages.end());
  block = {{tile.target_page}, true};
  encode_before_.push_back(tile);
}

// A row of a step that ends before position `end`: into a page of its own, or nowhere if its tile
// is complete in this step and so coded from the step's rows.
void ModelSession::plan_row(int position, int end) {
  const KvLayout& layout = pool_.layout();
  const int block_idx = position / kBlockTokens, row = position % kBlockTokens;
  if (row == 0) {
    Block& block = blocks_.emplace_back();
    block.coded =
        layout.coded() && block_idx >= kSinkBlocks && kBlockTokens * (block_idx + 1) <= end;
    if (block.coded) {
      block.pages = {take_page()};
      encode_in_layer_.push_back(tile_of(position - length_, block.pages[0]));
    }
  }
  Block& block = blocks_.back();
  positions_.push_back(position);
  if (block.coded) {
    slots_.push_back(-1);
    return;
  }
  if (row % layout.exact_rows == 0) block.pages.push_back(take_page());
  slots_.push_back(int64_t{block.pages.back()} * layout.exact_rows + row % layout.exact_rows);
}

std::span<const float> ModelSession::feed(std::span<const int32_t> tokens, int num_logits) {
  CHECK(tokens.size() == 1 || length_ % kBlockTokens == 0, "a chunk starts at a block border");
  positions_.clear();
  slots_.clear();
  encode_before_.clear();
  encode_in_layer_.clear();
  plan_encode_of_full_tail();
  const auto rows = static_cast<int32_t>(tokens.size());
  for (int32_t i = 0; i < rows; ++i) plan_row(length_ + i, length_ + rows);

  std::vector<BlockPages> table(blocks_.size());
  for (size_t i = 0; i < blocks_.size(); ++i) {
    table[i].fill(-1);
    std::copy(blocks_[i].pages.begin(), blocks_[i].pages.end(), table[i].begin());
  }
  std::vector<int32_t> logit_rows(static_cast<size_t>(num_logits));
  std::iota(logit_rows.begin(), logit_rows.end(), rows - num_logits);
  const int64_t vocab_size = model_.config().vocab_size;
  logits_.resize(static_cast<size_t>(num_logits * vocab_size));
  const AttentionSequence sequence{
      .first_row = 0, .num_rows = rows, .first_position = length_, .first_block = 0};
  StepInput input;
  input.token_ids = tokens;
  input.positions = positions_;
  input.slots = slots_;
  input.sequences = {&sequence, 1};
  input.num_decode_sequences = rows == 1 ? 1 : 0;
  input.block_pages = table;
  input.encode_before = encode_before_;
  input.encode_in_layer = encode_in_layer_;
  input.logit_rows = logit_rows;
  input.rule = rule_;
  arena_.reset();
  backend_.reserve(limits_);  // sessions of other formats share the backend
  const Tensor logits = arena_.tensor(DType::kF32, {num_logits, vocab_size});
  model_.forward(backend_.begin_step(input, {}), pool_.view(), arena_, logits, nullptr);
  backend_.end_step({});
  backend_.download(logits.raw(), logits.bytes(), logits_.data());
  length_ += rows;
  return logits_;
}

}  // namespace kvarn::commands
