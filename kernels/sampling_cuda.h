// sample_row() (sampling.h) for all rows of a step on the GPU, every field included. Logits never
// leave the device. Worker thread only.
#pragma once

#include <cuda_runtime_api.h>

#include <memory>
#include <span>

#include "kernels/backend.h"

namespace kvarn::cuda {

class Sampler {
 public:
  // Device scratch and pinned host memory for `limits`. Throws std::bad_alloc.
  explicit Sampler(const StepLimits& limits);
  ~Sampler();

  // Puts the rows' parameters and token lists on the device, in stream order. Not recorded.
  void stage(cudaStream_t stream, std::span<const SamplingRow> rows);
  // Launches for logits f32 [rows, vocab] of which the first stage()d rows count. Can be recorded:
  // addresses and grid depend on the number of rows of `logits` alone.
  void run(cudaStream_t stream, Tensor logits);
  // After the stream was waited for: the tokens of the stage()d rows.
  void collect(std::span<SampledToken> tokens) const;

 private:
  class Impl;
  std::unique_ptr<Impl> impl_;
};

}  // namespace kvarn::cuda
