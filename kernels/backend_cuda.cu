// The CUDA backend's door. The kernels behind the seam are not written yet, so it says so, with
// what the machine has: a half-built backend must never serve. It is compiled wherever nvcc is
// found.
#include <cuda_runtime.h>

#include <string>

#include "kernels/backend.h"

namespace kvarn {

Result<std::unique_ptr<Backend>> make_cuda_backend(int device) {
  int count = 0;
  const cudaError_t error = cudaGetDeviceCount(&count);
  if (error == cudaErrorInsufficientDriver || error == cudaErrorNoDevice ||
      (error == cudaSuccess && count == 0)) {
    return Status::unavailable(std::string("no NVIDIA GPU can be used here (") +
                               cudaGetErrorName(error) + "); use --device cpu");
  }
  if (error != cudaSuccess) {
    return Status::internal(std::string("cudaGetDeviceCount failed: ") + cudaGetErrorName(error) +
                            ": " + cudaGetErrorString(error));
  }
  if (device < 0 || device >= count) {
    return Status::invalid_argument("CUDA device " + std::to_string(device) +
                                    " does not exist; this machine has " + std::to_string(count));
  }
  return Status::unavailable("the CUDA backend is not part of this version yet; use --device cpu");
}

}  // namespace kvarn
