// One sequence through Model::forward(), without an engine: what `kvarn eval` measures with,
// because it needs the logits of every position and the reading rule of its choice. Pages are
// managed as the engine does (sink and tail exact, complete tiles coded), in the smallest form. One
// thread.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "engine/kv_pool.h"
#include "kernels/core/arena.h"
#include "models/model.h"

namespace kvarn::commands {

class ModelSession {
 public:
  // Room for one sequence of `max_tokens`, fed in chunks of at most `chunk` tokens (a multiple of
  // 128). Model and backend must outlive it. Throws std::bad_alloc.
  ModelSession(Model& model, Backend& backend, KvFormat format, ReadingRule rule, int max_tokens,
               int chunk);

  void reset();  // an empty sequence
  int length() const { return length_; }

  // Feeds `tokens` in chunks (the sequence must be at a block border unless it is one token) and
  // calls on_logits(first_position, rows of logits [n, vocab]) per chunk: for every row, or for the
  // last row of all only.
  template <typename Fn>
  void prefill(std::span<const int32_t> tokens, bool all_rows, Fn&& on_logits) {
    for (size_t at = 0; at < tokens.size();) {
      const size_t count = std::min(tokens.size() - at, static_cast<size_t>(chunk_));
      const bool last = at + count == tokens.size();
      const int first = length_;
      const int num_logits = all_rows ? static_cast<int>(count) : (last ? 1 : 0);
      const std::span<const float> logits = feed(tokens.subspan(at, count), num_logits);
      if (num_logits > 0) on_logits(first + static_cast<int>(count) - num_logits, logits);
      at += count;
    }
  }
  // Feeds one token as a decode; its logits [vocab], valid until the next call.
  std::span<const float> decode(int32_t token) { return feed({&token, 1}, 1); }

 private:
  struct Block {
    std::vector<int32_t> pages;
    bool coded = false;
  };
  // Logits of the last `num_logits` rows, valid until the next call.
  std::span<const float> feed(std::span<const int32_t> tokens, int num_logits);
  int32_t take_page();
  void plan_encode_of_full_tail();
  void plan_row(int position, int end);

  Model& model_;
  Backend& backend_;
  ReadingRule rule_;
  int chunk_;
  StepLimits limits_;
  KvPool pool_;
  Arena arena_;
  std::vector<float> logits_;

  int length_ = 0;
  std::vector<int32_t> free_;
  std::vector<Block> blocks_;
  // Of the step that is being planned.
  std::vector<int32_t> positions_;
  std::vector<int64_t> slots_;
  std::vector<EncodeTile> encode_before_, encode_in_layer_;
};

}  // namespace kvarn::commands
