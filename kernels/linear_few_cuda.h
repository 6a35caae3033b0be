// y = x W^T for up to sixteen rows, where the time is that of reading W once. Used through class
// Linear; here for its tests and benchmarks.
#pragma once

#include <cuda_runtime_api.h>

#include "kernels/linear_cuda.h"

namespace kvarn::cuda {

// How the work is split: the warps of a block share eight columns of y (kSiluMul: eight of gate and
// eight of up), split k among them and add their sums in a fixed order. A plan depends on no number
// of rows but whether there are more than eight, so neither do the bits of a row.
struct FewRowsPlan {
  int warps;       // of a block, 1 to 16
  int64_t blocks;  // of the grid; more than there are groups of columns are not launched
};
FewRowsPlan few_rows_plan(int64_t rows, int64_t n, int64_t k, LinearResult result,
                          int multiprocessors);

// x bf16 [rows, k], rows <= kFewRows; weight bf16; y as `result` says. k is a multiple of 8; x and
// the parts of the weight are aligned to 16 bytes. With `overlap` the launch may begin before the
// kernel in front of it has ended (programmatic dependent launch); it reads x and writes y after.
void linear_few_rows(cudaStream_t stream, Tensor x, const LinearWeight& weight, Tensor y,
                     LinearResult result, const FewRowsPlan& plan, bool overlap);

}  // namespace kvarn::cuda
