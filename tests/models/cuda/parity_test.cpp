// A whole forward() on the GPU against the CPU in fp32: prefill chunks, decodes across the borders
// of blocks, every KV format.
//
// What may differ: the GPU rounds activations to bf16 between ops (2^-9 of a value each time, some
// ten times a layer) and q to fp16; in coded formats a value that lies between two codes may take
// the other one. Measures are relative to the logits' power and by what a reader of the model sees,
// the distribution of the next token.
#include <gtest/gtest.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <iostream>

#include "kernels/core/log.h"
#include "models/model.h"
#include "tests/support/cuda_backend.h"
#include "tests/support/random_tensor.h"
#include "tests/support/sequence_driver.h"
#include "tests/support/tiny_model.h"

namespace kvarn {
namespace {

struct Difference {
  double power = 0;    // of the difference, relative to the power of the reference
  double mean_kl = 0;  // KL(reference || other) of the next token, nats
  int rows = 0;
};

Difference compare(std::span<const float> reference, std::span<const float> other, size_t vocab) {
  Difference result;
  double signal = 0, noise = 0;
  for (size_t at = 0; at + vocab <= reference.size(); at += vocab) {
    const auto a = reference.subspan(at, vocab), b = other.subspan(at, vocab);
    const auto log_sum = [](std::span<const float> x) {
      const double top = *std::max_element(x.begin(), x.end());
      double sum = 0;
      for (const float value : x) sum += std::exp(double{value} - top);
      return top + std::log(sum);
    };
    const double za = log_sum(a), zb = log_sum(b);
    for (size_t i = 0; i < vocab; ++i) {
      const double d = double{a[i]} - double{b[i]};
      signal += double{a[i]} * double{a[i]};
      noise += d * d;
      const double log_p = double{a[i]} - za;
      result.mean_kl += std::exp(log_p) * (log_p - (double{b[i]} - zb));
    }
    ++result.rows;
  }
  result.power = noise / signal;
  result.mean_kl /= std::max(result.rows, 1);
  return result;
}

class ParityTest : public test::CudaBackendTest {
 protected:
  void SetUp() override {
    set_log_level(LogLevel::kWarning);
    CudaBackendTest::SetUp();
  }
  // Feeds `tokens` to both: `prompt` of them in chunks, the rest one by one; all logits, or those
  // of the decodes.
  Difference run(const ModelSource& source, KvFormat format, const std::vector<int32_t>& tokens,
                 int prompt, int chunk, bool decodes_only = false) {
    const auto cpu = make_cpu_backend({.threads = 0, .fp32_activations = true});
    Difference result;
    std::vector<float> logits[2];
    Backend* backends[] = {cpu.get(), gpu_.get()};
    size_t vocab = 0;
    for (int i = 0; i < 2; ++i) {
      auto model = load_model(source, *backends[i]);
      EXPECT_TRUE(model.is_ok()) << model.status().message();
      if (!model.is_ok()) return result;
      vocab = static_cast<size_t>((*model)->config().vocab_size);
      test::SequenceDriver driver(**model, *backends[i], format, static_cast<int>(tokens.size()),
                                  chunk);
      logits[i] =
          driver.prefill_in_chunks(std::span(tokens).first(static_cast<size_t>(prompt)), chunk);
      if (decodes_only) logits[i].clear();
      driver.want_logits_of({0});
      for (size_t at = static_cast<size_t>(prompt); at < tokens.size(); ++at) {
        const std::vector<float> row = driver.decode(tokens[at]);
        logits[i].insert(logits[i].end(), row.begin(), row.end());
      }
    }
    return compare(logits[0], logits[1], vocab);
  }
};

struct TinyCase {
  const char* name;
  int hidden, q_heads, kv_heads, ffn;
  KvFormat format;
  DType dtype;
};

class TinyParityTest : public ParityTest, public ::testing::WithParamInterface<TinyCase> {};

TEST_P(TinyParityTest, LogitsAreThoseOfTheCpuUpToRounding) {
  const TinyCase& p = GetParam();
  test::TinyModelOptions options;
  options.hidden_size = p.hidden;
  options.intermediate_size = p.ffn;
  options.num_q_heads = p.q_heads;
  options.num_kv_heads = p.kv_heads;
  options.dtype = p.dtype;
  options.tied_embeddings = p.hidden != 128;
  const test::TempDir dir;
  test::write_tiny_model(dir.path(), options);
  const ModelSource source{.path = dir.path(), .format = LoadFormat::kAuto, .shape = {}};
  for (const auto& [length, prompt, chunk] : {std::array{1, 1, 128},
                                              {128, 127, 128},
                                              {131, 128, 128},
                                              {400, 253, 256},
                                              {520, 385, 128},
                                              {300, 0, 128}}) {
    const std::vector<int32_t> tokens =
        test::random_tokens(static_cast<size_t>(length), options.vocab_size, 5);
    const Difference d = run(source, p.format, tokens, prompt, chunk);
    EXPECT_EQ(d.rows, length);
    RecordProperty("power", std::to_string(d.power));
    std::cout << p.name << " length " << length << " prompt " << prompt << " chunk " << chunk
              << ": difference " << 100 * std::sqrt(d.power) << " % of the logits, KL " << d.mean_kl
              << "\n";
    // Measured on an H100: 0.7 % (fp16), 1.1 % (k4v4), 2.0 % (k4v2) at most; the CPU with bf16
    // activations is 0.5, 0.8 and 1.5 % from itself in fp32. A wrong row or page gives far more.
    EXPECT_LT(std::sqrt(d.power), p.format == KvFormat::kFp16        ? 0.015
                                  : p.format == KvFormat::kKvarnK4V4 ? 0.025
                                                                     : 0.04);
  }
}

INSTANTIATE_TEST_SUITE_P(
    Models, TinyParityTest,
    ::testing::Values(TinyCase{"fp16_g2", 64, 4, 2, 128, KvFormat::kFp16, DType::kBF16},
                      TinyCase{"k4v2_g2", 64, 4, 2, 128, KvFormat::kKvarnK4V2, DType::kBF16},
                      TinyCase{"k4v4_g2", 64, 4, 2, 128, KvFormat::kKvarnK4V4, DType::kBF16},
                      TinyCase{"k4v2_g1", 128, 2, 2, 256, KvFormat::kKvarnK4V2, DType::kBF16},
                      TinyCase{"k4v2_g5", 320, 5, 1, 256, KvFormat::kKvarnK4V2, DType::kF32},
                      TinyCase{"k4v2_g8", 256, 8, 1, 512, KvFormat::kKvarnK4V2, DType::kF16}),
    [](const auto& c) { return std::string(c.param.name); });

// Real widths: 28 layers, 151,936 ids, random weights. One chunk, then decodes over a border.
TEST_F(ParityTest, APublicShapeIsReadAsOnTheCpu) {
  const ModelSource source{.path = {},
                           .format = LoadFormat::kDummy,
                           .shape = "qwen3-0.6b",
                           .max_model_len = 512,
                           .dummy_seed = 1};
  const std::vector<int32_t> tokens = test::random_tokens(260, 151'936, 4);
  const Difference d = run(source, KvFormat::kKvarnK4V2, tokens, 250, 256);
  std::cout << "qwen3-0.6b: difference " << 100 * std::sqrt(d.power) << " % of the logits, KL "
            << d.mean_kl << "\n";
  EXPECT_EQ(d.rows, 260);
  EXPECT_LT(std::sqrt(d.power), 0.02);
}

class DemoParityTest : public ParityTest, public ::testing::WithParamInterface<KvFormat> {
 protected:
  const ModelSource source_{
      .path = test::demo_model(), .format = LoadFormat::kAuto, .shape = {}, .max_model_len = 2048};
};

// Random ids are no text: the model is unsure at every token, which shows differences largest.
TEST_P(DemoParityTest, RandomTokensAreReadAsOnTheCpu) {
  const std::vector<int32_t> tokens = test::random_tokens(900, 6000, 3);
  const Difference d = run(source_, GetParam(), tokens, 640, 512);
  std::cout << kv_format_name(GetParam()) << ": difference " << 100 * std::sqrt(d.power)
            << " % of the logits, KL " << d.mean_kl << "\n";
  EXPECT_EQ(d.rows, 900);
  // Coding turns roundings that fall on a border between two codes into a step of a code, on any
  // device: the CPU with bf16 activations is 0.0045 (k4v2) and 0.0023 (k4v4) from itself in fp32.
  EXPECT_LE(d.mean_kl, GetParam() == KvFormat::kFp16 ? 1e-3 : 0.015);
}

// What the model says itself, as it is served: greedy, from random prompts.
TEST_P(DemoParityTest, ItsOwnTextsAreReadAsOnTheCpu) {
  constexpr int kPrompts = 4, kPrompt = 200, kLength = 500;
  double kl = 0;
  for (uint64_t seed = 1; seed <= kPrompts; ++seed) {
    std::vector<int32_t> tokens = test::random_tokens(kPrompt, 6000, seed);
    const auto cpu = make_cpu_backend({.threads = 0, .fp32_activations = true});
    const auto model = load_model(source_, *cpu).value();
    test::SequenceDriver driver(*model, *cpu, GetParam(), kLength, kPrompt);
    driver.want_logits_of({kPrompt - 1});
    std::vector<float> logits = driver.prefill(tokens);
    driver.want_logits_of({0});
    while (tokens.size() < kLength) {
      tokens.push_back(
          static_cast<int32_t>(std::max_element(logits.begin(), logits.end()) - logits.begin()));
      logits = driver.decode(tokens.back());
    }
    kl += run(source_, GetParam(), tokens, kPrompt, 256, /*decodes_only=*/true).mean_kl / kPrompts;
  }
  std::cout << kv_format_name(GetParam()) << ": KL " << kl << "\n";
  EXPECT_LE(kl, 1e-3);
}

INSTANTIATE_TEST_SUITE_P(Formats, DemoParityTest,
                         ::testing::Values(KvFormat::kFp16, KvFormat::kKvarnK4V2,
                                           KvFormat::kKvarnK4V4),
                         [](const auto& f) { return std::string(kv_format_name(f.param)); });

}  // namespace
}  // namespace kvarn
