// Tests on a GPU: skipped where there is none. DeviceArray is a vector in device memory.
#pragma once

#include <cuda_runtime_api.h>
#include <gtest/gtest.h>

#include <vector>

#include "kernels/cuda_check.h"

namespace kvarn::test {

template <typename T>
class DeviceArray {
 public:
  // Bytes of 0xff (a NaN in every float format): what a kernel leaves out shows.
  explicit DeviceArray(size_t size) : size_(size) {
    CUDA_CHECK(cudaMalloc(&data_, bytes() + 256));
    CUDA_CHECK(cudaMemset(data_, 0xff, bytes() + 256));
  }
  explicit DeviceArray(const std::vector<T>& values) : DeviceArray(values.size()) {
    CUDA_CHECK(cudaMemcpy(data_, values.data(), bytes(), cudaMemcpyHostToDevice));
  }
  ~DeviceArray() { cudaFree(data_); }
  DeviceArray(const DeviceArray&) = delete;
  DeviceArray& operator=(const DeviceArray&) = delete;

  T* data() const { return static_cast<T*>(data_); }
  size_t size() const { return size_; }
  size_t bytes() const { return size_ * sizeof(T); }
  std::vector<T> host() const {  // waits for the device
    std::vector<T> values(size_);
    CUDA_CHECK(cudaDeviceSynchronize());
    CUDA_CHECK(cudaMemcpy(values.data(), data_, bytes(), cudaMemcpyDeviceToHost));
    return values;
  }

 private:
  size_t size_;
  void* data_ = nullptr;
};

class CudaTest : public ::testing::Test {
 protected:
  void SetUp() override {
    int count = 0;
    const cudaError_t error = cudaGetDeviceCount(&count);
    if (error == cudaErrorInsufficientDriver || error == cudaErrorNoDevice) {
      GTEST_SKIP() << "no NVIDIA GPU: " << cudaGetErrorName(error);
    }
    CUDA_CHECK(error);  // a GPU that is there and does not answer is a failure
    CUDA_CHECK(cudaStreamCreateWithFlags(&stream_, cudaStreamNonBlocking));
    CUDA_CHECK(cudaDeviceGetAttribute(&num_multiprocessors_, cudaDevAttrMultiProcessorCount, 0));
  }
  void TearDown() override {
    if (stream_ != nullptr) cudaStreamDestroy(stream_);
  }
  void wait() { CUDA_CHECK(cudaStreamSynchronize(stream_)); }

  cudaStream_t stream_ = nullptr;
  int num_multiprocessors_ = 0;
};

}  // namespace kvarn::test
