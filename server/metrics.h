// Every series of docs/api.md "Metrics", as Prometheus text. Counters and histograms that the
// server observes live here; engine counters and gauges come from EngineStats at each scrape.
// Labels never hold text of a request. Thread-safe; each call takes one short lock.
#pragma once

#include <atomic>
#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <string_view>

#include "engine/engine.h"
#include "server/model_info.h"

namespace kvarn {

enum class SequenceOutcome : uint8_t { kStop, kLength, kAbort, kError };

// One choice that ended, for the per-sequence histograms. Times in seconds; a phase that was not
// reached is negative and not observed.
struct SequenceRecord {
  RequestId engine_id = 0;
  int32_t choice = 0;
  SequenceOutcome outcome = SequenceOutcome::kStop;
  int64_t prompt_tokens = 0, generation_tokens = 0, max_tokens = 0;
  double e2e = -1, queue = -1, inference = -1, prefill = -1, decode = -1;
};

class Metrics : public EngineObserver {
 public:
  // `vllm_names`: standard series under vllm:, else under kvarn: (--metrics-compat none).
  Metrics(std::string model_name, bool vllm_names);
  ~Metrics() override;

  // Once loaded: names features, sizes and histogram bounds that depend on the model.
  void set_model(const ModelInfo& model);

  // EngineObserver, on the engine thread.
  void on_step(double seconds, int prefill_tokens, int decode_tokens) override;
  void on_preemption(RequestId id, int choice) override;
  void on_device_lost() override { device_error("cuda"); }

  void request_accepted(int64_t n);
  void time_to_first_token(double seconds);
  void inter_token(double seconds);
  void sequence_finished(const SequenceRecord& record);
  void request_shed(std::string_view code);     // never started
  void request_aborted(std::string_view code);  // ended early
  void tool_call(std::string_view parser, bool ok);
  void device_error(std::string_view kind);

  void http_request(std::string_view route, std::string_view method, int status);
  void grpc_request(std::string_view rpc, std::string_view code);
  void add_http_connections(int64_t delta);
  std::atomic<int64_t>& outbox_bytes();  // the gauge that every TokenStream moves
  void sse_ping();

  // The page of one scrape.
  std::string render(const EngineStats& stats) const;

 private:
  class Impl;
  std::unique_ptr<Impl> impl_;
};

// "now" of meta.effective_compression: bytes the live tokens would need dense / bytes that their
// pages hold. Nothing when idle.
std::optional<double> effective_compression(const EngineStats& stats, const ModelInfo& model);

}  // namespace kvarn
