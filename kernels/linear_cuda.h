// y = x W^T on the GPU: own kernels for few rows, cuBLASLt for many. bf16 in, f32 sums.
#pragma once

#include <cuda_runtime_api.h>

#include <memory>

#include "kernels/backend.h"

namespace kvarn::cuda {

// Up to here own kernels multiply, in one reading of the weight.
constexpr int kFewRows = 16;

enum class LinearResult {
  kStore,    // y = x W^T, bf16 or f32
  kAdd,      // y += x W^T, f32 (the residual stream)
  kSiluMul,  // W is gate over up, y = silu(x gate^T) * (x up^T), bf16, half as many columns
};

// One per stream; run() is called by its thread alone.
class Linear {
 public:
  // Creates the library handle and its workspace. With `overlap` a launch for few rows may begin
  // while the kernel in front of it on the stream ends: that kernel need not know. Throws.
  explicit Linear(cudaStream_t stream, bool overlap = true);
  ~Linear();

  // x bf16 [rows, k]; weight bf16, its parts one after another in memory count as one matrix;
  // y bf16 or f32 [rows, n]. The first call with a new (rows, n, k) picks a plan (not while
  // recording: warm up first).
  void run(Tensor x, const LinearWeight& weight, Tensor y);

  // The same with the op behind it in one kernel; kSiluMul for up to kFewRows rows.
  void run_fused(Tensor x, const LinearWeight& weight, LinearResult result, Tensor y);

 private:
  class Impl;
  std::unique_ptr<Impl> impl_;
};

}  // namespace kvarn::cuda
