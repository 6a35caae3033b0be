// RMS norm and residual addition: one thread block per row, eight elements per thread. The sum of
// squares is fp32: in bf16, adding equal terms stalls after 256 of them. Every access is 16 bytes.
// Launches overlap the kernel in front, so pointers to what that may write are not __restrict__:
// the compiler could move their loads above the wait.
#include <algorithm>

#include "kernels/cuda_check.h"
#include "kernels/device_overlap.cuh"
#include "kernels/device_vector.cuh"
#include "kernels/ops_cuda.h"

namespace kvarn::cuda {
namespace {

constexpr int kMaxThreads = 1024;
constexpr int kAddThreads = 256;

// kCached: the row is at most eight elements per thread and stays in registers; else it is read
// twice, the second time from a cache.
template <typename W, bool kAdd, bool kCached>
__global__ void __launch_bounds__(kMaxThreads)
    rms_norm_kernel(float* x,                      // [rows, hidden]; written if kAdd
                    const bf16* delta,             // [rows, hidden]; read if kAdd
                    const W* __restrict__ weight,  // [hidden]
                    bf16* y,                       // [rows, hidden]
                    int hidden, float eps) {
  __shared__ float shared[32];
  const int first = static_cast<int>(threadIdx.x) * kVector;
  const int step = static_cast<int>(blockDim.x) * kVector;
  x += int64_t{blockIdx.x} * hidden;
  y += int64_t{blockIdx.x} * hidden;
  if constexpr (kAdd) delta += int64_t{blockIdx.x} * hidden;
  let_next_kernel_begin();
  Floats8 row{}, scales{};
  if constexpr (kCached) {
    if (first < hidden) scales = load8(weight + first);
  }
  wait_for_kernel_in_front();
  float squares = 0.f;
  for (int i = first; i < hidden; i += step) {
    row = load8(x + i);
    if constexpr (kAdd) {
      const Floats8 d = load8(delta + i);
#pragma unroll
      for (int j = 0; j < kVector; ++j) row.v[j] += d.v[j];
      store8(x + i, row);
    }
#pragma unroll
    for (int j = 0; j < kVector; ++j) squares += row.v[j] * row.v[j];
    if constexpr (kCached) break;
  }
  const float scale = 1.f / sqrtf(block_sum(squares, shared) / static_cast<float>(hidden) + eps);
  for (int i = first; i < hidden; i += step) {
    if constexpr (!kCached) {
      row = load8(x + i);  // this thread's own stores
      scales = load8(weight + i);
    }
#pragma unroll
    for (int j = 0; j < kVector; ++j) row.v[j] = row.v[j] * scale * scales.v[j];
    store8(y + i, row);
    if constexpr (kCached) break;
  }
}

__global__ void __launch_bounds__(kAddThreads)
    add_kernel(float* residual, const bf16* delta, int64_t size) {
  let_next_kernel_begin();
  wait_for_kernel_in_front();
  const int64_t i = (int64_t{blockIdx.x} * kAddThreads + threadIdx.x) * kVector;
  if (i >= size) return;
  Floats8 sum = load8(residual + i);
  const Floats8 d = load8(delta + i);
#pragma unroll
  for (int j = 0; j < kVector; ++j) sum.v[j] += d.v[j];
  store8(residual + i, sum);
}

template <typename W, bool kAdd>
void launch_norm(cudaStream_t stream, Tensor x, const bf16* delta, Tensor weight, float eps,
                 Tensor y) {
  const int64_t rows = x.dim(0), hidden = x.dim(1);
  const int64_t threads = std::min<int64_t>((hidden / kVector + 31) / 32 * 32, kMaxThreads);
  const auto kernel = hidden <= threads * kVector ? rms_norm_kernel<W, kAdd, true>
                                                  : rms_norm_kernel<W, kAdd, false>;
  const LaunchConfig config(stream, static_cast<unsigned>(rows), static_cast<unsigned>(threads),
                            /*overlap=*/true);
  CUDA_CHECK(cudaLaunchKernelEx(&config.value, kernel, x.data<float>(), delta,
                                static_cast<const W*>(weight.data<W>()), y.data<bf16>(),
                                static_cast<int>(hidden), eps));
}

template <bool kAdd>
void check_and_launch_norm(cudaStream_t stream, Tensor x, const bf16* delta, Tensor weight,
                           float eps, Tensor y) {
  CHECK(x.dims() == 2 && x.dtype() == DType::kF32, "x is f32 [rows, hidden]");
  CHECK(y.dims() == 2 && y.dtype() == DType::kBF16, "y is bf16 [rows, hidden]");
  CHECK(y.dim(0) == x.dim(0) && y.dim(1) == x.dim(1), "x and y have one shape");
  CHECK(weight.dims() == 1 && weight.dim(0) == x.dim(1), "one weight for each column");
  CHECK(x.dim(1) % kVector == 0, "rows are read by eights: hidden must be a multiple of 8");
  if (x.dim(0) == 0 || x.dim(1) == 0) return;
  switch (weight.dtype()) {
    case DType::kBF16:
      return launch_norm<bf16, kAdd>(stream, x, delta, weight, eps, y);
    case DType::kF16:
      return launch_norm<half, kAdd>(stream, x, delta, weight, eps, y);
    case DType::kF32:
      return launch_norm<float, kAdd>(stream, x, delta, weight, eps, y);
    default:
      CHECK(false, "norm weights are bf16, f16 or f32");
  }
}

void check_delta(Tensor residual, Tensor delta) {
  CHECK(residual.dims() == 2 && residual.dtype() == DType::kF32, "residual is f32 [rows, hidden]");
  CHECK(delta.dims() == 2 && delta.dtype() == DType::kBF16, "delta is bf16 [rows, hidden]");
  CHECK(delta.dim(0) == residual.dim(0) && delta.dim(1) == residual.dim(1),
        "residual and delta have one shape");
}

}  // namespace

void rms_norm(cudaStream_t stream, Tensor x, Tensor weight, float eps, Tensor y) {
  check_and_launch_norm<false>(stream, x, nullptr, weight, eps, y);
}

void add_rms_norm(cudaStream_t stream, Tensor residual, Tensor delta, Tensor weight, float eps,
                  Tensor y) {
  check_delta(residual, delta);
  check_and_launch_norm<true>(stream, residual, delta.data<bf16>(), weight, eps, y);
}

void add(cudaStream_t stream, Tensor residual, Tensor delta) {
  check_delta(residual, delta);
  const int64_t size = residual.size();
  CHECK(size % kVector == 0, "rows are read by eights: hidden must be a multiple of 8");
  if (size == 0) return;
  constexpr int64_t kPerBlock = kAddThreads * kVector;
  const LaunchConfig config(stream, static_cast<unsigned>((size + kPerBlock - 1) / kPerBlock),
                            kAddThreads, /*overlap=*/true);
  CUDA_CHECK(cudaLaunchKernelEx(&config.value, add_kernel, residual.data<float>(),
                                static_cast<const bf16*>(delta.data<bf16>()), size));
}

}  // namespace kvarn::cuda
