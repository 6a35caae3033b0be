// A kernel that reads where nothing is ends the device: a process of its own, since nothing works
// in this one afterwards.
#include <gtest/gtest.h>

#include "kernels/backend.h"

namespace kvarn {
namespace {

TEST(DeviceLostTest, AnIllegalAccessIsDeviceLostNowAndEverAfter) {
  Result<std::unique_ptr<Backend>> made = make_cuda_backend(0);
  if (!made.is_ok() && made.status().code() == StatusCode::kUnavailable) {
    GTEST_SKIP() << made.status().message();
  }
  ASSERT_TRUE(made.is_ok()) << made.status().message();
  Backend& gpu = **made;
  StepLimits limits;
  limits.max_rows = limits.max_logit_rows = limits.max_sequences = 4;
  limits.max_blocks = limits.max_encode_tiles = 4;
  limits.max_model_len = 128;
  limits.q_heads = limits.kv_heads = 2;
  limits.head_dim = 128;
  limits.hidden = limits.ffn = 64;
  limits.vocab = 32;
  limits.layout = make_kv_layout(KvFormat::kKvarnK4V2, 128);
  gpu.reserve(limits);
  Buffer table = gpu.allocate(32 * 64 * 2), out = gpu.allocate(64 * 4);
  gpu.begin_step({}, {});
  // Token ids are trusted, so that a bad pointer is all it takes.
  gpu.embed(reinterpret_cast<const int32_t*>(uintptr_t{1} << 60),
            Tensor(table.data(), DType::kBF16, {32, 64}), Tensor(out.data(), DType::kF32, {1, 64}));
  EXPECT_THROW(gpu.end_step({}), DeviceLost);
  EXPECT_THROW(gpu.begin_step({}, {}), DeviceLost);
  float value;
  EXPECT_THROW(gpu.download(out.data(), sizeof(value), &value), DeviceLost);
}

}  // namespace
}  // namespace kvarn
