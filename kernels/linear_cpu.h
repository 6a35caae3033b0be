// y = x W^T on the CPU, one fixed summation order per output element.
//
// The invariant that everything above relies on: y[r][j] is computed from row r of x and row j of W
// by one sequence of operations that k, the weight's dtype and the ISA fix. Neither the other rows,
// nor their number (GEMV or GEMM), nor the thread or the chunk of columns enters it. So every
// kernel keeps one accumulator (of 16 or 8 lanes, or one AMX tile element) per output element, runs
// it along the whole of k in order, and reduces its lanes by one tree. Blocking over k may park an
// accumulator in memory, never split it. Tails of k are padded with zeros in both operands.
//
// Weights stay where they are, row-major [n, k] (mapped files); activations are packed into
// scratch.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "kernels/backend.h"
#include "kernels/core/buffer.h"
#include "kernels/thread_pool.h"

namespace kvarn::cpu {

// One row block of a LinearWeight against all rows of x.
struct LinearJob {
  const std::byte* packed_x;  // by the kernel's pack()
  int64_t rows, k;
  const void* weight;  // [n, k] of the kernel's dtype
  int64_t n;
  float* y;  // element (row, column) is y[row * y_stride + column]
  int64_t y_stride;
};

// One (ISA, weight dtype) pair. Units of pack() are blocks of `row_block` rows of x; ranges of
// compute() are columns, cut at multiples of `column_block`.
struct LinearKernel {
  const char* name;
  int row_block, column_block;
  size_t (*packed_bytes)(int64_t rows, int64_t k);
  void (*pack)(const float* x, int64_t rows, int64_t k, int64_t first_block, int64_t last_block,
               std::byte* packed);
  void (*compute)(const LinearJob& job, int64_t first_column, int64_t last_column);
};

// The kernel for weights of `dtype`: bf16, f16 or f32.
const LinearKernel& linear_kernel(CpuIsa isa, DType dtype, bool fp32_activations);

// Tables of the ISAs; called through linear_kernel().
const LinearKernel& linear_kernel_scalar(DType dtype);
const LinearKernel& linear_kernel_avx2(DType dtype);
const LinearKernel& linear_kernel_avx512(DType dtype);
const LinearKernel& linear_kernel_avx512_bf16();  // bf16 weights
const LinearKernel& linear_kernel_amx();          // bf16 weights

// Runs linear() and owns its scratch, which grows to the largest call seen and stays: a warm-up of
// the largest step leaves nothing to allocate. One caller at a time.
class Linear {
 public:
  Linear(ThreadPool& pool, CpuIsa isa, bool fp32_activations)
      : pool_(pool), isa_(isa), fp32_activations_(fp32_activations) {}
  void run(Tensor x, const LinearWeight& weight, Tensor y);

 private:
  ThreadPool& pool_;
  CpuIsa isa_;
  bool fp32_activations_;
  Buffer scratch_;
};

}  // namespace kvarn::cpu
