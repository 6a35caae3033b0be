// The engine's view of whatever computes a step. The real one runs a model on a backend; tests
// script tokens.
#pragma once

#include <chrono>
#include <cstdint>
#include <future>
#include <memory>
#include <vector>

#include "engine/config.h"
#include "engine/memory_plan.h"
#include "engine/step_batch.h"
#include "kernels/backend.h"
#include "models/model.h"

namespace kvarn {

struct StepResult {
  std::vector<SampledToken> tokens;  // one per StepBatch::sampling row, in order
  double encode_seconds = 0;         // time spent coding tiles, where the runner can tell
};

class ModelRunner {
 public:
  virtual ~ModelRunner() = default;
  // What the pool looks like: pages, their layout, KV heads and layers. Fixed after construction.
  virtual int64_t num_pages() const = 0;
  virtual KvLayout kv_layout() const = 0;
  virtual int model_max_len() const = 0;  // positions the model supports
  virtual int vocab_size() const = 0;
  // Starts the step; the batch stays alive until the future is ready. A failed step is an exception
  // in the future: DeviceLost (fatal) or any other (this step's requests fail, the engine goes on).
  virtual std::future<StepResult> run(const StepBatch& batch) = 0;
  // Time of the last sign of progress inside a step (per layer on the CPU), for the stall watch;
  // thread-safe.
  virtual std::chrono::steady_clock::time_point last_progress() const = 0;
};

// Loads nothing itself: takes the model, allocates pool and workspace, warms up, records steps
// where the backend can, starts the worker thread.
Result<std::unique_ptr<ModelRunner>> make_model_runner(const EngineConfig& config,
                                                       std::unique_ptr<Backend> backend,
                                                       std::unique_ptr<Model> model,
                                                       MemoryPlan* plan);

}  // namespace kvarn
