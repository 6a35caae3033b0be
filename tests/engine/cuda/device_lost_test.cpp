// The device goes while requests run: everybody is answered and the engine says that it failed. In
// a process of its own, since the context does not come back.
#include <gtest/gtest.h>

#include <atomic>

#include "engine/engine.h"
#include "kernels/core/log.h"
#include "models/model.h"
#include "tests/support/cuda_backend.h"
#include "tests/support/random_tensor.h"
#include "tests/support/recording_sink.h"
#include "tests/support/tiny_model.h"

namespace kvarn {
namespace {

constexpr size_t kLong = 40;  // rows of a step: only a prompt has as many

// Reads where nothing is in the first step of a long prompt once it is `armed`.
class FatalModel final : public Model {
 public:
  FatalModel(std::unique_ptr<Model> model, Backend& backend, const std::atomic<bool>& armed)
      : model_(std::move(model)), backend_(backend), armed_(armed) {}
  const ModelConfig& config() const override { return model_->config(); }
  size_t workspace_bytes(int rows, int logit_rows) const override {
    return model_->workspace_bytes(rows, logit_rows) + 4096;
  }
  void forward(const StepInput& input, const KvCacheView& kv, Arena& arena, Tensor logits,
               ForwardProgress* progress) override {
    if (armed_ && input.token_ids.size() >= kLong) {
      const Tensor out = arena.tensor(DType::kF32, {1, config().hidden_size});
      const Tensor table(out.raw(), DType::kBF16, {1, config().hidden_size});
      backend_.embed(reinterpret_cast<const int32_t*>(uintptr_t{1} << 60), table, out);
    }
    model_->forward(input, kv, arena, logits, progress);
  }
  size_t weight_bytes() const override { return model_->weight_bytes(); }

 private:
  std::unique_ptr<Model> model_;
  Backend& backend_;
  const std::atomic<bool>& armed_;
};

class CudaDeviceLostTest : public test::CudaBackendTest {};

TEST_F(CudaDeviceLostTest, EveryClientIsAnsweredAndTheEngineHasFailed) {
  set_log_level(LogLevel::kOff);
  const test::TempDir dir;
  test::write_tiny_model(dir.path());
  auto model =
      load_model({.path = dir.path(), .format = LoadFormat::kAuto, .shape = {}}, *gpu_).value();
  EngineConfig config;
  config.max_num_seqs = 4;
  config.max_num_batched_tokens = 256;
  config.kv_memory = "64MiB";
  Backend& gpu = *gpu_;
  std::atomic<bool> armed{false};
  auto fatal = std::make_unique<FatalModel>(std::move(model), gpu, armed);
  auto runner = make_model_runner(config, std::move(gpu_), std::move(fatal), nullptr);
  ASSERT_TRUE(runner.is_ok()) << runner.status().message();
  auto engine = Engine::create(config, std::move(runner).value(), nullptr).value();

  const auto submit = [&](size_t length, int max_tokens) {
    EngineRequest request;
    request.id = engine->next_request_id();
    request.prompt = test::random_tokens(length, 512, request.id);
    request.stop.max_tokens = max_tokens;
    const auto sink = std::make_shared<test::RecordingSink>();
    request.sink = sink;
    EXPECT_TRUE(engine->submit(std::move(request)).is_ok());
    return sink;
  };
  const auto first = submit(8, 4000);
  ASSERT_TRUE(first->wait_tokens(20));
  armed = true;
  const auto second = submit(kLong, 100);
  for (const auto& sink : {first, second}) {
    ASSERT_TRUE(sink->wait_over());
    ASSERT_TRUE(sink->error().has_value());
    EXPECT_EQ(sink->error()->reason(), "engine_unavailable");
  }
  EXPECT_GE(first->tokens().size(), 20u);
  ASSERT_TRUE(engine->wait_idle(std::chrono::seconds(5)));
  EngineRequest late;
  late.id = engine->next_request_id();
  late.prompt = {1};
  late.stop.max_tokens = 1;
  late.sink = std::make_shared<test::RecordingSink>();
  EXPECT_FALSE(engine->submit(std::move(late)).is_ok());
  EXPECT_EQ(engine->stats().state, EngineState::kFailed);
}

}  // namespace
}  // namespace kvarn
