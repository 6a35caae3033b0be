// CUDA_CHECK(call): throws where a CUDA call or launch failed, with its name and place.
#pragma once

#include <cuda_runtime_api.h>

namespace kvarn::cuda {

// Throws std::bad_alloc when device memory ran out, DeviceLost when the context is gone (every
// later call would fail too), std::runtime_error otherwise.
[[noreturn]] void throw_cuda_error(cudaError_t error, const char* call, const char* file, int line);

}  // namespace kvarn::cuda

#define CUDA_CHECK(call)                                                      \
  do {                                                                        \
    if (const cudaError_t cuda_error = (call); cuda_error != cudaSuccess) {   \
      ::kvarn::cuda::throw_cuda_error(cuda_error, #call, __FILE__, __LINE__); \
    }                                                                         \
  } while (false)
