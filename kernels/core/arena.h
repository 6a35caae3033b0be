// Arena hands out activations for one step from one buffer and takes all of it back at once. It is
// sized before serving and never grows: a step allocates no memory. One thread (the worker's).
#pragma once

#include <algorithm>
#include <cstddef>
#include <initializer_list>

#include "kernels/core/buffer.h"
#include "kernels/core/tensor.h"

namespace kvarn {

class Arena {
 public:
  Arena() = default;
  explicit Arena(Buffer buffer) : buffer_(std::move(buffer)) {}

  Tensor tensor(DType dtype, std::initializer_list<int64_t> shape) {
    size_t bytes = dtype_bytes(dtype);
    for (const int64_t extent : shape) bytes *= static_cast<size_t>(extent);
    return {take(bytes), dtype, shape};
  }
  // Uninitialised, 64-byte aligned; valid until reset().
  void* take(size_t bytes) {
    const size_t rounded = (bytes + 63) / 64 * 64;
    CHECK(used_ + rounded <= buffer_.bytes(),
          "arena too small: the model's workspace_bytes() is wrong");
    void* data = buffer_.data() + used_;
    used_ += rounded;
    high_water_ = std::max(high_water_, used_);
    return data;
  }
  void reset() { used_ = 0; }
  size_t used() const { return used_; }
  void rewind(size_t used) { used_ = used; }  // back to an earlier used(): frees what came after
  size_t high_water() const { return high_water_; }
  size_t capacity() const { return buffer_.bytes(); }

 private:
  Buffer buffer_;
  size_t used_ = 0, high_water_ = 0;
};

}  // namespace kvarn
