// The real ModelRunner: one worker thread owns the model, the backend, the pool and the arena. A
// step is upload (nothing on the CPU), forward, sample; on a GPU decode-only steps are replays of
// what start-up recorded. Everything a step touches is allocated here, before the first one.
#include "engine/model_runner.h"

#include <fmt/format.h>

#include <algorithm>
#include <condition_variable>
#include <mutex>
#include <optional>
#include <stdexcept>
#include <string>
#include <thread>
#include <utility>

#include "engine/kv_pool.h"
#include "engine/step_recordings.h"
#include "engine/warm_up.h"
#include "kernels/core/log.h"

namespace kvarn {
namespace {

std::string mib(size_t bytes) {
  return fmt::format("{:.1f} MiB", static_cast<double>(bytes) / (1 << 20));
}

size_t logits_bytes(const StepLimits& limits, int vocab) {
  const size_t bytes =
      static_cast<size_t>(limits.max_logit_rows) * static_cast<size_t>(vocab) * sizeof(float);
  return (bytes + 63) / 64 * 64;  // as Arena rounds
}

class LocalModelRunner final : public ModelRunner {
 public:
  // Takes the workspace and warms up. Throws std::bad_alloc.
  LocalModelRunner(std::unique_ptr<Backend> backend, std::unique_ptr<Model> model,
                   const StepLimits& limits)
      : backend_(std::move(backend)),
        model_(std::move(model)),
        limits_(limits),
        arena_(backend_->allocate(model_->workspace_bytes(limits.max_rows, limits.max_logit_rows) +
                                  logits_bytes(limits, model_->config().vocab_size))),
        recordings_(*backend_, limits.max_sequences) {
    backend_->reserve(limits);
    warm_up();
  }

  // Takes the pool, records what can be recorded and starts the worker. Throws std::bad_alloc.
  void start(int64_t num_pages) {
    pool_.emplace(make_pool(num_pages));
    recordings_.record([this](const StepInput& input) { launch(input, pool_->view()); });
    worker_ = std::thread([this] { work(); });
  }

  std::optional<DeviceMemory> device_memory() const { return backend_->device_memory(); }

  ~LocalModelRunner() override {
    {
      const std::lock_guard lock(mutex_);
      stopping_ = true;
    }
    wake_.notify_one();
    if (worker_.joinable()) worker_.join();
  }

  int64_t num_pages() const override { return pool_->num_pages(); }
  KvLayout kv_layout() const override { return limits_.layout; }
  int model_max_len() const override { return model_->config().max_position_embeddings; }
  int vocab_size() const override { return model_->config().vocab_size; }

  std::future<StepResult> run(const StepBatch& batch) override {
    std::future<StepResult> result;
    {
      const std::lock_guard lock(mutex_);
      CHECK(!next_, "one step at a time");
      next_.emplace(Task{&batch, {}});
      result = next_->promise.get_future();
    }
    wake_.notify_one();
    return result;
  }

  std::chrono::steady_clock::time_point last_progress() const override {
    return progress_.last_layer.load(std::memory_order_relaxed);
  }

 private:
  struct Task {
    const StepBatch* batch;
    std::promise<StepResult> promise;
  };

  void work() {
    while (std::optional<Task> task = wait()) {
      try {
        task->promise.set_value(execute(*task->batch));
      } catch (...) {  // a failed step must not end the thread: it becomes the caller's exception
        task->promise.set_exception(std::current_exception());
      }
    }
  }

  std::optional<Task> wait() {
    std::unique_lock lock(mutex_);
    wake_.wait(lock, [this] { return next_.has_value() || stopping_; });
    return std::exchange(next_, std::nullopt);
  }

  StepResult execute(const StepBatch& batch) {
    CHECK(batch.num_rows() <= limits_.max_rows, "the plan exceeds the token budget");
    CHECK(batch.logit_rows.size() == batch.sampling.size(), "one sampling row per logit row");
    CHECK(batch.logit_rows.size() <= static_cast<size_t>(limits_.max_logit_rows),
          "the plan exceeds max_num_seqs");
    progress_.layer_done();  // the step has begun: a sign of life
    if (const int size = recordings_.size_for(batch); size > 0) {
      const StepInput input = backend_->begin_step(recordings_.filled(batch, size), batch.sampling);
      // How many tiles there are changes from step to step, so that they are not recorded.
      backend_->kv_encode(
          {.k = {}, .v = {}, .tiles = input.encode_before, .layers = pool_->view().layers});
      recordings_.replay(size);
    } else {
      launch(backend_->begin_step(batch.step_input(), batch.sampling), pool_->view());
    }
    StepResult result;
    result.tokens.resize(batch.sampling.size());
    result.encode_seconds = backend_->end_step(result.tokens).encode_seconds;
    progress_.layer_done();
    return result;
  }

  // Forward and sampling of an open step. Tensors are at the same addresses for every step of a
  // size.
  void launch(const StepInput& input, const KvCacheView& pages) {
    arena_.reset();
    const auto num_logits = static_cast<int64_t>(input.logit_rows.size());
    const Tensor logits = arena_.tensor(DType::kF32, {num_logits, vocab_size()});
    model_->forward(input, pages, arena_, logits, &progress_);
    backend_->sample(logits);
  }

  // Faults in mapped weights and first-use state before the first request pays for it; on a GPU all
  // that a step may ever take, so that what is left can go to the pool.
  void warm_up() {
    KvPool pool = make_pool(warm_up_pages(limits_.layout));
    const auto run = [&](const StepBatch& batch) {
      std::vector<SampledToken> tokens(batch.sampling.size());
      launch(backend_->begin_step(batch.step_input(), batch.sampling), pool.view());
      backend_->end_step(tokens);
    };
    run(warm_up_row());
    if (!backend_->device_memory()) return;
    for (const int rows : warm_up_sizes(limits_.max_rows)) {
      run(warm_up_prefill(limits_.layout, rows, limits_.max_model_len, limits_.max_sequences));
    }
    recordings_.warm_up([&](const StepInput& input) { launch(input, pool.view()); });
  }

  KvPool make_pool(int64_t num_pages) const {
    const ModelConfig& shape = model_->config();
    return {*backend_, limits_.layout, shape.num_layers, shape.num_kv_heads, num_pages};
  }

  std::unique_ptr<Backend> backend_;  // outlives the model, the pool and the arena
  std::unique_ptr<Model> model_;
  StepLimits limits_;
  Arena arena_;
  StepRecordings recordings_;
  std::optional<KvPool> pool_;
  ForwardProgress progress_;

  std::mutex mutex_;
  std::condition_variable wake_;
  std::optional<Task> next_;
  bool stopping_ = false;
  std::thread worker_;
};

}  // namespace

Result<std::unique_ptr<ModelRunner>> make_model_runner(const EngineConfig& config,
                                                       std::unique_ptr<Backend> backend,
                                                       std::unique_ptr<Model> model,
                                                       MemoryPlan* plan) {
  const ModelConfig& shape = model->config();
  KVARN_ASSIGN_OR_RETURN(const KvFormat format,
                         resolve_kv_format(config.kv_cache_dtype, shape.head_dim));
  const KvLayout layout = make_kv_layout(format, shape.head_dim);
  const int max_len =
      config.max_model_len > 0 ? config.max_model_len : shape.max_position_embeddings;
  const StepLimits limits = make_step_limits(shape, layout, max_len, token_budget(config),
                                             config.max_num_seqs, config.max_num_seqs);
  const PoolDemand demand{layout, max_len,
                          KvPool::page_id_bytes(layout, shape.num_layers, shape.num_kv_heads)};

  MemoryPlan memory;
  memory.weight_bytes = model->weight_bytes();
  memory.workspace_bytes = model->workspace_bytes(limits.max_rows, limits.max_logit_rows) +
                           logits_bytes(limits, shape.vocab_size);
  memory.page_id_bytes = demand.page_id_bytes;
  const std::optional<DeviceMemory> before = backend->device_memory();
  if (!before) {  // refused before anything is taken
    KVARN_ASSIGN_OR_RETURN(memory.num_pages,
                           host_pool_pages(config, demand, memory.workspace_bytes));
  }
  try {
    auto runner = std::make_unique<LocalModelRunner>(std::move(backend), std::move(model), limits);
    if (before) {
      const DeviceMemory now = *runner->device_memory();
      KVARN_ASSIGN_OR_RETURN(memory.num_pages, device_pool_pages(config, demand, now));
      // Kernels and libraries included: what the warm-up took.
      memory.workspace_bytes = before->free_bytes - std::min(before->free_bytes, now.free_bytes);
    }
    memory.pool_bytes = static_cast<size_t>(memory.num_pages) * memory.page_id_bytes;
    runner->start(memory.num_pages);
    if (plan != nullptr) *plan = memory;
    return std::unique_ptr<ModelRunner>(std::move(runner));
  } catch (const std::bad_alloc&) {
    return Status::resource_exhausted(fmt::format(
        "{} of KV pool and {} of workspace could not be allocated; lower --kv-memory or "
        "--max-num-batched-tokens",
        mib(memory.pool_bytes), mib(memory.workspace_bytes)));
  } catch (const std::runtime_error& error) {
    return Status::internal(fmt::format("the first steps of the model failed: {}", error.what()));
  }
}

}  // namespace kvarn
