// y = x W^T on the GPU: own kernels for few rows, cuBLASLt for many. bf16 in, f32 sums.
#pragma once

#include <cuda_runtime_api.h>

#include <memory>

#include "kernels/backend.h"

namespace kvarn::cuda {

// One per stream; run() is called by its thread alone.
class Linear {
 public:
  // Creates the library handle and its workspace. With `overlap` a launch for few rows may begin
  // while the kernel in front of it on the stream ends: that kernel need not know. Throws.
  explicit Linear(cudaStream_t stream, bool overlap = false);
  ~Linear();

  // x bf16 [rows, k]; weight bf16, its parts one after another in memory count as one matrix;
  // y bf16 or f32 [rows, n]. The first call with a new (rows, n, k) picks a plan (not while
  // recording: warm up first).
  void run(Tensor x, const LinearWeight& weight, Tensor y);

  // The same with the op that follows in the same kernel.
  // residual f32 [rows, n] += x W^T.
  void run_add(Tensor x, const LinearWeight& weight, Tensor residual);
  // y bf16 [rows, n / 2] = silu(x gate^T) * (x up^T), weight = gate over up; n / 2 a multiple of 8.
  // Only for few rows: fuses_silu_mul(rows).
  void run_silu_mul(Tensor x, const LinearWeight& gate_up, Tensor y);
  static bool fuses_silu_mul(int64_t rows);

 private:
  class Impl;
  std::unique_ptr<Impl> impl_;
};

}  // namespace kvarn::cuda
