// A whole engine on the GPU with the trained demo model: the texts of the CPU up to near-ties,
// however the work is scheduled, and nothing allocated on the way.
#include <cuda_runtime_api.h>
#include <gtest/gtest.h>

#include <atomic>
#include <iostream>

#include "engine/kv_capacity.h"
#include "kernels/core/log.h"
#include "tests/support/cuda_backend.h"
#include "tests/support/engine_run.h"
#include "tests/support/forwarding_backend.h"
#include "tests/support/random_tensor.h"

namespace {
std::atomic<int64_t> g_allocations{0};
}  // namespace

// Linked with --wrap: every call of these in the program comes here first.
extern "C" {
cudaError_t __real_cudaMalloc(void** data, size_t bytes);
cudaError_t __wrap_cudaMalloc(void** data, size_t bytes) {
  ++g_allocations;
  return __real_cudaMalloc(data, bytes);
}
cudaError_t __real_cudaHostAlloc(void** data, size_t bytes, unsigned flags);
cudaError_t __wrap_cudaHostAlloc(void** data, size_t bytes, unsigned flags) {
  ++g_allocations;
  return __real_cudaHostAlloc(data, bytes, flags);
}
cudaError_t __real_cudaMallocHost(void** data, size_t bytes);
cudaError_t __wrap_cudaMallocHost(void** data, size_t bytes) {
  ++g_allocations;
  return __real_cudaMallocHost(data, bytes);
}
cudaError_t __real_cudaMallocAsync(void** data, size_t bytes, cudaStream_t stream);
cudaError_t __wrap_cudaMallocAsync(void** data, size_t bytes, cudaStream_t stream) {
  ++g_allocations;
  return __real_cudaMallocAsync(data, bytes, stream);
}
}

namespace kvarn {
namespace {

constexpr int kVocab = 6000;  // ids of ordinary tokens of the demo model
constexpr int kMaxTokens = 128;

// Records nothing, so that every step runs eagerly.
class EagerBackend final : public test::ForwardingBackend {
 public:
  using ForwardingBackend::ForwardingBackend;
  std::unique_ptr<Recording> record(const std::function<void()>&) override { return nullptr; }
};

EngineConfig demo_config() {
  EngineConfig config;
  config.device = "cuda";
  config.max_num_seqs = 64;
  config.max_model_len = 2048;
  config.kv_memory = "512MiB";
  return config;
}

// 64 prompts of 16 to 700 tokens; `shared` of them at the front are the same for all.
std::vector<std::vector<int32_t>> prompts(int count, int shared = 0) {
  std::vector<std::vector<int32_t>> all;
  const std::vector<int32_t> prefix = test::random_tokens(static_cast<size_t>(shared), kVocab, 999);
  for (int i = 0; i < count; ++i) {
    std::vector<int32_t> prompt = prefix;
    const auto own = static_cast<size_t>(16 + 97 * i % 685);
    for (const int32_t token : test::random_tokens(own, kVocab, static_cast<uint64_t>(i + 1))) {
      prompt.push_back(token);
    }
    all.push_back(std::move(prompt));
  }
  return all;
}

class CudaServingTest : public test::CudaBackendTest {
 protected:
  void SetUp() override {
    set_log_level(LogLevel::kWarning);
    CudaBackendTest::SetUp();
  }
};

TEST_F(CudaServingTest, TextsAreTheCpusUpToNearTies) {
  const auto cpu = test::run_greedy(demo_config(), make_cpu_backend({}), test::demo_model(),
                                    prompts(64), kMaxTokens);
  const auto gpu =
      test::run_greedy(demo_config(), std::move(gpu_), test::demo_model(), prompts(64), kMaxTokens);
  EXPECT_EQ(gpu.stats.tiles_encoded, cpu.stats.tiles_encoded);
  EXPECT_GT(gpu.stats.tiles_encoded, 100u);
  const test::Agreement agreement = test::compare_texts(cpu.texts, gpu.texts);
  std::cout << agreement << "\n";
  EXPECT_GT(agreement.compared, 1000);
  EXPECT_GE(agreement.share(), 0.99);
  // bf16 activations of eight layers move log-probabilities by this much; see also models/cuda.
  EXPECT_LE(agreement.mean_logprob_difference, 0.05);
}

TEST_F(CudaServingTest, RecordedAndEagerStepsGiveTheSameTexts) {
  const auto recorded =
      test::run_greedy(demo_config(), make_gpu(), test::demo_model(), prompts(40), kMaxTokens);
  const auto eager =
      test::run_greedy(demo_config(), std::make_unique<EagerBackend>(std::move(gpu_)),
                       test::demo_model(), prompts(40), kMaxTokens);
  // Not bit for bit: an eager batch is not filled up, and another number of rows may take another
  // kernel. The same rows are compared bit for bit in recordings_test.cpp.
  const test::Agreement agreement = test::compare_texts(eager.texts, recorded.texts);
  std::cout << agreement << "\n";
  EXPECT_GT(agreement.compared, 600);
  EXPECT_GE(agreement.share(), 0.99);
}

TEST_F(CudaServingTest, PreemptionsAndPrefixHitsChangeNoText) {
  const auto requests = prompts(24, /*shared=*/300);
  EngineConfig alone = demo_config();
  alone.max_num_seqs = 1;
  alone.enable_prefix_caching = false;
  const auto expected =
      test::run_greedy(alone, make_gpu(), test::demo_model(), requests, kMaxTokens);
  EXPECT_EQ(expected.stats.preemptions, 0u);

  EngineConfig crowded = demo_config();
  crowded.max_num_seqs = 16;
  int steps = 0;
  const auto pushed = test::run_greedy(
      crowded, std::move(gpu_), test::demo_model(), requests, kMaxTokens, [&](EngineCore& core) {
        const auto& running = core.scheduler().running();
        if (++steps % 9 == 0 && !running.empty()) {
          core.scheduler().preempt(running[static_cast<size_t>(steps) % running.size()]->id);
        }
        if (steps % 5 == 0) core.scheduler().set_token_budget(16 + 128 * (1 + steps % 7));
      });
  EXPECT_GT(pushed.stats.preemptions, 20u);
  EXPECT_GT(pushed.stats.prefix_hits, 256u * 15);
  const test::Agreement agreement = test::compare_texts(expected.texts, pushed.texts);
  std::cout << agreement << ", " << pushed.stats.preemptions << " preemptions, "
            << pushed.stats.prefix_hits << " tokens from the cache\n";
  EXPECT_GT(agreement.compared, 400);
  EXPECT_GE(agreement.share(), 0.99);
}

TEST_F(CudaServingTest, NothingIsAllocatedWhileServing) {
  int64_t at_start = -1;
  int steps = 0;
  const auto run = test::run_greedy(demo_config(), std::move(gpu_), test::demo_model(), prompts(40),
                                    kMaxTokens, [&](EngineCore&) {
                                      ++steps;
                                      if (at_start < 0)
                                        at_start = g_allocations;  // first step done
                                      EXPECT_EQ(g_allocations, at_start) << "in step " << steps;
                                    });
  EXPECT_GT(at_start, 10) << "the counter counts";
  EXPECT_GT(run.stats.steps_decode, 100u);
  EXPECT_GT(run.stats.steps_mixed + run.stats.steps_prefill, 2u);
}

TEST_F(CudaServingTest, ThePoolIsTheShareOfTheDevice) {
  EngineConfig config = demo_config();
  config.kv_memory = "";
  config.max_num_seqs = 256;
  config.max_model_len = 16384;
  config.gpu_memory_utilization = 0.3;
  auto model = load_model({.path = test::demo_model(),
                           .format = LoadFormat::kAuto,
                           .shape = {},
                           .max_model_len = 16384},
                          *gpu_);
  ASSERT_TRUE(model.is_ok()) << model.status().message();
  Backend& gpu = *gpu_;  // the runner keeps it
  MemoryPlan plan;
  const auto runner = make_model_runner(config, std::move(gpu_), std::move(*model), &plan);
  ASSERT_TRUE(runner.is_ok()) << runner.status().message();
  const DeviceMemory after = *gpu.device_memory();
  const double taken = static_cast<double>(after.total_bytes - after.free_bytes) /
                       static_cast<double>(after.total_bytes);
  std::cout << "weights " << plan.weight_bytes << ", workspace " << plan.workspace_bytes
            << ", pool " << plan.pool_bytes << ", " << 100 * taken << " % of the device taken\n";
  const int64_t cap = peak_pages((*runner)->kv_layout(), 16384) * 256;
  EXPECT_LE(plan.num_pages, cap);
  EXPECT_LE(taken, 0.31);
  EXPECT_TRUE(plan.num_pages == cap || taken >= 0.28);
}

}  // namespace
}  // namespace kvarn
