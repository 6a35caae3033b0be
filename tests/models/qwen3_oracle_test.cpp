// Logits against transformers (tools/oracles/qwen3_logits.py). Pages are fp16, so K and V carry 11
// bits; everything else of the reference path is fp32.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cstring>
#include <iostream>

#include "models/model.h"
#include "models/safetensors.h"
#include "tests/support/sequence_driver.h"
#include "tests/support/tensor_matchers.h"
#include "tests/support/tiny_model.h"

namespace kvarn {
namespace {

constexpr float kFp32Tolerance = 1e-3f;  // of the largest logit; fp16 K and V round by 2^-11
constexpr float kBf16Tolerance = 1e-2f;  // linear() rounds its input to bf16: 2^-9 a value

struct Golden {
  std::vector<int32_t> tokens;
  std::vector<float> logits;  // [tokens, vocab]
};

// Each test writes the weights that the golden run used into a directory of its own.
class Qwen3OracleTest : public ::testing::TestWithParam<const char*> {
 protected:
  void SetUp() override {
    const std::filesystem::path data =
        std::filesystem::path(KVARN_SOURCE_DIR) / "tests/data/qwen3_logits" / GetParam();
    const std::string json = test::read_file(data / "config.json");
    test::write_file(dir_.path() / "config.json", json);
    config_ = parse_model_config(json, GetParam()).value();
    const Safetensors file = Safetensors::open_file(data / "golden.safetensors").value();
    read(file, "tokens", golden_.tokens);
    read(file, "logits", golden_.logits);
    ASSERT_EQ(golden_.logits.size(),
              golden_.tokens.size() * static_cast<size_t>(config_.vocab_size));
    std::vector<int64_t> seed;
    read(file, "seed", seed);
    test::write_weights(dir_.path(), config_, static_cast<uint64_t>(seed.at(0)));
  }

  template <typename T>
  static void read(const Safetensors& file, const std::string& name, std::vector<T>& out) {
    const SafetensorsEntry* entry = file.find(name);
    ASSERT_NE(entry, nullptr) << name;
    out.resize(entry->bytes / sizeof(T));
    std::memcpy(out.data(), entry->data, entry->bytes);
  }

  std::unique_ptr<Model> load(Backend& backend) const {
    return load_model({.path = dir_.path(), .format = LoadFormat::kAuto, .shape = {}}, backend)
        .value();
  }
  int num_tokens() const { return static_cast<int>(golden_.tokens.size()); }

  std::vector<float> one_prefill(const CpuOptions& options) const {
    const std::unique_ptr<Backend> backend = make_cpu_backend(options);
    const std::unique_ptr<Model> model = load(*backend);
    test::SequenceDriver driver(*model, *backend, KvFormat::kFp16, num_tokens(), num_tokens());
    return driver.prefill(golden_.tokens);
  }
  std::vector<float> token_by_token(const CpuOptions& options) const {
    const std::unique_ptr<Backend> backend = make_cpu_backend(options);
    const std::unique_ptr<Model> model = load(*backend);
    test::SequenceDriver driver(*model, *backend, KvFormat::kFp16, num_tokens(), 1);
    std::vector<float> logits;
    for (const int32_t token : golden_.tokens) {
      const std::vector<float> row = driver.decode(token);
      logits.insert(logits.end(), row.begin(), row.end());
    }
    return logits;
  }

  test::TempDir dir_;
  ModelConfig config_;
  Golden golden_;
};

TEST_P(Qwen3OracleTest, OnePrefillWithFp32ActivationsGivesTheLogitsOfTransformers) {
  const auto near = test::near_relative_to_largest(
      one_prefill({.threads = 2, .fp32_activations = true}), golden_.logits, kFp32Tolerance);
  EXPECT_TRUE(near);
  std::cout << GetParam() << ": " << near.message() << "\n";
}

TEST_P(Qwen3OracleTest, DecodingTokenByTokenWithFp32ActivationsGivesThem) {
  EXPECT_TRUE(test::near_relative_to_largest(
      token_by_token({.threads = 2, .fp32_activations = true}), golden_.logits, kFp32Tolerance));
}

TEST_P(Qwen3OracleTest, EveryInstructionSetOfThisHostGivesThem) {
  for (const CpuIsa isa :
       {CpuIsa::kScalar, CpuIsa::kAvx2, CpuIsa::kAvx512, CpuIsa::kAvx512Bf16, CpuIsa::kAmxBf16}) {
    if (!cpu_isa_supported(isa)) {
      std::cout << "skipped on this host: " << cpu_isa_name(isa) << "\n";
      continue;
    }
    const bool rounds = isa == CpuIsa::kAvx512Bf16 || isa == CpuIsa::kAmxBf16;
    const auto near =
        test::near_relative_to_largest(one_prefill({.threads = 2, .isa = isa}), golden_.logits,
                                       rounds ? kBf16Tolerance : kFp32Tolerance);
    EXPECT_TRUE(near) << cpu_isa_name(isa);
    std::cout << GetParam() << ", " << cpu_isa_name(isa) << ": " << near.message() << "\n";
  }
}

// The comparison can fail: one other token at the start shows in every later position.
TEST_P(Qwen3OracleTest, AnotherFirstTokenMovesTheLogitsBeyondTheTolerance) {
  golden_.tokens[0] = (golden_.tokens[0] + 1) % config_.vocab_size;
  const std::vector<float> logits = one_prefill({.threads = 2, .fp32_activations = true});
  const size_t half = logits.size() / 2;
  EXPECT_FALSE(test::near_relative_to_largest(
      std::span(logits).subspan(half), std::span(golden_.logits).subspan(half), kFp32Tolerance));
}

INSTANTIATE_TEST_SUITE_P(Models, Qwen3OracleTest,
                         ::testing::Values("gqa2_tied", "gqa4_untied", "gqa5_untied", "gqa8_tied",
                                           "yarn_gqa2_tied", "head64_gqa2_untied"),
                         [](const auto& name) { return std::string(name.param); });

}  // namespace
}  // namespace kvarn
