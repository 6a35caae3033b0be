// What a model needs to know about one step: rows of tokens, where their K and V go, and which
// pages to read. Plain views; the engine's StepBatch owns the arrays. No sequence, no request, no
// policy here.
#pragma once

#include <atomic>
#include <chrono>
#include <cstdint>
#include <span>
#include <vector>

#include "kernels/backend.h"

namespace kvarn {

// Signs of life of a running forward(), for the stall watch, and what it spent on coding tiles.
struct ForwardProgress {
  std::atomic<std::chrono::steady_clock::time_point> last_layer;  // any thread may read
  double encode_seconds = 0;  // added up by the worker thread; read it after forward()

  void layer_done() {
    last_layer.store(std::chrono::steady_clock::now(), std::memory_order_relaxed);
  }
};

struct ForwardInput {
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
  ForwardProgress* progress = nullptr;  // out; none where nobody watches
};

// The pages of every layer, views into the engine's pool.
struct KvCacheView {
  std::span<const KvLayerView> layers;
  KvLayout layout;
};

}  // namespace kvarn
