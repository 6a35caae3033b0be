// y = x W^T for up to eight rows, where the time is that of reading W once. Used through class
// Linear; here for its tests and benchmarks.
#pragma once

#include <cuda_runtime_api.h>

#include "kernels/backend.h"

namespace kvarn::cuda {

constexpr int kFewRows = 8;

enum class LinearResult {
  kStore,    // y = x W^T, bf16 or f32
  kAdd,      // y += x W^T, f32 (the residual stream)
  kSiluMul,  // W is gate over up, y = silu(x gate^T) * (x up^T), bf16, half as many columns
};

// How the work is split. A warp takes `tiles` tiles of eight rows of W at a time; the warps of a
// block split k among them and add their sums in a fixed order, so that the bits of a result do
// not depend on the number of rows.
struct FewRowsPlan {
  int tiles;       // 1 or 2 (kSiluMul: 2)
  int warps;       // of a block, 4 to 16
  int64_t blocks;  // of the grid; more than needed are not launched
};
FewRowsPlan few_rows_plan(int64_t n, int64_t k, LinearResult result, int multiprocessors);

// x bf16 [rows, k], rows <= kFewRows; weight bf16; y as `result` says. k is a multiple of 8, x and
// the parts of the weight are aligned to 16 bytes. With `overlap` the launch may begin before the
// kernel in front of it has ended (programmatic dependent launch); it reads x and writes y after.
void linear_few_rows(cudaStream_t stream, Tensor x, const LinearWeight& weight, Tensor y,
                     LinearResult result, const FewRowsPlan& plan, bool overlap);

}  // namespace kvarn::cuda
