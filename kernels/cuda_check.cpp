#include "kernels/cuda_check.h"

#include <new>
#include <string>

#include "kernels/backend.h"

namespace kvarn::cuda {
namespace {

// Errors after which the context answers nothing but the same error (CUDA runtime API, "Data types
// used by CUDA Runtime").
bool ends_the_context(cudaError_t error) {
  switch (error) {
    case cudaErrorIllegalAddress:
    case cudaErrorLaunchFailure:
    case cudaErrorLaunchTimeout:
    case cudaErrorHardwareStackError:
    case cudaErrorIllegalInstruction:
    case cudaErrorMisalignedAddress:
    case cudaErrorInvalidAddressSpace:
    case cudaErrorInvalidPc:
    case cudaErrorAssert:
    case cudaErrorECCUncorrectable:
    case cudaErrorNvlinkUncorrectable:
    case cudaErrorContextIsDestroyed:
    case cudaErrorDevicesUnavailable:
    case cudaErrorUnknown:
      return true;
    default:
      return false;
  }
}

}  // namespace

void throw_cuda_error(cudaError_t error, const char* call, const char* file, int line) {
  cudaGetLastError();  // what is not fatal must not be found again by the next launch
  if (error == cudaErrorMemoryAllocation) throw std::bad_alloc();
  const std::string message = std::string(cudaGetErrorName(error)) + " (" +
                              cudaGetErrorString(error) + ") from " + call + " at " + file + ":" +
                              std::to_string(line);
  if (ends_the_context(error)) throw DeviceLost(message);
  throw std::runtime_error(message);
}

}  // namespace kvarn::cuda
