// Tensor borrows: a pointer, a dtype and a shape of up to four dimensions, densely packed,
// row-major. It owns nothing and is passed by value. The memory may be the host's or a device's;
// whoever made the view knows which.
#pragma once

#include <array>
#include <cstdint>
#include <initializer_list>
#include <type_traits>

#include "kernels/core/check.h"
#include "kernels/core/dtype.h"

namespace kvarn {

class Tensor {
 public:
  static constexpr int kMaxDims = 4;

  Tensor() = default;
  Tensor(void* data, DType dtype, std::initializer_list<int64_t> shape)
      : data_(data), dtype_(dtype), dims_(static_cast<int>(shape.size())) {
    CHECK(dims_ <= kMaxDims, "a Tensor has at most four dimensions");
    int i = 0;
    for (const int64_t extent : shape) shape_[i++] = extent;
  }
  template <typename T>
  static Tensor of(T* data, std::initializer_list<int64_t> shape) {
    using Element = std::remove_const_t<T>;
    return {const_cast<Element*>(data), DTypeOf<Element>::value, shape};
  }

  bool empty() const { return data_ == nullptr || size() == 0; }
  DType dtype() const { return dtype_; }
  int dims() const { return dims_; }
  int64_t dim(int i) const { return shape_[i]; }
  int64_t size() const {  // elements; 1 for a scalar
    int64_t n = 1;
    for (int i = 0; i < dims_; ++i) n *= shape_[i];
    return n;
  }
  int64_t row_size() const { return dims_ == 0 || shape_[0] == 0 ? 0 : size() / shape_[0]; }
  size_t bytes() const { return static_cast<size_t>(size()) * dtype_bytes(dtype_); }

  template <typename T>
  T* data() const {
    DCHECK(DTypeOf<std::remove_const_t<T>>::value == dtype_, "dtype of the view");
    return static_cast<T*>(data_);
  }
  void* raw() const { return data_; }

  // Rows [first, first + count) of the leading dimension.
  Tensor rows(int64_t first, int64_t count) const {
    CHECK(dims_ >= 1 && first >= 0 && count >= 0 && first + count <= shape_[0], "row range");
    Tensor view = *this;
    view.data_ = static_cast<std::byte*>(data_) +
                 static_cast<size_t>(first * row_size()) * dtype_bytes(dtype_);
    view.shape_[0] = count;
    return view;
  }

 private:
  void* data_ = nullptr;
  DType dtype_ = DType::kF32;
  int dims_ = 0;
  std::array<int64_t, kMaxDims> shape_{};
};

}  // namespace kvarn
