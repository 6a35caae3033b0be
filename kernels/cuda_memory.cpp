#include "kernels/cuda_memory.h"

#include <cuda_runtime_api.h>

#include "kernels/cuda_check.h"

namespace kvarn::cuda {

Buffer allocate_device(size_t bytes) {
  if (bytes == 0) return {};
  void* data = nullptr;
  CUDA_CHECK(cudaMalloc(&data, bytes));
  return {data, bytes, [](void* p, size_t) { cudaFree(p); }};
}

Buffer allocate_pinned(size_t bytes) {
  if (bytes == 0) return {};
  void* data = nullptr;
  CUDA_CHECK(cudaHostAlloc(&data, bytes, cudaHostAllocDefault));
  return {data, bytes, [](void* p, size_t) { cudaFreeHost(p); }};
}

}  // namespace kvarn::cuda
