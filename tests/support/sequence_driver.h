// Drives one sequence through Model::forward() without an engine: pages, slots, encodes and block
// tables as the planner would make them, in the smallest form. Freed pages are used again at once,
// so an op that reads a page too late reads somebody else's rows and the test sees it.
#pragma once

#include <cstdint>
#include <optional>
#include <span>
#include <utility>
#include <vector>

#include "kernels/backend.h"
#include "kernels/core/arena.h"
#include "models/model.h"

namespace kvarn::test {

class SequenceDriver {
 public:
  // Room for one sequence of `max_tokens`, in steps of at most `max_rows`. Drivers of one backend
  // may take turns.
  SequenceDriver(Model& model, Backend& backend, KvFormat format, int max_tokens, int max_rows);

  // Feeds one chunk, which starts at a block border; logits of every row [tokens, vocab].
  std::vector<float> prefill(std::span<const int32_t> tokens);
  // Feeds one token as a decode row; its logits [vocab].
  std::vector<float> decode(int32_t token);
  // A whole prompt in chunks of `chunk` tokens (a multiple of 128; the last may be shorter).
  std::vector<float> prefill_in_chunks(std::span<const int32_t> tokens, int chunk);

  // From now on steps return the logits of these rows only (ascending; of the step's rows).
  void want_logits_of(std::vector<int32_t> rows) { logit_rows_ = std::move(rows); }

  int length() const { return length_; }
  int64_t tiles_encoded() const { return tiles_encoded_; }
  size_t arena_high_water() const { return arena_.high_water(); }

 private:
  struct Block {
    std::vector<int32_t> pages;
    bool coded = false;
  };
  struct Step {
    std::vector<int32_t> positions;
    std::vector<int64_t> slots;
    std::vector<EncodeTile> encode_before, encode_in_layer;
  };
  int32_t take_page();
  int64_t exact_slot(int position);
  void encode_full_block(Step& step);
  std::vector<float> run(std::span<const int32_t> tokens, const Step& step, bool is_decode);

  Model& model_;
  Backend& backend_;
  KvLayout layout_;
  StepLimits limits_;
  Buffer pool_;
  std::vector<KvLayerView> layers_;
  Arena arena_;
  Buffer logits_;  // f32 [max_rows, vocab]
  std::vector<int32_t> free_;
  std::vector<Block> blocks_;
  std::optional<std::vector<int32_t>> logit_rows_;  // unset: of every row
  int length_ = 0;
  int64_t tiles_encoded_ = 0;
};

}  // namespace kvarn::test
