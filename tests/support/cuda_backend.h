// The GPU for tests that need a backend: nullptr (and the reason) where there is none.
#pragma once

#include <gtest/gtest.h>

#include <cstdlib>
#include <memory>
#include <string>

#include "kernels/backend.h"

namespace kvarn::test {

class CudaBackendTest : public ::testing::Test {
 protected:
  void SetUp() override {
    gpu_ = make_gpu();
    if (gpu_ == nullptr && !HasFatalFailure()) GTEST_SKIP() << reason_;
  }
  std::unique_ptr<Backend> make_gpu() {
    Result<std::unique_ptr<Backend>> made = make_cuda_backend(0);
    if (made.is_ok()) return std::move(made).value();
    reason_ = made.status().message();
    EXPECT_EQ(made.status().code(), StatusCode::kUnavailable) << reason_;
    return nullptr;
  }
  std::unique_ptr<Backend> gpu_;
  std::string reason_;
};

// The trained model of this repository; KVARN_DEMO_MODEL names it on a machine that has only
// binaries.
inline std::string demo_model() {
  const char* path = std::getenv("KVARN_DEMO_MODEL");
  return path != nullptr ? path : KVARN_SOURCE_DIR "/assets/demo-model";
}

}  // namespace kvarn::test
