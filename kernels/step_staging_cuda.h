// The way of a step's arrays to the GPU: pinned host memory and its twin on the device, every array
// at an offset fixed by the limits, so that recorded launches find each step's arrays. Bytes in use
// are copied, neighbours together. The host's half is free again when the stream has passed send().
// Worker thread only.
#pragma once

#include <cuda_runtime_api.h>

#include "kernels/backend.h"

namespace kvarn::cuda {

class StepStaging {
 public:
  // The plans are opaque bytes of at most these sizes. Throws std::bad_alloc.
  StepStaging(const StepLimits& limits, size_t max_decode_plan, size_t max_prefill_plan);

  // Where the host writes the plans before send().
  std::byte* host_decode_plan() const { return host_.data() + decode_plan_.offset; }
  std::byte* host_prefill_plan() const { return host_.data() + prefill_plan_.offset; }
  const std::byte* decode_plan() const { return device_.data() + decode_plan_.offset; }
  const std::byte* prefill_plan() const { return device_.data() + prefill_plan_.offset; }

  // Copies the arrays of `step` and the used bytes of the plans in stream order; the same step with
  // its arrays on the device.
  StepInput send(cudaStream_t stream, const StepInput& step, size_t decode_plan_bytes,
                 size_t prefill_plan_bytes);

 private:
  struct Region {
    size_t offset, bytes;
  };
  Region place(size_t bytes);
  template <typename T>
  std::span<const T> stage(std::span<const T> from, const Region& region, size_t skip = 0);
  void use(const Region& region, size_t bytes);
  void flush();

  size_t size_ = 0;  // before the regions, which place() adds to it
  Region token_ids_, positions_, slots_, sequences_, logit_rows_, tiles_, decode_plan_,
      prefill_plan_, block_pages_;
  Buffer host_, device_;
  // Of the copy that is being put together.
  cudaStream_t stream_ = nullptr;
  size_t copy_begin_ = 0, copy_end_ = 0;
};

}  // namespace kvarn::cuda
