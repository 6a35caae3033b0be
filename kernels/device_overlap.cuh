// Programmatic dependent launch (compute capability 9.0; PTX ISA, griddepcontrol): a kernel
// launched with overlap begins once every block of the kernel in front has said so or ended. Before
// it reads what that kernel writes, or writes what it reads, it waits for its end. A kernel that
// was launched so waits whatever it does: the one behind relies on it.
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>

namespace kvarn::cuda {

// The kernel in front has ended and its writes are visible. Nothing to wait for without overlap.
__device__ inline void wait_for_kernel_in_front() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// Allows the kernel behind, if it was launched so, to begin while this one runs.
__device__ inline void let_next_kernel_begin() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;");
#endif
}

// For cudaLaunchKernelEx(&config.value, kernel, arguments...).
struct LaunchConfig {
  LaunchConfig(cudaStream_t stream, unsigned blocks, unsigned threads, bool overlap) {
    attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attribute.val.programmaticStreamSerializationAllowed = 1;
    value.gridDim = dim3(blocks);
    value.blockDim = dim3(threads);
    value.stream = stream;
    value.attrs = &attribute;
    value.numAttrs = overlap ? 1 : 0;
  }
  LaunchConfig(const LaunchConfig&) = delete;
  LaunchConfig& operator=(const LaunchConfig&) = delete;

  cudaLaunchAttribute attribute{};
  cudaLaunchConfig_t value{};
};

}  // namespace kvarn::cuda
