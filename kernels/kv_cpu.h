// CPU twins of the ops that touch KV pages. Pages on the CPU hold exact rows plainly and coded
// tiles as in kv_layout.h. All rows, heads and blocks are independent: the threads only decide who
// computes what.
#pragma once

#include "kernels/backend.h"
#include "kernels/thread_pool.h"

namespace kvarn::cpu {

void kv_write(const KvWriteParams& params, ThreadPool& pool);
void kv_encode(const KvEncodeParams& params, ThreadPool& pool, CpuIsa isa);
// Decode rows and prefill chunks alike: one code path per (row, block), so both give the same bits.
void attention(const AttentionParams& params, ThreadPool& pool, CpuIsa isa);

}  // namespace kvarn::cpu
