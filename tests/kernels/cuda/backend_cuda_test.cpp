// The GPU behind the seam: each op through Backend against the CPU backend (the families are tested
// one by one beside this file), steps, recordings, and what start-up refuses.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cmath>
#include <cstring>
#include <numeric>
#include <set>

#include "kernels/backend.h"
#include "tests/support/device_pages.h"
#include "tests/support/random_tensor.h"
#include "tests/support/tensor_matchers.h"

namespace kvarn {
namespace {

using ::testing::HasSubstr;

// One rounding to bf16 is at most 2^-9 of a value; two backends that round the same fp32 number, up
// to another order of summation, to bf16 differ by one unit at most.
constexpr float kOneBf16Unit = 0x1p-8f;

std::vector<float> floats(std::span<const bf16> values) {
  std::vector<float> out(values.size());
  std::transform(values.begin(), values.end(), out.begin(), [](bf16 x) { return to_float(x); });
  return out;
}

class BackendCudaTest : public ::testing::Test {
 protected:
  void SetUp() override {
    Result<std::unique_ptr<Backend>> made = make_cuda_backend(0);
    if (!made.is_ok() && made.status().code() == StatusCode::kUnavailable) {
      GTEST_SKIP() << made.status().message();
    }
    ASSERT_TRUE(made.is_ok()) << made.status().message();
    gpu_ = std::move(made).value();
    limits_.max_rows = 512;
    limits_.max_logit_rows = 64;
    limits_.max_sequences = 64;
    limits_.max_blocks = 512;
    limits_.max_encode_tiles = 132;
    limits_.max_model_len = 1024;
    limits_.hidden = 256;
    limits_.q_heads = 8;
    limits_.kv_heads = 2;
    limits_.head_dim = 128;
    limits_.ffn = 512;
    limits_.vocab = 1000;
    limits_.layout = make_kv_layout(KvFormat::kKvarnK4V2, 128);
    gpu_->reserve(limits_);
  }

  // On the GPU, with the values given or poisoned with NaN.
  template <typename T>
  Tensor put(const std::vector<T>& values, std::initializer_list<int64_t> shape) {
    const Tensor tensor = make(DTypeOf<T>::value, shape);
    CHECK(static_cast<size_t>(tensor.size()) == values.size(), "values for the shape");
    gpu_->upload(values.data(), tensor.bytes(), buffers_.back(), 0);
    return tensor;
  }
  Tensor make(DType dtype, std::initializer_list<int64_t> shape) {
    const size_t bytes = Tensor(nullptr, dtype, shape).bytes();
    buffers_.push_back(gpu_->allocate(std::max<size_t>(bytes, 16)));
    const std::vector<uint8_t> poison(bytes, 0xff);
    gpu_->upload(poison.data(), bytes, buffers_.back(), 0);
    return {buffers_.back().data(), dtype, shape};
  }
  template <typename T>
  std::vector<T> get(const Tensor& tensor) {
    std::vector<T> values(static_cast<size_t>(tensor.size()));
    gpu_->download(tensor.raw(), tensor.bytes(), values.data());
    return values;
  }

  std::unique_ptr<Backend> gpu_;
  std::unique_ptr<Backend> cpu_ = make_cpu_backend({.threads = 2, .fp32_activations = true});
  StepLimits limits_;
  std::vector<Buffer> buffers_;
};

TEST_F(BackendCudaTest, SaysWhatItIs) {
  EXPECT_THAT(gpu_->name(), HasSubstr("cuda ("));
  EXPECT_THAT(gpu_->name(), HasSubstr("compute capability"));
  EXPECT_EQ(gpu_->activation_dtype(), DType::kBF16);
  ASSERT_TRUE(gpu_->device_memory().has_value());
}

TEST_F(BackendCudaTest, ADeviceThatDoesNotExistIsRefusedWithTheirNumber) {
  for (const int device : {-1, 99}) {
    const auto backend = make_cuda_backend(device);
    ASSERT_FALSE(backend.is_ok());
    EXPECT_EQ(backend.status().code(), StatusCode::kInvalidArgument);
    EXPECT_THAT(backend.status().message(), HasSubstr("this machine has"));
  }
}

TEST_F(BackendCudaTest, MemoryIsCountedGivenBackAndRefused) {
  const size_t before = gpu_->device_memory()->free_bytes;
  constexpr size_t kBytes = size_t{256} << 20;
  {
    const Buffer memory = gpu_->allocate(kBytes);
    EXPECT_LE(gpu_->device_memory()->free_bytes, before - kBytes);
  }
  EXPECT_GE(gpu_->device_memory()->free_bytes, before);
  EXPECT_EQ(gpu_->allocate(0).data(), nullptr);
  EXPECT_THROW(gpu_->allocate(size_t{1} << 50), std::bad_alloc);
  EXPECT_EQ(get<float>(put(std::vector<float>{1.f, 2.f}, {2})), (std::vector<float>{1.f, 2.f}))
      << "works after a refusal";
}

TEST_F(BackendCudaTest, RandomWeightsAreTheCpus) {
  std::vector<bf16> expected(100'003);
  for (const float stddev : {0.02f, 1.f, 0.02f}) {
    cpu_->fill_normal(Tensor::of(expected.data(), {100'003}), stddev, 7);
    const Tensor filled = make(DType::kBF16, {100'003});
    gpu_->fill_normal(filled, stddev, 7);
    EXPECT_EQ(floats(get<bf16>(filled)), floats(expected));
  }
}

TEST_F(BackendCudaTest, EmbedNormsAndResidualsAreTheCpus) {
  const int64_t hidden = 256, vocab = 1000;
  auto table = test::random_bf16(static_cast<size_t>(vocab * hidden), 1);
  auto gains = test::random_bf16(static_cast<size_t>(hidden), 2, 0.5f, 1.5f);
  for (const int64_t rows : {1, 7, 129}) {
    const auto n = static_cast<size_t>(rows * hidden);
    const std::vector<int32_t> ids = test::random_tokens(static_cast<size_t>(rows), 1000, 3);
    auto delta = test::random_bf16(n, 4);
    std::vector<float> x(n), y(n), wide = floats(delta);
    const auto t = [&](std::vector<float>& v) { return Tensor::of(v.data(), {rows, hidden}); };
    const Tensor cpu_gains = Tensor::of(gains.data(), {hidden});
    cpu_->embed(ids.data(), Tensor::of(table.data(), {vocab, hidden}), t(x));
    cpu_->rms_norm(t(x), cpu_gains, 1e-6f, t(y));

    const Tensor gx = make(DType::kF32, {rows, hidden}), gy = make(DType::kBF16, {rows, hidden});
    const Tensor gpu_gains = put(gains, {hidden}), gpu_delta = put(delta, {rows, hidden});
    gpu_->embed(put(ids, {rows}).data<int32_t>(), put(table, {vocab, hidden}), gx);
    gpu_->rms_norm(gx, gpu_gains, 1e-6f, gy);
    EXPECT_TRUE(test::bitwise_equal(get<float>(gx), x)) << "rows of a table are copied";
    EXPECT_TRUE(test::near_relative_to_largest(floats(get<bf16>(gy)), y, kOneBf16Unit));

    cpu_->add_rms_norm(t(x), t(wide), cpu_gains, 1e-6f, t(y));
    gpu_->add_rms_norm(gx, gpu_delta, gpu_gains, 1e-6f, gy);
    EXPECT_TRUE(test::bitwise_equal(get<float>(gx), x)) << "one fp32 addition";
    EXPECT_TRUE(test::near_relative_to_largest(floats(get<bf16>(gy)), y, kOneBf16Unit));
    cpu_->add(t(x), t(wide));
    gpu_->add(gx, gpu_delta);
    EXPECT_TRUE(test::bitwise_equal(get<float>(gx), x));
  }
}

TEST_F(BackendCudaTest, LinearSiluAndGatherAreTheCpus) {
  const int64_t k = 256, ffn = 512;
  auto gate = test::random_bf16(static_cast<size_t>(ffn * k), 1, -0.1f, 0.1f);
  auto up = test::random_bf16(static_cast<size_t>(ffn * k), 2, -0.1f, 0.1f);
  std::vector<bf16> both = gate;
  both.insert(both.end(), up.begin(), up.end());
  const Tensor gpu_both = put(both, {2 * ffn, k});
  LinearWeight on_gpu, on_cpu;
  on_gpu.parts = {gpu_both.rows(0, ffn), gpu_both.rows(ffn, ffn)};
  on_cpu.parts = {Tensor::of(gate.data(), {ffn, k}), Tensor::of(up.data(), {ffn, k})};
  on_gpu.num_parts = on_cpu.num_parts = 2;
  for (const int64_t rows : {1, 3, 8, 9, 130}) {
    auto x = test::random_bf16(static_cast<size_t>(rows * k), 3);
    std::vector<float> wide = floats(x), y(static_cast<size_t>(rows * 2 * ffn)),
                       h(static_cast<size_t>(rows * ffn));
    cpu_->linear(Tensor::of(wide.data(), {rows, k}), on_cpu, Tensor::of(y.data(), {rows, 2 * ffn}));
    const Tensor gx = put(x, {rows, k}), gy = make(DType::kBF16, {rows, 2 * ffn});
    const Tensor logits = make(DType::kF32, {rows, 2 * ffn});
    gpu_->linear(gx, on_gpu, gy);
    gpu_->linear(gx, on_gpu, logits);
    EXPECT_TRUE(test::near_relative_to_largest(floats(get<bf16>(gy)), y, kOneBf16Unit)) << rows;
    // fp32 sums of 256 exact products, in another order.
    EXPECT_TRUE(test::near_relative_to_largest(get<float>(logits), y, 1e-5f)) << rows;

    std::vector<float> rounded = floats(get<bf16>(gy));
    cpu_->silu_mul(Tensor::of(rounded.data(), {rows, 2 * ffn}), Tensor::of(h.data(), {rows, ffn}));
    const Tensor gh = make(DType::kBF16, {rows, ffn});
    gpu_->silu_mul(gy, gh);
    EXPECT_TRUE(test::near_relative_to_largest(floats(get<bf16>(gh)), h, kOneBf16Unit)) << rows;

    const std::vector<int32_t> kept = {0, static_cast<int32_t>(rows - 1)};
    const Tensor gathered = make(DType::kBF16, {2, ffn});
    const Tensor gpu_kept = put(kept, {2});
    gpu_->gather_rows(gh, {gpu_kept.data<int32_t>(), 2}, gathered);
    const std::vector<float> all = floats(get<bf16>(gh)), two = floats(get<bf16>(gathered));
    for (size_t i = 0; i < two.size(); ++i) {
      const size_t row = static_cast<size_t>(kept[i / static_cast<size_t>(ffn)]);
      ASSERT_EQ(two[i], all[row * static_cast<size_t>(ffn) + i % static_cast<size_t>(ffn)]);
    }
  }
}

// A prompt of two blocks and a bit goes through rotation, pages, coding and attention on both.
TEST_F(BackendCudaTest, TheWayThroughPagesIsTheCpus) {
  constexpr int kRows = 300, kQHeads = 8, kKvHeads = 2, kDim = 128, kPages = 16;
  const KvLayout& layout = limits_.layout;
  auto qkv = test::random_bf16(size_t{kRows} * (kQHeads + 2 * kKvHeads) * kDim, 1, -2.f, 2.f);
  auto gains = test::random_bf16(kDim, 2, 0.5f, 1.5f);
  const std::vector<float> angles = test::random_floats(size_t{kRows} * kDim / 2, 3, 0.f, 6.f);
  std::vector<float> cosines(angles.size()), sines(angles.size());
  for (size_t i = 0; i < angles.size(); ++i) {
    cosines[i] = std::cos(angles[i]);
    sines[i] = std::sin(angles[i]);
  }
  // Block 0 exact in pages 0 to 4, block 1 coded in page 5, the tail in pages 6 and 7.
  std::vector<int32_t> positions(kRows);
  std::iota(positions.begin(), positions.end(), 0);
  std::vector<int64_t> slots(kRows, -1);
  std::vector<BlockPages> table(3);
  table[0] = {0, 1, 2, 3, 4};
  table[1] = {5, -1, -1, -1, -1};
  table[2] = {6, 7, -1, -1, -1};
  for (int row = 0; row < kRows; ++row) {
    const int block = row / 128, in_block = row % 128;
    if (block == 1) continue;
    const int page = table[static_cast<size_t>(block)][static_cast<size_t>(in_block / 27)];
    slots[static_cast<size_t>(row)] = int64_t{page} * layout.exact_rows + in_block % 27;
  }
  EncodeTile tile{.first_row = 128, .source_pages = {}, .target_page = 5};
  tile.source_pages.fill(-1);
  const AttentionSequence sequence{
      .first_row = 0, .num_rows = kRows, .first_position = 0, .first_block = 0};
  StepInput host;
  host.token_ids = positions;  // any ids
  host.positions = positions;
  host.slots = slots;
  host.sequences = {&sequence, 1};
  host.block_pages = table;
  host.encode_in_layer = {&tile, 1};

  struct Result {
    std::vector<float> q, k, v, out;
    std::vector<std::byte> pool;
  };
  const size_t pool_bytes = size_t{kPages} * kKvHeads * static_cast<size_t>(layout.page_bytes);
  const auto run = [&](Backend& backend, Tensor t_qkv, Tensor t_gains, RopeTable rope, Tensor q,
                       Tensor k, Tensor v, Tensor out, std::byte* pool) {
    const StepInput step = backend.begin_step(host, {});
    backend.qk_norm_rope_rotate({.qkv = t_qkv,
                                 .positions = step.positions.data(),
                                 .rope = rope,
                                 .q_norm = t_gains,
                                 .k_norm = t_gains,
                                 .eps = 1e-6f,
                                 .rotate = true,
                                 .q_heads = kQHeads,
                                 .kv_heads = kKvHeads,
                                 .head_dim = kDim,
                                 .q = q,
                                 .k = k,
                                 .v = v});
    const KvLayerView layer{pool, kPages, kKvHeads, layout};
    backend.kv_encode({.k = k, .v = v, .tiles = step.encode_in_layer, .layers = {&layer, 1}});
    backend.kv_write({.k = k, .v = v, .slots = step.slots.data(), .layer = layer});
    backend.attention_prefill({.q = q,
                               .k_rows = k,
                               .v_rows = v,
                               .sequences = step.sequences,
                               .block_pages = step.block_pages.data(),
                               .layer = layer,
                               .q_heads = kQHeads,
                               .scale = 1.f / std::sqrt(128.f),
                               .out = out});
    return backend.end_step({});
  };
  const std::initializer_list<int64_t> q_shape = {kRows, kQHeads, kDim},
                                       kv_shape = {kRows, kKvHeads, kDim};
  std::vector<float> wide = floats(qkv), q(size_t{kRows} * kQHeads * kDim), out(q.size());
  std::vector<half> k(size_t{kRows} * kKvHeads * kDim), v(k.size());
  std::vector<std::byte> pool(pool_bytes);
  run(*cpu_, Tensor::of(wide.data(), {kRows, (kQHeads + 2 * kKvHeads) * kDim}),
      Tensor::of(gains.data(), {kDim}),
      {Tensor::of(cosines.data(), {kRows, kDim / 2}), Tensor::of(sines.data(), {kRows, kDim / 2})},
      Tensor::of(q.data(), q_shape), Tensor::of(k.data(), kv_shape), Tensor::of(v.data(), kv_shape),
      Tensor::of(out.data(), {kRows, kQHeads * kDim}), pool.data());

  const Tensor gq = make(DType::kF16, q_shape), gk = make(DType::kF16, kv_shape),
               gv = make(DType::kF16, kv_shape), gout = make(DType::kBF16, {kRows, kQHeads * kDim});
  const Tensor gpool = make(DType::kU8, {static_cast<int64_t>(pool_bytes)});
  const StepTimes times =
      run(*gpu_, put(qkv, {kRows, (kQHeads + 2 * kKvHeads) * kDim}), put(gains, {kDim}),
          {put(cosines, {kRows, kDim / 2}), put(sines, {kRows, kDim / 2})}, gq, gk, gv, gout,
          static_cast<std::byte*>(gpool.raw()));
  EXPECT_GT(times.encode_seconds, 0.0);
  EXPECT_LT(times.encode_seconds, 1.0);

  const auto widen = [](const std::vector<half>& values) {
    std::vector<float> f(values.size());
    std::transform(values.begin(), values.end(), f.begin(), [](half x) { return to_float(x); });
    return f;
  };
  // fp32 inside, one rounding to fp16 (2^-11 of a value).
  EXPECT_TRUE(test::near_relative_to_largest(widen(get<half>(gq)), q, 0x1p-10f));
  EXPECT_TRUE(test::near_relative_to_largest(widen(get<half>(gk)), widen(k), 0x1p-10f));
  EXPECT_TRUE(test::near_relative_to_largest(widen(get<half>(gv)), widen(v), 0x1p-10f));
  // Codes may differ by one step where a value lies between two; 2-bit steps are coarse. The mean
  // of hundreds of values moves far less than one of them; a wrong row or page moves it more.
  EXPECT_TRUE(test::near_relative_to_largest(floats(get<bf16>(gout)), out, 3e-2f));
  // Exact pages: the rows, in the GPU's order.
  const std::vector<uint8_t> gpu_pool = get<uint8_t>(gpool);
  for (const int page : {0, 4, 6}) {
    for (int head = 0; head < kKvHeads; ++head) {
      const size_t at =
          static_cast<size_t>(page * kKvHeads + head) * static_cast<size_t>(layout.page_bytes);
      const std::vector<std::byte> plain =
          test::exact_page_to_cpu(layout, reinterpret_cast<const std::byte*>(gpu_pool.data()) + at);
      const int rows = page == 4 ? 20 : 27;
      for (int i = 0; i < rows * kDim; ++i) {
        half a, b;
        std::memcpy(&a, plain.data() + 2 * i, 2);
        std::memcpy(&b, pool.data() + at + static_cast<size_t>(2 * i), 2);
        ASSERT_NEAR(to_float(a), to_float(b), 0x1p-8f) << page << " " << head << " " << i;
      }
    }
  }
}

TEST_F(BackendCudaTest, ChosenTokensAreTheCpus) {
  constexpr int kRows = 40, kVocab = 1000;
  std::vector<SamplingRow> rows(kRows);
  const std::vector<int32_t> output = {3, 5, 5, 900};
  for (size_t i = 0; i < rows.size(); ++i) {
    rows[i].temperature = i % 3 == 0 ? 0.f : 0.7f;
    rows[i].top_k = i % 4 == 1 ? 20 : 0;
    rows[i].top_p = i % 5 == 2 ? 0.9f : 1.f;
    rows[i].seed = i;
    rows[i].output_position = static_cast<uint32_t>(i);
    rows[i].num_logprobs = i % 2 == 0 ? 3 : -1;
    if (i % 7 == 0) {
      rows[i].output_tokens = output;
      rows[i].presence_penalty = 1.f;
    }
  }
  const std::vector<float> logits = test::random_floats(size_t{kRows} * kVocab, 5, -4.f, 4.f);
  std::vector<int32_t> logit_rows(kRows);
  std::iota(logit_rows.begin(), logit_rows.end(), 0);
  StepInput host;
  host.token_ids = host.positions = logit_rows;
  host.logit_rows = logit_rows;
  std::vector<SampledToken> expected(kRows), chosen(kRows);
  std::vector<float> scratch = logits;
  cpu_->begin_step(host, rows);
  cpu_->sample(Tensor::of(scratch.data(), {kRows, kVocab}));
  cpu_->end_step(expected);
  const Tensor on_gpu = put(logits, {kRows, kVocab});
  gpu_->begin_step(host, rows);
  gpu_->sample(on_gpu);
  gpu_->end_step(chosen);
  for (size_t i = 0; i < rows.size(); ++i) {
    EXPECT_EQ(chosen[i].token, expected[i].token) << i;
    EXPECT_FALSE(chosen[i].non_finite);
    if (rows[i].num_logprobs < 0) continue;
    EXPECT_NEAR(chosen[i].logprob, expected[i].logprob, 1e-4f);
    EXPECT_EQ(chosen[i].top_logprobs.size(), 3u);
  }
}

// A step of two rows over fixed tensors, for the tests of recordings.
class RecordingTest : public BackendCudaTest {
 protected:
  void SetUp() override {
    BackendCudaTest::SetUp();
    if (IsSkipped()) return;
    table_ = put(test::random_bf16(size_t{1000} * 256, 1), {1000, 256});
    gains_ = put(test::random_bf16(256, 2, 0.5f, 1.5f), {256});
    x_ = make(DType::kF32, {2, 256});
    y_ = make(DType::kBF16, {2, 256});
    logits_ = make(DType::kF32, {2, 1000});
    head_.parts[0] = table_;
    head_.num_parts = 1;
  }
  void launch(const StepInput& step) {
    gpu_->embed(step.token_ids.data(), table_, x_);
    gpu_->rms_norm(x_, gains_, 1e-6f, y_);
    gpu_->linear(y_, head_, logits_);
    gpu_->sample(logits_);
  }
  StepInput begin(const std::vector<int32_t>& tokens) {
    StepInput host;
    host.token_ids = host.positions = tokens;
    host.logit_rows = logit_rows_;
    return gpu_->begin_step(host, sampling_);
  }
  std::vector<int32_t> end() {
    std::vector<SampledToken> tokens(2);
    gpu_->end_step(tokens);
    return {tokens[0].token, tokens[1].token};
  }

  Tensor table_, gains_, x_, y_, logits_;
  LinearWeight head_;
  const std::vector<int32_t> logit_rows_ = {0, 1};
  std::vector<SamplingRow> sampling_ = std::vector<SamplingRow>(2);
};

TEST_F(RecordingTest, AReplayIsTheEagerStepBitForBitOnOtherContents) {
  const std::vector<int32_t> first = {5, 900}, second = {17, 3};
  launch(begin(first));
  end();
  const StepInput step = begin(first);
  const std::unique_ptr<Recording> recording = gpu_->record([&] { launch(step); });
  end();
  ASSERT_NE(recording, nullptr);
  for (const auto& tokens : {second, first}) {
    launch(begin(tokens));
    const std::vector<int32_t> expected = end();
    const std::vector<float> expected_logits = get<float>(logits_);
    for (const Tensor& t : {x_, logits_}) {  // the replay has to write them
      const std::vector<uint8_t> poison(t.bytes(), 0xff);
      Buffer view(t.raw(), t.bytes(), [](void*, size_t) {});
      gpu_->upload(poison.data(), t.bytes(), view, 0);
    }
    begin(tokens);
    recording->replay();
    EXPECT_EQ(end(), expected);
    EXPECT_TRUE(test::bitwise_equal(get<float>(logits_), expected_logits));
  }
}

TEST_F(RecordingTest, SamplingOfAReplayFollowsTheStepsRows) {
  const std::vector<int32_t> tokens = {5, 900};
  launch(begin(tokens));
  end();
  const StepInput step = begin(tokens);
  const auto recording = gpu_->record([&] { launch(step); });
  end();
  sampling_[0].temperature = 30.f;  // flat enough for other tokens than the best
  std::set<int32_t> seen;
  for (uint64_t seed = 0; seed < 20; ++seed) {
    sampling_[0].seed = seed;
    launch(begin(tokens));
    const std::vector<int32_t> expected = end();
    begin(tokens);
    recording->replay();
    const std::vector<int32_t> replayed = end();
    EXPECT_EQ(replayed, expected);
    seen.insert(replayed[0]);
  }
  EXPECT_GT(seen.size(), 5u) << "the seeds reach the replay";
}

TEST_F(RecordingTest, AFailureWhileRecordingEndsItAndTheNextStepRuns) {
  const std::vector<int32_t> tokens = {5, 900};
  launch(begin(tokens));
  const std::vector<int32_t> expected = end();
  const StepInput step = begin(tokens);
  EXPECT_THROW(gpu_->record([&] {
    launch(step);
    throw std::runtime_error("broken on the way");
  }),
               std::runtime_error);
  // Waiting is what a capture forbids: the recording fails as a whole.
  EXPECT_THROW(gpu_->record([&] {
    launch(step);
    float value;
    gpu_->download(logits_.raw(), sizeof(value), &value);
  }),
               std::runtime_error);
  launch(begin(tokens));  // the step above was never ended
  EXPECT_EQ(end(), expected);
  const StepInput again = begin(tokens);
  const auto recording = gpu_->record([&] { launch(again); });
  end();
  begin(tokens);
  recording->replay();
  EXPECT_EQ(end(), expected);
}

TEST_F(RecordingTest, LimitsCanBeChangedAndChangedBack) {
  const std::vector<int32_t> tokens = {5, 900};
  launch(begin(tokens));
  const std::vector<int32_t> expected = end();
  StepLimits other = limits_;
  other.layout = make_kv_layout(KvFormat::kFp16, 128);
  gpu_->reserve(other);
  const size_t free_bytes = gpu_->device_memory()->free_bytes;
  for (const StepLimits& limits : {limits_, other, limits_}) {
    gpu_->reserve(limits);
    launch(begin(tokens));
    EXPECT_EQ(end(), expected);
  }
  EXPECT_EQ(gpu_->device_memory()->free_bytes, free_bytes) << "changing back takes nothing";
}

}  // namespace
}  // namespace kvarn
