// The arrays of one step, as kernels index them: rows of tokens, where their K and V go, and which
// pages to read. Plain views; whoever made the step owns the arrays. No request, no policy here.
#pragma once

#include <array>
#include <cstdint>
#include <span>

#include "kernels/kv_layout.h"

namespace kvarn {

// A run of consecutive positions of one sequence in this step.
struct AttentionSequence {
  int32_t first_row;  // in q, k_rows, v_rows, out
  int32_t num_rows;   // 1 in a decode; 0: a row that only fills a batch up, and attends to nothing
  int32_t first_position;  // of first_row; a multiple of 128 when num_rows > 1
  int32_t first_block;     // index into block_pages of the sequence's block 0
};
using BlockPages =
    std::array<int32_t, kMaxPagesPerBlock>;  // coded block: page in [0]; exact: in order, -1 unused

// A complete tile to encode. The source is either 128 consecutive rows of this step (prefill) or
// the exact pages of the block (decode, release).
struct EncodeTile {
  int32_t first_row;                                    // of the step; -1: from source_pages
  std::array<int32_t, kMaxPagesPerBlock> source_pages;  // used when first_row < 0
  int32_t target_page;                                  // never one of source_pages
};

struct StepInput {
  std::span<const int32_t> token_ids;  // [rows]
  std::span<const int32_t> positions;  // [rows]
  std::span<const int64_t> slots;      // [rows]: exact slot of each row, or -1 (KvWriteParams)
  // Decode sequences (one row each) come first, then prefill chunks.
  std::span<const AttentionSequence> sequences;
  int num_decode_sequences = 0;
  std::span<const BlockPages> block_pages;  // of all sequences, see AttentionSequence::first_block
  std::span<const EncodeTile>
      encode_before;  // from exact pages, for every layer before anything is read
  std::span<const EncodeTile>
      encode_in_layer;  // complete tiles of prefill chunks, from the layer's own rows
  std::span<const int32_t> logit_rows;  // rows whose logits are wanted, ascending
  ReadingRule rule = ReadingRule::kPosition;
};

}  // namespace kvarn
