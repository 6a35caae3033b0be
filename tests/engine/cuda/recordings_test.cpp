// Recorded decode steps of a real model on the GPU: the bits of the eager step, filled up or not.
#include <gtest/gtest.h>

#include "engine/kv_pool.h"
#include "engine/step_recordings.h"
#include "kernels/core/log.h"
#include "models/model.h"
#include "tests/support/cuda_backend.h"
#include "tests/support/random_tensor.h"
#include "tests/support/tensor_matchers.h"
#include "tests/support/tiny_model.h"

namespace kvarn {
namespace {

constexpr int kMaxSeqs = 24, kVocab = 512;
constexpr int kPagesEach = 16;  // of a sequence's own

// Sequences whose pages hold noise, each at its own position: what a decode step computes from them
// is arbitrary and must still be the same bits.
class RecordingsTest : public test::CudaBackendTest,
                       public ::testing::WithParamInterface<KvFormat> {
 protected:
  void SetUp() override {
    set_log_level(LogLevel::kWarning);
    CudaBackendTest::SetUp();
    if (IsSkipped()) return;
    const test::TempDir dir;
    test::write_tiny_model(dir.path());
    model_ =
        load_model({.path = dir.path(), .format = LoadFormat::kAuto, .shape = {}}, *gpu_).value();
    const KvLayout layout = make_kv_layout(GetParam(), 128);
    const StepLimits limits =
        make_step_limits(model_->config(), layout, 1024, kMaxSeqs + 128, kMaxSeqs, kMaxSeqs);
    gpu_->reserve(limits);
    arena_ = Arena(gpu_->allocate(model_->workspace_bytes(limits.max_rows, limits.max_logit_rows) +
                                  size_t{kMaxSeqs} * kVocab * sizeof(float)));
    pool_.emplace(*gpu_, layout, 2, 2, kMaxSeqs * kPagesEach);
    fill_pool(layout);
  }
  // Small values in every half and code: no NaN, no infinity, scales of both signs.
  void fill_pool(const KvLayout& layout) {
    const size_t bytes = pool_->bytes();
    const std::vector<float> noise = test::random_floats(bytes / 2, 11, -0.5f, 0.5f);
    std::vector<half> values(noise.size());
    std::transform(noise.begin(), noise.end(), values.begin(), [](float x) { return to_half(x); });
    Buffer view(pool_->view().layers[0].data, bytes, [](void*, size_t) {});
    gpu_->upload(values.data(), bytes, view, 0);
    CHECK(bytes == 2 * KvPool::page_id_bytes(layout, 1, 2) * size_t{kMaxSeqs} * kPagesEach, "size");
  }
  StepBatch decodes(int count, int step) {
    const KvLayout& layout = pool_->layout();
    StepBatch batch;
    for (int i = 0; i < count; ++i) {
      const int position = (37 * i + 90 * step) % 700;
      const int own = position / kBlockTokens;
      int page = i * kPagesEach;
      batch.sequences.push_back({.first_row = i,
                                 .num_rows = 1,
                                 .first_position = position,
                                 .first_block = static_cast<int32_t>(batch.block_pages.size())});
      for (int block = 0; block <= own; ++block) {
        BlockPages pages;
        pages.fill(-1);
        const bool coded = reads_coded(block, position, position) && layout.coded();
        // Pages may repeat: they are read only, but for the row's own.
        for (int n = 0; n < (coded ? 1 : layout.pages_per_exact_block); ++n) {
          pages[static_cast<size_t>(n)] = i * kPagesEach + page++ % kPagesEach;
        }
        batch.block_pages.push_back(pages);
      }
      const int row = position % kBlockTokens;
      const int own_page = batch.block_pages.back()[static_cast<size_t>(row / layout.exact_rows)];
      batch.token_ids.push_back((i * 31 + step) % kVocab);
      batch.positions.push_back(position);
      batch.slots.push_back(int64_t{own_page} * layout.exact_rows + row % layout.exact_rows);
      batch.logit_rows.push_back(i);
    }
    batch.num_decode_sequences = count;
    batch.sampling.resize(static_cast<size_t>(count));
    return batch;
  }
  void launch(const StepInput& input) {
    arena_.reset();
    logits_ = arena_.tensor(DType::kF32, {static_cast<int64_t>(input.logit_rows.size()), kVocab});
    model_->forward(input, pool_->view(), arena_, logits_, nullptr);
    gpu_->sample(logits_);
  }
  std::vector<float> logits_of(int rows) {
    std::vector<float> values(static_cast<size_t>(rows) * kVocab);
    gpu_->download(arena_.take(0), values.size() * sizeof(float), values.data());
    return values;
  }
  std::vector<int32_t> end(int count) {
    std::vector<SampledToken> tokens(static_cast<size_t>(count));
    gpu_->end_step(tokens);
    std::vector<int32_t> ids;
    for (const SampledToken& token : tokens) {
      EXPECT_FALSE(token.non_finite);
      ids.push_back(token.token);
    }
    return ids;
  }

  std::unique_ptr<Model> model_;
  Arena arena_;
  std::optional<KvPool> pool_;
  Tensor logits_;
};

TEST_P(RecordingsTest, AReplayIsTheEagerStepBitForBit) {
  StepRecordings recordings(*gpu_, kMaxSeqs);
  const auto step = [this](const StepInput& input) { launch(input); };
  recordings.warm_up(step);
  const size_t before = gpu_->device_memory()->free_bytes;
  recordings.record(step);
  std::cout << recorded_batch_sizes(kMaxSeqs).size() << " recordings of 2 layers took "
            << static_cast<double>(before - gpu_->device_memory()->free_bytes) / (1 << 20)
            << " MiB\n";
  for (const int count : {1, 2, 3, 8, 13, 24}) {
    for (int i = 0; i < 3; ++i) {
      const StepBatch batch = decodes(count, i);
      const int size = recordings.size_for(batch);
      ASSERT_GE(size, count);
      // Twice the same step: it writes its rows' K and V to the same places.
      launch(gpu_->begin_step(recordings.filled(batch, size), batch.sampling));
      const std::vector<int32_t> expected = end(count);
      arena_.reset();
      const std::vector<float> eager = logits_of(count);
      std::vector<uint8_t> poison(eager.size() * sizeof(float), 0xff);
      Buffer view(logits_.raw(), poison.size(), [](void*, size_t) {});
      gpu_->upload(poison.data(), poison.size(), view, 0);

      gpu_->begin_step(recordings.filled(batch, size), batch.sampling);
      recordings.replay(size);
      EXPECT_EQ(end(count), expected);
      EXPECT_TRUE(test::bitwise_equal(logits_of(count), eager)) << count << " at size " << size;
    }
  }
}

INSTANTIATE_TEST_SUITE_P(Formats, RecordingsTest,
                         ::testing::Values(KvFormat::kFp16, KvFormat::kKvarnK4V2,
                                           KvFormat::kKvarnK4V4),
                         [](const auto& f) { return std::string(kv_format_name(f.param)); });

}  // namespace
}  // namespace kvarn
