#include "engine/memory_plan.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "engine/kv_capacity.h"

namespace kvarn {
namespace {

using ::testing::AllOf;
using ::testing::HasSubstr;

constexpr size_t kGiB = size_t{1} << 30;

// 8B: 36 layers of 8 KV heads.
PoolDemand demand(int max_len = 40960) {
  const KvLayout layout = make_kv_layout(KvFormat::kKvarnK4V2, 128);
  return {layout, max_len, size_t{13824} * 36 * 8};
}
constexpr DeviceMemory kAfterWeights{.free_bytes = 60 * kGiB, .total_bytes = 80 * kGiB};

TEST(MemoryPlanTest, APoolOnAGpuGetsTheShareLessWhatIsTaken) {
  EngineConfig config;
  config.max_num_seqs = 4096;  // so that nothing else bounds it
  config.gpu_memory_utilization = 0.9;
  const int64_t pages = device_pool_pages(config, demand(), kAfterWeights).value();
  const size_t budget = 72 * kGiB - 20 * kGiB - kDeviceMarginBytes;
  EXPECT_EQ(pages, static_cast<int64_t>(budget / demand().page_id_bytes));
}

TEST(MemoryPlanTest, APoolOnAGpuIsNoLargerThanItsSequencesCanUse) {
  EngineConfig config;
  config.max_num_seqs = 4;
  EXPECT_EQ(device_pool_pages(config, demand(1000), kAfterWeights).value(),
            4 * peak_pages(demand().layout, 1000));
}

TEST(MemoryPlanTest, KvMemoryOverridesTheShare) {
  EngineConfig config;
  config.kv_memory = "55GiB";
  EXPECT_EQ(device_pool_pages(config, demand(), kAfterWeights).value(),
            static_cast<int64_t>(55 * kGiB / demand().page_id_bytes));
}

TEST(MemoryPlanTest, MoreKvMemoryThanIsLeftIsRefusedWithWhatFits) {
  EngineConfig config;
  config.kv_memory = "60GiB";
  const auto pages = device_pool_pages(config, demand(), kAfterWeights);
  ASSERT_FALSE(pages.is_ok());
  EXPECT_EQ(pages.status().code(), StatusCode::kResourceExhausted);
  EXPECT_THAT(pages.status().message(),
              AllOf(HasSubstr("--kv-memory 60GiB"),
                    HasSubstr(std::to_string(60 * kGiB - kDeviceMarginBytes) + " bytes fit")));
  // What it names does fit.
  config.kv_memory = std::to_string(60 * kGiB - kDeviceMarginBytes);
  EXPECT_TRUE(device_pool_pages(config, demand(), kAfterWeights).is_ok());
}

TEST(MemoryPlanTest, AShareBelowWhatIsTakenIsRefusedWithTheShareThatWouldDo) {
  EngineConfig config;
  config.gpu_memory_utilization = 0.2;
  const auto pages = device_pool_pages(config, demand(), kAfterWeights);
  ASSERT_FALSE(pages.is_ok());
  // 20.25 GiB are taken and 6 pages of 3.8 MiB are needed: 0.2534 of 80 GiB.
  EXPECT_THAT(pages.status().message(),
              AllOf(HasSubstr("--gpu-memory-utilization (0.20, at least 0.254)"),
                    HasSubstr("of the GPU's 81920.0 MiB")));
  config.gpu_memory_utilization = 0.254;
  EXPECT_TRUE(device_pool_pages(config, demand(), kAfterWeights).is_ok());
}

TEST(MemoryPlanTest, AHostPoolTooSmallSaysHowMuchItNeeds) {
  EngineConfig config;
  config.kv_memory = "1MiB";
  const auto pages = host_pool_pages(config, demand(), 0);
  ASSERT_FALSE(pages.is_ok());
  EXPECT_THAT(pages.status().message(),
              HasSubstr(std::to_string(6 * demand().page_id_bytes) + " bytes"));
}

}  // namespace
}  // namespace kvarn
