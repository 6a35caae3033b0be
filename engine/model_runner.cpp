// The real ModelRunner: one worker thread owns the model, the backend, the pool and the arena; a
// step is upload (nothing on the CPU), forward, sample. Everything a step touches is allocated
// here, before the first one.
#include "engine/model_runner.h"

#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <condition_variable>
#include <mutex>
#include <optional>
#include <string>
#include <thread>
#include <utility>

#include "engine/host_memory.h"
#include "engine/kv_capacity.h"
#include "engine/kv_pool.h"
#include "kernels/core/log.h"

namespace kvarn {
namespace {

std::string mib(size_t bytes) {
  return fmt::format("{:.1f} MiB", static_cast<double>(bytes) / (1 << 20));
}

StepLimits step_limits(const EngineConfig& config, const ModelConfig& shape, const KvLayout& layout,
                       int max_model_len) {
  StepLimits limits;
  limits.max_rows = token_budget(config);
  limits.max_logit_rows = limits.max_sequences = config.max_num_seqs;
  const int64_t blocks = (max_model_len + kBlockTokens - 1) / kBlockTokens;
  limits.max_blocks = blocks * config.max_num_seqs;
  // Of decodes (one block each) and of a step's prefill chunks.
  limits.max_encode_tiles = config.max_num_seqs + limits.max_rows / kBlockTokens;
  limits.max_model_len = max_model_len;
  limits.hidden = shape.hidden_size;
  limits.q_heads = shape.num_q_heads;
  limits.kv_heads = shape.num_kv_heads;
  limits.head_dim = shape.head_dim;
  limits.ffn = shape.intermediate_size;
  limits.vocab = shape.vocab_size;
  limits.layout = layout;
  return limits;
}

size_t logits_bytes(const StepLimits& limits, int vocab) {
  const size_t bytes =
      static_cast<size_t>(limits.max_logit_rows) * static_cast<size_t>(vocab) * sizeof(float);
  return (bytes + 63) / 64 * 64;  // as Arena rounds
}

class LocalModelRunner final : public ModelRunner {
 public:
  LocalModelRunner(std::unique_ptr<Backend> backend, std::unique_ptr<Model> model,
                   int64_t num_pages, const StepLimits& limits)
      : backend_(std::move(backend)),
        model_(std::move(model)),
        limits_(limits),
        pool_(*backend_, limits.layout, model_->config().num_layers, model_->config().num_kv_heads,
              num_pages),
        arena_(backend_->allocate(model_->workspace_bytes(limits.max_rows, limits.max_logit_rows) +
                                  logits_bytes(limits, model_->config().vocab_size))) {
    backend_->reserve(limits);
    warm_up();
    worker_ = std::thread([this] { work(); });
  }

  ~LocalModelRunner() override {
    {
      const std::lock_guard lock(mutex_);
      stopping_ = true;
    }
    wake_.notify_one();
    worker_.join();
  }

  int64_t num_pages() const override { return pool_.num_pages(); }
  KvLayout kv_layout() const override { return pool_.layout(); }
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
    arena_.reset();
    progress_.layer_done();  // the step has begun: a sign of life
    const auto num_logits = static_cast<int64_t>(batch.logit_rows.size());
    const Tensor logits = arena_.tensor(DType::kF32, {num_logits, vocab_size()});
    const StepInput input = backend_->begin_step(batch.step_input(), batch.sampling);
    model_->forward(input, pool_.view(), arena_, logits, &progress_);
    backend_->sample(logits);
    StepResult result;
    result.tokens.resize(batch.sampling.size());
    result.encode_seconds = backend_->end_step(result.tokens).encode_seconds;
    progress_.layer_done();
    return result;
  }

  // One row that is stored nowhere: faults in mapped weights and first-use state before the first
  // request pays for it.
  void warm_up() {
    StepBatch batch;
    batch.token_ids = {0};
    batch.positions = {0};
    batch.slots = {-1};
    batch.sequences = {{.first_row = 0, .num_rows = 1, .first_position = 0, .first_block = 0}};
    BlockPages none;
    none.fill(-1);
    batch.block_pages = {none};
    batch.logit_rows = {0};
    batch.sampling.resize(1);
    execute(batch);
  }

  std::unique_ptr<Backend> backend_;  // outlives the model, the pool and the arena
  std::unique_ptr<Model> model_;
  StepLimits limits_;
  KvPool pool_;
  Arena arena_;
  ForwardProgress progress_;

  std::mutex mutex_;
  std::condition_variable wake_;
  std::optional<Task> next_;
  bool stopping_ = false;
  std::thread worker_;
};

// Bytes that the pool may take: what was asked for, or a quarter of what is free, and then no more
// than max_num_seqs sequences of full length can use.
Result<size_t> pool_budget(const EngineConfig& config, const KvLayout& layout, int max_len,
                           size_t page_id_bytes, size_t other_bytes) {
  const uint64_t free_bytes = available_host_memory();
  if (!config.kv_memory.empty()) {
    KVARN_ASSIGN_OR_RETURN(const uint64_t asked, parse_bytes(config.kv_memory));
    if (free_bytes > 0 && asked + other_bytes > free_bytes) {
      return Status::resource_exhausted(
          fmt::format("--kv-memory {} and {} of workspace exceed the {} of free memory; lower "
                      "--kv-memory or --max-num-batched-tokens",
                      config.kv_memory, mib(other_bytes), mib(free_bytes)));
    }
    return static_cast<size_t>(asked);
  }
  if (free_bytes == 0) {
    return Status::failed_precondition(
        "cannot tell how much memory is free on this system; set --kv-memory, e.g. 1GiB");
  }
  const int64_t most_pages = peak_pages(layout, max_len) * config.max_num_seqs;
  return std::min<size_t>(free_bytes / 4, static_cast<size_t>(most_pages) * page_id_bytes);
}

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
  const StepLimits limits = step_limits(config, shape, layout, max_len);

  MemoryPlan memory;
  memory.weight_bytes = model->weight_bytes();
  memory.workspace_bytes = model->workspace_bytes(limits.max_rows, limits.max_logit_rows) +
                           logits_bytes(limits, shape.vocab_size);
  memory.page_id_bytes = KvPool::page_id_bytes(layout, shape.num_layers, shape.num_kv_heads);
  KVARN_ASSIGN_OR_RETURN(
      const size_t budget,
      pool_budget(config, layout, max_len, memory.page_id_bytes, memory.workspace_bytes));
  memory.num_pages = static_cast<int64_t>(budget / memory.page_id_bytes);
  memory.pool_bytes = static_cast<size_t>(memory.num_pages) * memory.page_id_bytes;
  const int64_t fewest = peak_pages(layout, std::min(max_len, kBlockTokens));
  if (memory.num_pages < fewest) {
    return Status::resource_exhausted(fmt::format(
        "a KV pool of {} holds {} pages of {} but one sequence of {} tokens needs {}; "
        "set --kv-memory to at least {} bytes",
        mib(budget), memory.num_pages, mib(memory.page_id_bytes), std::min(max_len, kBlockTokens),
        fewest, static_cast<size_t>(fewest) * memory.page_id_bytes));
  }
  if (plan != nullptr) *plan = memory;

  try {
    return std::unique_ptr<ModelRunner>(std::make_unique<LocalModelRunner>(
        std::move(backend), std::move(model), memory.num_pages, limits));
  } catch (const std::bad_alloc&) {
    return Status::resource_exhausted(fmt::format(
        "{} of KV pool and {} of workspace could not be allocated; lower --kv-memory or "
        "--max-num-batched-tokens",
        mib(memory.pool_bytes), mib(memory.workspace_bytes)));
  }
}

}  // namespace kvarn
