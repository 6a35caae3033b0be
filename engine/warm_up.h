// Steps whose only purpose is to have run: they load kernels, choose plans and touch workspace
// before the first request or any measurement of memory. What they compute is noise. Pure.
#pragma once

#include <vector>

#include "engine/step_batch.h"
#include "kernels/kv_layout.h"

namespace kvarn {

// Pages that the steps below name: 0 .. n-1.
constexpr int64_t warm_up_pages(const KvLayout& layout) { return layout.pages_per_exact_block + 1; }

// One row at position 0, stored nowhere.
StepBatch warm_up_row();
// Prompt chunks of at most `max_len` rows, `rows` in all or as many as `max_sequences` hold, the
// last one sampled; it encodes a tile before and in the layers where the format has tiles.
StepBatch warm_up_prefill(const KvLayout& layout, int rows, int max_len, int max_sequences);
// Sizes of prompt steps to run, ascending: two to an octave up to `max_rows`, as matrix kernels are
// chosen by such ranges (linear_cublaslt.cpp) at the first step of each.
std::vector<int> warm_up_sizes(int max_rows);

}  // namespace kvarn
