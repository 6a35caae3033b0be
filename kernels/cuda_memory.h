// Buffers in GPU memory and in pinned host memory, of the current device. Throw std::bad_alloc when
// there is no room; 0 bytes are an empty Buffer.
#pragma once

#include <cstddef>

#include "kernels/core/buffer.h"

namespace kvarn::cuda {

Buffer allocate_device(size_t bytes);  // aligned to 256 bytes, uninitialised
Buffer allocate_pinned(size_t bytes);  // page-locked: copies run beside the host

}  // namespace kvarn::cuda
