// How many pages a sequence takes, and how long a sequence a pool can hold. Arithmetic on the
// layout alone: start-up (pool size, max_model_len), admission and `kvarn inspect` agree because
// they ask here. Pure functions.
#pragma once

#include <cstdint>

#include "kernels/kv_layout.h"

namespace kvarn {

// Whether `block` with `tokens` rows stands on one coded page, once nobody needs its rows exact.
inline bool is_coded_block(const KvLayout& layout, int64_t block, int64_t tokens) {
  return layout.coded() && block >= kSinkBlocks && tokens == kBlockTokens;
}

// Pages of `block` with `tokens` rows: one if coded, else as many as its exact rows fill.
inline int pages_of_block(const KvLayout& layout, int64_t block, int tokens) {
  return is_coded_block(layout, block, tokens) ? 1 : layout.exact_pages(tokens);
}

// Pages of one sequence after a prefill of `tokens` positions: sink, coded blocks, tail.
int64_t pages_after_prefill(const KvLayout& layout, int64_t tokens);

// Pages of one sequence whose position tokens-1 was just decoded. Differs from the above only where
// the last block is full and not coded yet.
int64_t pages_after_decode(const KvLayout& layout, int64_t tokens);

// The most pages a sequence ever holds on its way to `tokens` positions, with its reserve page for
// the record of a block that is being encoded.
int64_t peak_pages(const KvLayout& layout, int64_t tokens);

// The longest sequence whose peak fits in `pages`; 0 when not even one token does.
int64_t longest_sequence(const KvLayout& layout, int64_t pages);

}  // namespace kvarn
