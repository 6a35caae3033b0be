#include "engine/step_batch.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <numeric>

#include "engine/step_plan.h"

namespace kvarn {
namespace {

using testing::Each;
using testing::ElementsAre;

// One sequence of `tokens` tokens on blocks of its own.
struct OneSequence {
  explicit OneSequence(KvFormat format, int tokens)
      : blocks(make_kv_layout(format, 128), 100, true) {
    EngineRequest request;
    request.prompt.resize(static_cast<size_t>(tokens));
    std::iota(request.prompt.begin(), request.prompt.end(), 1000);
    request.sampling.seed = 7;
    request.stop.max_tokens = 10;
    request.stop.min_tokens = 2;
    request.stop.eos_token_ids = {3};
    request.stop.stop_token_ids = {4};
    state = make_request_state(std::move(request), 0, {}, 1);
    sequence = state->sequences[0].get();
  }
  void add_block(int rows) {
    const auto index = static_cast<int32_t>(sequence->blocks.size());
    sequence->blocks.push_back(blocks.try_new_block(index, rows));
  }
  StepBatch build(const StepPlan& plan) const {
    StepBatch batch;
    build_step_batch(plan, blocks, ReadingRule::kPosition, batch);
    return batch;
  }
  BlockManager blocks;
  std::unique_ptr<RequestState> state;
  Sequence* sequence;
};

TEST(StepBatchTest, APrefillStoresSinkAndTailExactAndCodesTheTilesBetween) {
  OneSequence one(KvFormat::kKvarnK4V2, 300);
  for (const int rows : {128, 128, 44}) one.add_block(rows);
  StepPlan plan;
  plan.prefills.push_back({one.sequence, 0, 300, true});
  const StepBatch batch = one.build(plan);
  EXPECT_EQ(batch.num_rows(), 300);
  EXPECT_EQ(batch.token_ids[299], 1299);
  EXPECT_EQ(batch.positions[299], 299);
  const BlockPages& sink = batch.block_pages[0];
  EXPECT_EQ(batch.slots[0], int64_t{sink[0]} * 27);
  EXPECT_EQ(batch.slots[27], int64_t{sink[1]} * 27);
  EXPECT_EQ(batch.slots[127], int64_t{sink[4]} * 27 + 127 - 4 * 27);
  EXPECT_THAT(std::vector<int64_t>(batch.slots.begin() + 128, batch.slots.begin() + 256), Each(-1));
  EXPECT_EQ(batch.slots[256 + 43], int64_t{batch.block_pages[2][1]} * 27 + 16);
  ASSERT_EQ(batch.encode_in_layer.size(), 1u);
  EXPECT_EQ(batch.encode_in_layer[0].first_row, 128);
  EXPECT_EQ(batch.encode_in_layer[0].target_page, batch.block_pages[1][0]);
  EXPECT_THAT(batch.block_pages[1], ElementsAre(testing::Ge(0), -1, -1, -1, -1));
  EXPECT_TRUE(batch.encode_before.empty());
  EXPECT_THAT(batch.logit_rows, ElementsAre(299));
}

TEST(StepBatchTest, Fp16StoresEveryRow) {
  OneSequence one(KvFormat::kFp16, 256);
  one.add_block(128);
  one.add_block(128);
  StepPlan plan;
  plan.prefills.push_back({one.sequence, 128, 128, false});
  const StepBatch batch = one.build(plan);
  EXPECT_EQ(batch.slots[127], int64_t{batch.block_pages[1][3]} * 32 + 31);
  EXPECT_TRUE(batch.encode_in_layer.empty());
  EXPECT_TRUE(batch.logit_rows.empty()) << "the prompt goes on";
  EXPECT_EQ(batch.sequences[0].first_position, 128);
  EXPECT_EQ(batch.block_pages.size(), 2u);
}

TEST(StepBatchTest, DecodesComeBeforePrefillsAndRowsAreContiguous) {
  OneSequence one(KvFormat::kKvarnK4V2, 30);
  one.add_block(30);
  OneSequence other(KvFormat::kKvarnK4V2, 20);  // its pages do not matter here
  other.sequence->blocks = one.sequence->blocks;
  StepPlan plan;
  plan.prefills.push_back({other.sequence, 0, 20, true});
  plan.decodes.push_back({one.sequence, 29, 1, true});
  const StepBatch batch = one.build(plan);
  EXPECT_EQ(batch.num_decode_sequences, 1);
  ASSERT_EQ(batch.sequences.size(), 2u);
  EXPECT_EQ(batch.sequences[0].first_position, 29);
  EXPECT_EQ(batch.sequences[0].num_rows, 1);
  EXPECT_EQ(batch.sequences[1].first_row, 1);
  EXPECT_EQ(batch.sequences[1].first_block, 1);
  EXPECT_THAT(batch.logit_rows, ElementsAre(0, 20));
}

TEST(StepBatchTest, SamplingRowsCarryTheRequestAndItsOwnTokens) {
  OneSequence one(KvFormat::kFp16, 5);
  one.sequence->tokens.push_back(42);
  const SamplingRow row = sampling_row(*one.sequence);
  EXPECT_EQ(row.seed, 7u);
  EXPECT_EQ(row.output_position, 1u);
  EXPECT_EQ(row.prompt_tokens.size(), 5u);
  EXPECT_THAT(std::vector<int32_t>(row.output_tokens.begin(), row.output_tokens.end()),
              ElementsAre(42));
  EXPECT_THAT(std::vector<int32_t>(row.banned.begin(), row.banned.end()), ElementsAre(3, 4));
  one.sequence->tokens.push_back(43);
  EXPECT_TRUE(sampling_row(*one.sequence).banned.empty()) << "min_tokens are out";
}

TEST(StepBatchTest, AStepOfEncodesAloneHasNoRows) {
  OneSequence one(KvFormat::kKvarnK4V2, 5);
  StepPlan plan;
  EncodeTile tile{.first_row = -1, .source_pages = {1, 2, 3, 4, 5}, .target_page = 9};
  plan.encodes.push_back({0, tile, {}});
  const StepBatch batch = one.build(plan);
  EXPECT_EQ(batch.num_rows(), 0);
  ASSERT_EQ(batch.encode_before.size(), 1u);
  EXPECT_EQ(batch.encode_before[0].target_page, 9);
}

}  // namespace
}  // namespace kvarn
