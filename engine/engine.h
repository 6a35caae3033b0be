// Engine: submit and cancel from any thread; ONE engine thread drains the inbox, plans a step, runs
// it and publishes events. Owns the scheduler, block manager, prefix cache and KV pool; borrows
// nothing.
#pragma once

#include <atomic>
#include <chrono>
#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "engine/config.h"
#include "engine/model_runner.h"
#include "engine/request.h"

namespace kvarn {

enum class EngineState : uint8_t { kRunning, kDraining, kStalled, kFailed, kStopped };

// A consistent copy of counters and gauges, refreshed by the engine thread every step. Plain data
// for metrics, health and GetLoad.
struct EngineStats {
  EngineState state = EngineState::kRunning;
  int64_t running = 0, waiting = 0,
          waiting_deferred = 0;  // sequences; deferred: waiting for a sibling's prefill
  int64_t pages_total = 0, pages_free = 0, pages_cached = 0,
          pages_in_use = 0;  // free + cached + in_use == total
  int64_t coded_pages = 0, sink_pages = 0, tail_pages = 0,
          dense_pages = 0;  // kinds of non-free pages
  int64_t live_tokens = 0, cached_tokens = 0, capacity_tokens = 0;
  int64_t leaked_pages = 0;  // found by the idle integrity check, ever; 0 or a bug
  uint64_t steps_prefill = 0, steps_decode = 0, steps_mixed = 0;
  uint64_t prompt_tokens = 0, prompt_tokens_cached = 0, generation_tokens = 0;
  uint64_t prefix_queries = 0, prefix_hits = 0;  // tokens
  uint64_t preemptions = 0, tiles_encoded = 0, coded_block_reads = 0;
  double encode_seconds = 0;
  std::chrono::steady_clock::time_point last_step, heartbeat;
};

// Per-step and per-sequence observations for histograms; called on the engine thread, must not
// block.
class EngineObserver {
 public:
  virtual ~EngineObserver() = default;
  virtual void on_step(double seconds, int prefill_tokens, int decode_tokens) = 0;
  virtual void on_preemption(RequestId id, int choice) = 0;
  virtual void on_device_lost() = 0;
};

class Engine {
 public:
  // Validates the config against the model (max_model_len fits the pool, ...). Starts the thread.
  static Result<std::unique_ptr<Engine>> create(const EngineConfig& config,
                                                std::unique_ptr<ModelRunner> runner,
                                                EngineObserver* observer = nullptr);
  ~Engine();  // cancels what is left with "server_shutdown" and joins

  RequestId next_request_id();  // thread-safe
  // Thread-safe. An error is the answer: "queue_full" (kResourceExhausted),
  // "context_length_exceeded", "server_draining", "engine_unavailable". On OK the sink gets exactly
  // one last event, later.
  Status submit(EngineRequest request);
  // Thread-safe. Ends the request (its sink gets an ErrorEvent with this status); unknown ids are
  // ignored. Its pages are free by the next step boundary, wherever it was: queue, prefill or
  // decode.
  void cancel(RequestId id, Status why);
  // Thread-safe. A stop string ended one choice: no more tokens for it; the sink gets no event for
  // it.
  void finish_choice(RequestId id, int32_t choice);

  void begin_drain();                                 // refuse new requests, run on
  bool wait_idle(std::chrono::milliseconds timeout);  // no sequence left
  void cancel_all(const Status& why);
  EngineStats stats() const;  // thread-safe copy
  int max_model_len() const;
  const ModelRunner& runner() const;

 private:
  class Impl;
  explicit Engine(std::unique_ptr<Impl> impl);
  std::unique_ptr<Impl> impl_;
};

}  // namespace kvarn
