// y = x W^T on the GPU: own kernels for few rows, cuBLASLt for many. bf16 in, f32 sums.
#pragma once

#include <cuda_runtime_api.h>

#include <memory>

#include "kernels/backend.h"

namespace kvarn::cuda {

// One per stream; run() is called by its thread alone.
class Linear {
 public:
  // Creates the library handle and its workspace. Throws.
  explicit Linear(cudaStream_t stream);
  ~Linear();

  // x bf16 [rows, k]; weight bf16, its parts one after another in memory count as one matrix;
  // y bf16 or f32 [rows, n]. The first call with a new (rows, n, k) picks a plan (not while
  // recording: warm up first).
  void run(Tensor x, const LinearWeight& weight, Tensor y);

 private:
  class Impl;
  std::unique_ptr<Impl> impl_;
};

}  // namespace kvarn::cuda
