#include "engine/config.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <random>

namespace kvarn {
namespace {

using ::testing::HasSubstr;

std::string error_of(const EngineConfig& config) {
  const Status status = config.validate();
  EXPECT_FALSE(status.is_ok());
  return status.message();
}

TEST(EngineConfigTest, DefaultsAreValid) { EXPECT_TRUE(EngineConfig{}.validate().is_ok()); }

TEST(EngineConfigTest, EveryFieldIsVisitedOnce) {
  std::vector<std::string> names;
  const EngineConfig config;
  EngineConfig::visit(config, [&](const char* name, const auto&, const char* help) {
    names.emplace_back(name);
    EXPECT_STRNE(help, "");
  });
  std::sort(names.begin(), names.end());
  EXPECT_EQ(std::adjacent_find(names.begin(), names.end()), names.end());
  EXPECT_EQ(names.size(), 19u);
}

TEST(EngineConfigTest, NamesTheFlagTheValueAndWhatIsAllowed) {
  EngineConfig config;
  config.device = "tpu";
  EXPECT_THAT(error_of(config), HasSubstr("--device must be one of auto, cpu, cuda, got 'tpu'"));
  config = {};
  config.threads = -1;
  EXPECT_THAT(error_of(config), HasSubstr("--threads must be 0..1024, got -1"));
  config = {};
  config.kv_cache_dtype = "int8";
  EXPECT_THAT(error_of(config), HasSubstr("kvarn_k4v2_g128"));
  config = {};
  config.gpu_memory_utilization = 1.5;
  EXPECT_THAT(error_of(config), HasSubstr("--gpu-memory-utilization must be in (0, 1], got 1.5"));
  config = {};
  config.gpu_memory_utilization = std::nan("");
  EXPECT_FALSE(config.validate().is_ok());
  config = {};
  config.max_queue_seconds = std::nan("");
  EXPECT_FALSE(config.validate().is_ok());
  config = {};
  config.engine_stall_seconds = 0;
  EXPECT_THAT(error_of(config), HasSubstr("--engine-stall-seconds"));
  config = {};
  config.tensor_parallel_size = 2;
  EXPECT_THAT(error_of(config), HasSubstr("--tensor-parallel-size must be 1"));
  config = {};
  config.max_queued_requests = 0;
  EXPECT_THAT(error_of(config), HasSubstr("--max-queued-requests"));
  config = {};
  config.reading_rule = "window";
  EXPECT_THAT(error_of(config), HasSubstr("--reading-rule"));
  config = {};
  config.scheduling_policy = "lifo";
  EXPECT_THAT(error_of(config), HasSubstr("--scheduling-policy"));
  config = {};
  config.kv_memory = "lots";
  EXPECT_THAT(error_of(config), HasSubstr("--kv-memory: 'lots' is not a size"));
  config = {};
  config.load_format = "dummy";
  EXPECT_THAT(error_of(config), HasSubstr("--shape"));
  config = {};
  config.shape = "qwen3-8b";
  EXPECT_THAT(error_of(config), HasSubstr("--load-format dummy"));
}

TEST(EngineConfigTest, ATokenBudgetBelowSequencesPlusABlockIsRefused) {
  EngineConfig config;
  config.max_num_seqs = 8;
  config.max_num_batched_tokens = 135;
  EXPECT_THAT(error_of(config), HasSubstr("--max-num-seqs + 128 = 136"));
  config.max_num_batched_tokens = 136;
  EXPECT_TRUE(config.validate().is_ok());
}

TEST(EngineConfigTest, TheDefaultTokenBudgetFollowsTheDeviceAndAlwaysHasRoomForAPrefill) {
  EngineConfig config;
  EXPECT_EQ(token_budget(config), 512);
  config.device = "cuda";
  EXPECT_EQ(token_budget(config), 2048);
  config.max_num_seqs = 4096;
  EXPECT_EQ(token_budget(config), 4224);
  config.max_num_batched_tokens = 5000;
  EXPECT_EQ(token_budget(config), 5000);
}

TEST(ParseBytesTest, ReadsUnitsAndPlainNumbers) {
  EXPECT_EQ(*parse_bytes("8GiB"), uint64_t{8} << 30);
  EXPECT_EQ(*parse_bytes("512MiB"), uint64_t{512} << 20);
  EXPECT_EQ(*parse_bytes("1.5GB"), 1500000000u);
  EXPECT_EQ(*parse_bytes("0.5 KiB"), 512u);
  EXPECT_EQ(*parse_bytes("1000000"), 1000000u);
  EXPECT_EQ(*parse_bytes("2G"), uint64_t{2} << 30);
}

TEST(ParseBytesTest, RefusesWhatIsNoSize) {
  for (const char* text : {"", "GiB", "-1", "-1GiB", "8 gibi", "1e9", "inf", "nan", "0", "0.1",
                           "1..2", "1.2.3GB", "99999999TiB", "8GiB ", "0x10", "."}) {
    EXPECT_FALSE(parse_bytes(text).is_ok()) << text;
  }
}

TEST(ParseBytesTest, RandomTextNeverCrashesAndOnlyYieldsPositiveSizes) {
  std::mt19937 random(7);
  const std::string alphabet = "0123456789.KMGTiB -+exnaf";
  for (int i = 0; i < 20000; ++i) {
    std::string text;
    const size_t length = random() % 9;
    for (size_t j = 0; j < length; ++j) text += alphabet[random() % alphabet.size()];
    const Result<uint64_t> bytes = parse_bytes(text);
    if (bytes) {
      EXPECT_GE(*bytes, 1u) << text;
    } else {
      EXPECT_THAT(bytes.status().message(), HasSubstr("is not a size"));
    }
  }
}

TEST(ResolveKvFormatTest, AutoFollowsTheHeadDim) {
  EXPECT_EQ(*resolve_kv_format("auto", 128), KvFormat::kKvarnK4V2);
  EXPECT_EQ(*resolve_kv_format("auto", 64), KvFormat::kFp16);
  EXPECT_EQ(*resolve_kv_format("fp16", 128), KvFormat::kFp16);
  EXPECT_EQ(*resolve_kv_format("kvarn_k4v4_g128", 128), KvFormat::kKvarnK4V4);
}

TEST(ResolveKvFormatTest, ACodedFormatAtAnotherHeadDimIsRefusedWithBothNumbers) {
  const auto format = resolve_kv_format("kvarn_k4v2_g128", 64);
  ASSERT_FALSE(format.is_ok());
  EXPECT_THAT(format.status().message(), HasSubstr("head_dim 128, this one has 64"));
  EXPECT_FALSE(resolve_kv_format("kvarn", 128).is_ok());
}

}  // namespace
}  // namespace kvarn
