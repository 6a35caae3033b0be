// GPU ops that need no plan and no scratch. Activations (x, y, delta, qkv, gate_up) are bf16, the
// residual stream is f32, weights are bf16 or f32 vectors; q, k and v are f16. The specification of
// each is its CPU twin (ops_cpu.h, kv_cpu.h). Launchers take the stream, check shapes once,
// allocate nothing and wait for nothing; zero rows launch nothing. Worker thread only.
#pragma once

#include <cuda_runtime_api.h>

#include "kernels/backend.h"

namespace kvarn::cuda {

void embed(cudaStream_t stream, const int32_t* token_ids, Tensor table, Tensor out);
void rms_norm(cudaStream_t stream, Tensor x, Tensor weight, float eps, Tensor y);
void add_rms_norm(cudaStream_t stream, Tensor residual, Tensor delta, Tensor weight, float eps,
                  Tensor y);
void add(cudaStream_t stream, Tensor residual, Tensor delta);
void silu_mul(cudaStream_t stream, Tensor gate_up, Tensor y);
void gather_rows(cudaStream_t stream, Tensor x, const int32_t* rows, int64_t num_rows, Tensor y);
// `quantiles`: the 65,536 entries of normal_quantiles(stddev) in device memory.
void fill_normal(cudaStream_t stream, Tensor out, const bf16* quantiles, uint64_t seed);
void qk_norm_rope_rotate(cudaStream_t stream, const QkvParams& params);

// Exact rows and coded tiles in the order of kv_device_layout.h.
void kv_write(cudaStream_t stream, const KvWriteParams& params);
// `params.tiles` is device memory; its size is the host's.
void kv_encode(cudaStream_t stream, const KvEncodeParams& params);

}  // namespace kvarn::cuda
