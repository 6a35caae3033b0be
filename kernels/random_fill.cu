// Dummy weights made where they are used. Each thread makes eight elements (two hashes) and stores
// 16 bytes; the 128 KB of quantiles are read through L1. The bits are those of random_fill.h.
#include "kernels/cuda_check.h"
#include "kernels/ops_cuda.h"
#include "kernels/random_fill.h"

namespace kvarn::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kPerThread = 8;
constexpr int kGroup = 4;  // elements of one hash

__global__ void __launch_bounds__(kThreads)
    fill_normal_kernel(bf16* __restrict__ out, const bf16* __restrict__ quantiles, int64_t size,
                       uint64_t seed) {
  const int64_t first = (int64_t{blockIdx.x} * kThreads + threadIdx.x) * kPerThread;
  if (first >= size) return;
  uint32_t packed[kPerThread / 2];
#pragma unroll
  for (int group = 0; group < kPerThread / kGroup; ++group) {
    const uint64_t bits = mix_bits(seed + static_cast<uint64_t>(first + group * kGroup));
#pragma unroll
    for (int pair = 0; pair < 2; ++pair) {
      const uint32_t low = quantiles[(bits >> (32 * pair)) & 0xffffu].bits;
      const uint32_t high = quantiles[(bits >> (32 * pair + 16)) & 0xffffu].bits;
      packed[group * 2 + pair] = low | high << 16;
    }
  }
  if (first + kPerThread <= size) {
    *reinterpret_cast<uint4*>(out + first) = make_uint4(packed[0], packed[1], packed[2], packed[3]);
    return;
  }
#pragma unroll
  for (int i = 0; i < kPerThread; ++i) {
    if (first + i < size) {
      out[first + i].bits = static_cast<uint16_t>(packed[i / 2] >> (i % 2 * 16));
    }
  }
}

}  // namespace

void fill_normal(cudaStream_t stream, Tensor out, const bf16* quantiles, uint64_t seed) {
  CHECK(out.dtype() == DType::kBF16, "dummy weights are bf16");
  CHECK(reinterpret_cast<uintptr_t>(out.raw()) % 16 == 0, "stores are 16 bytes");
  const int64_t size = out.size();
  if (size == 0) return;
  constexpr int64_t kPerBlock = kThreads * kPerThread;
  fill_normal_kernel<<<static_cast<unsigned>((size + kPerBlock - 1) / kPerBlock), kThreads, 0,
                       stream>>>(out.data<bf16>(), quantiles, size, seed);
  CUDA_CHECK(cudaGetLastError());
}

}  // namespace kvarn::cuda
