// CPU twins of the ops that do not touch KV pages (those are in kv_cpu.h). Rows are independent:
// the threads only decide who computes what. Shapes are checked by the backend, once.
#pragma once

#include <cstdint>
#include <span>

#include "kernels/backend.h"
#include "kernels/thread_pool.h"

namespace kvarn::cpu {

int physical_cores();  // that this process may use: affinity mask and cgroup quota respected

void embed(const int32_t* token_ids, Tensor table, Tensor out, ThreadPool& pool);

// y = x / sqrt(mean(x^2) + eps) * weight; with `delta`, residual += delta first. The sum of squares
// has 16 fp32 lanes (element i in lane i % 16), added pairwise: the same bits on every ISA.
void rms_norm(Tensor x, Tensor weight, float eps, Tensor y, ThreadPool& pool, CpuIsa isa);
void add_rms_norm(Tensor residual, Tensor delta, Tensor weight, float eps, Tensor y,
                  ThreadPool& pool, CpuIsa isa);
void add(Tensor residual, Tensor delta, ThreadPool& pool, CpuIsa isa);

void qk_norm_rope_rotate(const QkvParams& params, ThreadPool& pool, CpuIsa isa);

// y = silu(gate) * up, silu(x) = x / (1 + e^-x).
void silu_mul(Tensor gate_up, Tensor y, ThreadPool& pool, CpuIsa isa);

// N(0, stddev) in bf16; element i depends on (seed, i) alone (random_fill.h).
void fill_normal(Tensor out, float stddev, uint64_t seed, ThreadPool& pool);

void gather_rows(Tensor x, std::span<const int32_t> rows, Tensor y, ThreadPool& pool);

void sample(Tensor logits, std::span<const SamplingRow> rows, std::span<SampledToken> out,
            ThreadPool& pool);

}  // namespace kvarn::cpu
