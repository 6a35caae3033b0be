// Attention over pages on the GPU. Each class owns its device scratch, sized once; plan() turns a
// step's host arrays into what its kernel indexes with, in host memory that the backend copies to
// the device (`plan` of run()); run() launches. q is f16, out bf16, head_dim 128. The specification
// is cpu::attention (kv_cpu.h). Worker thread only.
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>
#include <span>

#include "kernels/backend.h"

namespace kvarn::cuda {

// One row a sequence. The launch has the same grid for every batch, so that it can be recorded: the
// work is divided by plan(), by pages, over all multiprocessors.
class DecodeAttention {
 public:
  // Throws std::bad_alloc.
  DecodeAttention(const StepLimits& limits, int num_multiprocessors);

  size_t max_plan_bytes() const;
  // `decodes`: host. Sequences of 0 rows fill a batch up; their rows of `out` are left alone.
  // Returns the bytes of `plan` in use. Pure.
  size_t plan(std::span<const AttentionSequence> decodes, std::byte* plan) const;
  // `params.sequences` and `params.block_pages` are device memory; `plan`: the bytes of plan()
  // there.
  void run(cudaStream_t stream, const AttentionParams& params, const std::byte* plan);

 private:
  StepLimits limits_;
  int grid_;        // thread blocks of every launch
  Buffer scratch_;  // partial results and arrival counters
};

// kBest: the fastest that this device and build have. kPortable: mma.sync, on any device.
enum class PrefillKernel { kBest, kPortable };

// Chunks of several rows (and sequences of one row that are not decodes).
class PrefillAttention {
 public:
  // Throws std::bad_alloc. Scratch holds the decoded context of one layer: of one sequence of
  // max_model_len, or of several shorter ones.
  PrefillAttention(const StepLimits& limits, int num_multiprocessors,
                   PrefillKernel kernel = PrefillKernel::kBest);

  size_t max_plan_bytes() const;
  size_t plan(std::span<const AttentionSequence> chunks, std::byte* plan) const;
  // `chunks`: the host's copy of params.sequences, for grids and order.
  void run(cudaStream_t stream, const AttentionParams& params,
           std::span<const AttentionSequence> chunks, const std::byte* plan);

 private:
  StepLimits limits_;
  int num_multiprocessors_;
  int scratch_tiles_;  // blocks that scratch_ holds
  bool use_wgmma_;
  Buffer scratch_;  // K, then V: f16 [128 * scratch_tiles_, kv_heads, 128]
  Buffer counter_;  // of the wgmma kernel
};

}  // namespace kvarn::cuda
