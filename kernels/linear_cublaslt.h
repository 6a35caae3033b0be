// y = x W^T by cuBLASLt, for many rows. The library offers several algorithms for a shape; the
// fastest is found once, by timing them on the caller's operands, and used from then on.
#pragma once

#include <cuda_runtime_api.h>

#include <memory>

#include "kernels/core/tensor.h"

namespace kvarn::cuda {

class CublasLt {
 public:
  CublasLt();  // takes the library handle and 64 MiB of device memory; throws
  ~CublasLt();

  // x bf16 [rows, k], weight bf16 [n, k], y bf16 or f32: element (row, column) is
  // y[row * y_stride + column], y_stride >= n in elements. With `accumulate` y (f32) += x W^T.
  // The first call with a new range of rows and (n, k, y_stride, dtype) times its algorithms and
  // waits for them; while the stream is being captured it takes the library's first suggestion
  // instead. Throws where the library fails. All calls on one stream.
  void run(cudaStream_t stream, Tensor x, Tensor weight, void* y, DType y_dtype, int64_t y_stride,
           bool accumulate = false);

 private:
  class Impl;
  std::unique_ptr<Impl> impl_;
};

}  // namespace kvarn::cuda
