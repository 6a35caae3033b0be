// silu(gate) * up, the middle of the SwiGLU MLP: eight columns per thread, fp32 inside. The launch
// overlaps the kernel in front, so pointers to what that may write are not __restrict__.
#include "kernels/cuda_check.h"
#include "kernels/device_overlap.cuh"
#include "kernels/device_vector.cuh"
#include "kernels/ops_cuda.h"

namespace kvarn::cuda {
namespace {

constexpr int kThreads = 256;

__global__ void __launch_bounds__(kThreads) silu_mul_kernel(const bf16* gate_up,  // [rows, 2 * ffn]
                                                            bf16* y,              // [rows, ffn]
                                                            int64_t rows, int ffn) {
  let_next_kernel_begin();
  wait_for_kernel_in_front();
  const int vectors = ffn / kVector;
  const int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  const int64_t row = i / vectors;
  if (row >= rows) return;
  const int64_t column = (i - row * vectors) * kVector;
  const bf16* gate = gate_up + row * 2 * ffn + column;
  Floats8 g = load8(gate);
  const Floats8 u = load8(gate + ffn);
#pragma unroll
  for (int j = 0; j < kVector; ++j) g.v[j] = g.v[j] / (1.f + expf(-g.v[j])) * u.v[j];
  store8(y + row * ffn + column, g);
}

}  // namespace

void silu_mul(cudaStream_t stream, Tensor gate_up, Tensor y) {
  CHECK(gate_up.dims() == 2 && gate_up.dtype() == DType::kBF16, "gate_up is bf16 [rows, 2 * ffn]");
  CHECK(y.dims() == 2 && y.dtype() == DType::kBF16, "y is bf16 [rows, ffn]");
  CHECK(gate_up.dim(0) == y.dim(0) && gate_up.dim(1) == 2 * y.dim(1), "gate and up have y's shape");
  CHECK(y.dim(1) % kVector == 0, "rows are read by eights: ffn must be a multiple of 8");
  if (y.size() == 0) return;
  const int64_t blocks = (y.size() / kVector + kThreads - 1) / kThreads;
  const LaunchConfig config(stream, static_cast<unsigned>(blocks), kThreads, /*overlap=*/true);
  CUDA_CHECK(cudaLaunchKernelEx(&config.value, silu_mul_kernel,
                                static_cast<const bf16*>(gate_up.data<bf16>()), y.data<bf16>(),
                                y.dim(0), static_cast<int>(y.dim(1))));
}

}  // namespace kvarn::cuda
