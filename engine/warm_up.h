// Steps whose only purpose is to have run: they load kernels, choose plans and touch workspace
// before the first request or any measurement of memory. What they compute is noise. Pure.
#pragma once

#include "engine/step_batch.h"
#include "kernels/kv_layout.h"

namespace kvarn {

// Pages that the steps below name: 0 .. n-1.
constexpr int64_t warm_up_pages(const KvLayout& layout) { return layout.pages_per_exact_block + 1; }

// One row at position 0, stored nowhere.
StepBatch warm_up_row();
// One prompt chunk of `rows` rows, the last one sampled; it encodes a tile before and in the layers
// where the format has tiles.
StepBatch warm_up_prefill(const KvLayout& layout, int rows);

}  // namespace kvarn
