// Decode steps as recordings, on a backend that behaves as a GPU's: which batches are replayed,
// what fills them up, and that neither changes a bit of anybody's result.
#include "engine/step_recordings.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "engine/engine_core.h"
#include "engine/warm_up.h"
#include "kernels/core/log.h"
#include "tests/support/device_like_backend.h"
#include "tests/support/random_tensor.h"
#include "tests/support/recording_sink.h"
#include "tests/support/tiny_model.h"

namespace kvarn {
namespace {

using ::testing::ElementsAre;

TEST(RecordedBatchSizesTest, EndAtTheLargestBatchOr256) {
  EXPECT_THAT(recorded_batch_sizes(1), ElementsAre(1));
  EXPECT_THAT(recorded_batch_sizes(2), ElementsAre(1, 2));
  EXPECT_THAT(recorded_batch_sizes(5), ElementsAre(1, 2, 4, 5));
  EXPECT_THAT(recorded_batch_sizes(32), ElementsAre(1, 2, 4, 8, 16, 24, 32));
  EXPECT_EQ(recorded_batch_sizes(256).size(), 15u);
  EXPECT_EQ(recorded_batch_sizes(1000), recorded_batch_sizes(256));
}

TEST(WarmUpTest, SizesAreTwoToAnOctaveAndEndAtTheLargestStep) {
  EXPECT_THAT(warm_up_sizes(136), ElementsAre(16, 24, 32, 48, 64, 96, 128, 136));
  EXPECT_THAT(warm_up_sizes(128), ElementsAre(16, 24, 32, 48, 64, 96, 128));
  EXPECT_THAT(warm_up_sizes(2048).back(), 2048);
}

TEST(WarmUpTest, PromptsAreNoLongerThanASequenceAndNoMoreThanTheStepHolds) {
  const KvLayout layout = make_kv_layout(KvFormat::kKvarnK4V2, 128);
  const StepBatch batch = warm_up_prefill(layout, 700, /*max_len=*/300, /*max_sequences=*/8);
  EXPECT_EQ(batch.num_rows(), 700);
  ASSERT_EQ(batch.sequences.size(), 3u);
  EXPECT_EQ(batch.sequences[2].first_row, 600);
  EXPECT_EQ(batch.sequences[2].num_rows, 100);
  EXPECT_EQ(batch.sequences[2].first_block, 6);
  EXPECT_EQ(batch.block_pages.size(), 7u);
  EXPECT_EQ(batch.encode_in_layer.size(), 1u);
  EXPECT_EQ(warm_up_prefill(layout, 700, 300, 2).num_rows(), 600);
  for (const BlockPages& pages : batch.block_pages) {
    for (const int32_t page : pages) EXPECT_LT(page, warm_up_pages(layout));
  }
}

StepBatch decodes(int count) {
  StepBatch batch;
  for (int i = 0; i < count; ++i) {
    batch.token_ids.push_back(10 + i);
    batch.positions.push_back(20 + i);
    batch.slots.push_back(30 + i);
    batch.sequences.push_back(
        {.first_row = i, .num_rows = 1, .first_position = 20 + i, .first_block = i});
    batch.block_pages.emplace_back();
    batch.logit_rows.push_back(i);
  }
  batch.num_decode_sequences = count;
  batch.sampling.resize(static_cast<size_t>(count));
  return batch;
}

class StepRecordingsTest : public ::testing::Test {
 protected:
  StepRecordingsTest() {
    StepLimits limits;
    limits.max_rows = limits.max_sequences = limits.max_logit_rows = 300;
    limits.max_blocks = limits.max_encode_tiles = 300;
    backend_.reserve(limits);
  }
  test::DeviceLikeBackend backend_;
};

TEST_F(StepRecordingsTest, EverySizeIsRecordedOnceAndLaunchedInItsReplayOnly) {
  StepRecordings recordings(backend_, 5);
  std::vector<size_t> launched;
  recordings.record([&](const StepInput& input) { launched.push_back(input.token_ids.size()); });
  EXPECT_EQ(backend_.counts->recordings, 4);
  EXPECT_TRUE(launched.empty());
  recordings.replay(4);
  EXPECT_THAT(launched, ElementsAre(4));
}

TEST_F(StepRecordingsTest, ABatchRunsAtTheNextSize) {
  StepRecordings recordings(backend_, 5);
  EXPECT_EQ(recordings.size_for(decodes(1)), 0) << "nothing is recorded yet";
  recordings.record([](const StepInput&) {});
  EXPECT_EQ(recordings.size_for(decodes(1)), 1);
  EXPECT_EQ(recordings.size_for(decodes(3)), 4);
  EXPECT_EQ(recordings.size_for(decodes(5)), 5);
  EXPECT_EQ(recordings.size_for(decodes(6)), 0);
  EXPECT_EQ(recordings.size_for(StepBatch{}), 0) << "a step that only encodes";
  StepBatch mixed = decodes(3);
  mixed.num_decode_sequences = 2;  // the last sequence is a prompt's
  EXPECT_EQ(recordings.size_for(mixed), 0);
  StepBatch silent = decodes(3);
  silent.logit_rows.pop_back();
  EXPECT_EQ(recordings.size_for(silent), 0);
}

TEST_F(StepRecordingsTest, FillersComeAfterTheBatchAndAreStoredNowhere) {
  StepRecordings recordings(backend_, 8);
  const StepBatch batch = decodes(3);
  const StepInput input = recordings.filled(batch, 4);
  EXPECT_THAT(input.token_ids, ElementsAre(10, 11, 12, 0));
  EXPECT_THAT(input.positions, ElementsAre(20, 21, 22, 0));
  EXPECT_THAT(input.slots, ElementsAre(30, 31, 32, -1));
  EXPECT_THAT(input.logit_rows, ElementsAre(0, 1, 2, 3));
  EXPECT_EQ(input.num_decode_sequences, 4);
  ASSERT_EQ(input.sequences.size(), 4u);
  EXPECT_EQ(input.sequences[2].first_block, 2);
  EXPECT_EQ(input.sequences[3].first_row, 3);
  EXPECT_EQ(input.sequences[3].num_rows, 0);
  EXPECT_EQ(input.block_pages.size(), 3u);
}

// Nine requests of awkward lengths on one core; at most five run together, so that batches of every
// size occur, with prompts between them, and blocks fill up while decoding.
struct Answers {
  std::vector<std::vector<int32_t>> tokens;
  std::vector<std::vector<float>> logprobs;
};
Answers run_requests(std::unique_ptr<Backend> backend, const std::filesystem::path& directory) {
  EngineConfig config;
  config.max_num_seqs = 5;
  config.max_num_batched_tokens = 512;
  config.kv_memory = "40MiB";
  auto model = load_model({.path = directory, .format = LoadFormat::kAuto, .shape = {}}, *backend);
  EXPECT_TRUE(model.is_ok()) << model.status().message();
  auto runner = make_model_runner(config, std::move(backend), std::move(*model), nullptr);
  EXPECT_TRUE(runner.is_ok()) << runner.status().message();
  auto core = EngineCore::create(config, std::move(*runner), nullptr).value();
  std::vector<std::shared_ptr<test::RecordingSink>> sinks;
  const int lengths[] = {1, 127, 128, 129, 250, 256, 300, 385, 40};
  for (const int length : lengths) {
    EngineRequest request;
    request.id = sinks.size() + 1;
    request.prompt = test::random_tokens(static_cast<size_t>(length), 512, request.id);
    request.stop.max_tokens = 20 + 37 * (length % 5);
    request.sampling.seed = request.id;
    request.sampling.temperature = length % 2 == 0 ? 0.f : 1.f;
    request.sampling.num_logprobs = 0;
    request.sink = sinks.emplace_back(std::make_shared<test::RecordingSink>());
    core->add(std::move(request));
  }
  while (core->run_step()) {
  }
  EXPECT_EQ(core->blocks().audit(/*idle=*/true), 0);
  EXPECT_GT(core->stats().tiles_encoded, 5u);
  Answers answers;
  for (const auto& sink : sinks) {
    EXPECT_TRUE(sink->over());
    answers.tokens.push_back(sink->tokens());
    answers.logprobs.push_back(sink->logprobs());
  }
  return answers;
}

TEST(RecordedEngineTest, GivesTheBitsOfAnEngineWithoutRecordings) {
  set_log_level(LogLevel::kWarning);
  const test::TempDir dir;
  test::write_tiny_model(dir.path());
  const Answers expected = run_requests(make_cpu_backend({.threads = 2}), dir.path());
  auto backend = std::make_unique<test::DeviceLikeBackend>();
  const auto counts = backend->counts;
  const Answers recorded = run_requests(std::move(backend), dir.path());
  EXPECT_EQ(recorded.tokens, expected.tokens);
  EXPECT_EQ(recorded.logprobs, expected.logprobs);
  EXPECT_EQ(counts->recordings, 4);  // 1, 2, 4, 5
  EXPECT_GT(counts->replays, 100);
}

}  // namespace
}  // namespace kvarn
