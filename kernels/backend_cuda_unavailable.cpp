// A build without the CUDA toolkit: the seam answers with the reason.
#include "kernels/backend.h"

namespace kvarn {

Result<std::unique_ptr<Backend>> make_cuda_backend(int /*device*/) {
  return Status::unavailable(
      "this binary was built without CUDA; build it where nvcc is found (KVARN_CUDA=ON) or use "
      "--device cpu");
}

}  // namespace kvarn
