#include "engine/model_runner.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "engine/kv_capacity.h"
#include "tests/support/random_tensor.h"
#include "tests/support/sequence_driver.h"
#include "tests/support/tiny_model.h"

namespace kvarn {
namespace {

using ::testing::AllOf;
using ::testing::HasSubstr;

std::unique_ptr<Model> tiny_model(Backend& backend, const test::TinyModelOptions& options = {}) {
  const test::TempDir dir;
  test::write_tiny_model(dir.path(), options);
  return load_model({.path = dir.path(), .format = LoadFormat::kAuto, .shape = {}}, backend)
      .value();
}

EngineConfig small_config() {
  EngineConfig config;
  config.max_num_seqs = 4;
  config.max_num_batched_tokens = 256;
  config.kv_memory = "8MiB";
  return config;
}

Result<std::unique_ptr<ModelRunner>> make(const EngineConfig& config, MemoryPlan* plan = nullptr,
                                          const test::TinyModelOptions& options = {}) {
  std::unique_ptr<Backend> backend = make_cpu_backend({.threads = 2});
  std::unique_ptr<Model> model = tiny_model(*backend, options);
  return make_model_runner(config, std::move(backend), std::move(model), plan);
}

// Positions [first, first + n) of one sequence in its sink block, with logits of the last row.
StepBatch sink_rows(std::span<const int32_t> tokens, int first, const KvLayout& layout) {
  StepBatch batch;
  batch.token_ids.assign(tokens.begin(), tokens.end());
  BlockPages pages;
  pages.fill(-1);
  for (size_t i = 0; i < tokens.size(); ++i) {
    const int position = first + static_cast<int>(i);
    batch.positions.push_back(position);
    batch.slots.push_back(position);  // pages 0, 1, ... hold the block's rows in order
  }
  const int end = first + static_cast<int>(tokens.size());
  for (int page = 0; page < layout.exact_pages(end); ++page) {
    pages[static_cast<size_t>(page)] = page;
  }
  batch.sequences = {{.first_row = 0,
                      .num_rows = static_cast<int32_t>(tokens.size()),
                      .first_position = first,
                      .first_block = 0}};
  batch.num_decode_sequences = first > 0 ? 1 : 0;
  batch.block_pages = {pages};
  batch.logit_rows = {static_cast<int32_t>(tokens.size()) - 1};
  batch.sampling.resize(1);
  batch.sampling[0].temperature = 0;
  return batch;
}

TEST(ModelRunnerTest, ThePoolIsTheWholePagesThatFitInKvMemory) {
  MemoryPlan plan;
  EngineConfig config = small_config();
  config.kv_memory = "1000000";
  const auto runner = make(config, &plan);
  ASSERT_TRUE(runner.is_ok()) << runner.status().message();
  EXPECT_EQ(plan.page_id_bytes, 13824u * 2 * 2);  // 2 layers, 2 KV heads
  EXPECT_EQ(plan.num_pages, 18);
  EXPECT_EQ(plan.pool_bytes, 18u * 13824 * 4);
  EXPECT_EQ((*runner)->num_pages(), 18);
  EXPECT_EQ((*runner)->kv_layout().format, KvFormat::kKvarnK4V2);
  EXPECT_EQ((*runner)->vocab_size(), 512);
  EXPECT_EQ((*runner)->model_max_len(), 4096);
}

TEST(ModelRunnerTest, WithoutKvMemoryThePoolIsCappedByWhatTheSequencesCanUse) {
  MemoryPlan plan;
  EngineConfig config = small_config();
  config.kv_memory = "";
  config.max_model_len = 1000;
  ASSERT_TRUE(make(config, &plan).is_ok());
  EXPECT_EQ(plan.num_pages, 4 * peak_pages(make_kv_layout(KvFormat::kKvarnK4V2, 128), 1000));
}

TEST(ModelRunnerTest, APoolTooSmallForOneBlockSaysHowMuchItNeeds) {
  EngineConfig config = small_config();
  config.kv_memory = "100KB";
  const auto runner = make(config);
  ASSERT_FALSE(runner.is_ok());
  EXPECT_EQ(runner.status().code(), StatusCode::kResourceExhausted);
  EXPECT_THAT(runner.status().message(), AllOf(HasSubstr("holds 1 pages"), HasSubstr("needs 6"),
                                               HasSubstr("--kv-memory to at least 331776 bytes")));
}

TEST(ModelRunnerTest, MoreKvMemoryThanTheHostHasIsRefused) {
  EngineConfig config = small_config();
  config.kv_memory = "100TiB";
  const auto runner = make(config);
  ASSERT_FALSE(runner.is_ok());
  EXPECT_THAT(runner.status().message(), AllOf(HasSubstr("100TiB"), HasSubstr("free memory")));
}

TEST(ModelRunnerTest, AKvarnFormatAtAnotherHeadSizeIsRefusedAndAutoTakesFp16) {
  test::TinyModelOptions options;
  options.head_dim = 64;
  EngineConfig config = small_config();
  config.kv_cache_dtype = "kvarn_k4v2_g128";
  EXPECT_FALSE(make(config, nullptr, options).is_ok());
  config.kv_cache_dtype = "auto";
  const auto runner = make(config, nullptr, options);
  ASSERT_TRUE(runner.is_ok());
  EXPECT_EQ((*runner)->kv_layout().format, KvFormat::kFp16);
}

TEST(ModelRunnerTest, StepsGiveTheGreedyTokensOfTheModel) {
  const std::vector<int32_t> prompt = test::random_tokens(40, 512, 3);
  const std::unique_ptr<Backend> backend = make_cpu_backend({.threads = 2});
  const std::unique_ptr<Model> model = tiny_model(*backend);
  test::SequenceDriver driver(*model, *backend, KvFormat::kKvarnK4V2, 128, 128);
  driver.want_logits_of({39});
  const auto argmax = [](const std::vector<float>& logits) {
    return static_cast<int32_t>(std::max_element(logits.begin(), logits.end()) - logits.begin());
  };
  int32_t expected = argmax(driver.prefill(prompt));
  driver.want_logits_of({0});

  const auto runner = make(small_config()).value();
  const KvLayout layout = runner->kv_layout();
  const StepBatch prefill = sink_rows(prompt, 0, layout);
  int32_t token = runner->run(prefill).get().tokens.at(0).token;
  EXPECT_EQ(token, expected);
  for (int position = 40; position < 60; ++position) {
    const StepBatch step = sink_rows({&token, 1}, position, layout);
    const int32_t next = runner->run(step).get().tokens.at(0).token;
    expected = argmax(driver.decode(token));
    ASSERT_EQ(next, expected) << position;
    token = next;
  }
}

TEST(ModelRunnerTest, AStepWithoutRowsMayEncodeAndTellsHowLongItTook) {
  const auto runner = make(small_config()).value();
  StepBatch batch;
  EncodeTile tile{.first_row = -1, .source_pages = {0, 1, 2, 3, 4}, .target_page = 5};
  batch.encode_before = {tile};
  const auto before = std::chrono::steady_clock::now();
  const StepResult result = runner->run(batch).get();
  EXPECT_TRUE(result.tokens.empty());
  EXPECT_GT(result.encode_seconds, 0.0);
  EXPECT_GE(runner->last_progress(), before);
}

// A model whose forward() fails on demand.
class FailingModel final : public Model {
 public:
  explicit FailingModel(ModelConfig config) : config_(std::move(config)) {}
  const ModelConfig& config() const override { return config_; }
  size_t workspace_bytes(int, int) const override { return 64; }
  void forward(const StepInput& input, const KvCacheView&, Arena&, Tensor logits,
               ForwardProgress*) override {
    if (!input.token_ids.empty() && input.token_ids[0] == 1) throw std::runtime_error("broken");
    if (!input.token_ids.empty() && input.token_ids[0] == 2) throw DeviceLost("gone");
    std::fill_n(logits.data<float>(), logits.size(), 0.f);
    if (logits.size() > 7) logits.data<float>()[7] = 1.f;
  }
  size_t weight_bytes() const override { return 0; }

 private:
  ModelConfig config_;
};

TEST(ModelRunnerTest, AFailedStepIsAnExceptionInItsFutureAndTheNextStepRuns) {
  std::unique_ptr<Backend> backend = make_cpu_backend({.threads = 1});
  const ModelConfig config = parse_model_config(test::tiny_config_json({}), "config.json").value();
  const auto runner = make_model_runner(small_config(), std::move(backend),
                                        std::make_unique<FailingModel>(config), nullptr)
                          .value();
  const auto run = [&](int32_t token) {
    const StepBatch batch = sink_rows({&token, 1}, 0, runner->kv_layout());
    return runner->run(batch).get().tokens.at(0).token;
  };
  EXPECT_THROW(run(1), std::runtime_error);
  EXPECT_EQ(run(0), 7);
  EXPECT_THROW(run(2), DeviceLost);
  EXPECT_EQ(run(0), 7);
}

}  // namespace
}  // namespace kvarn
