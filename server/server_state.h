// What both doors share from the first moment on: settings, health, metrics, and the service once
// the model is loaded. Thread-safe.
#pragma once

#include <future>
#include <memory>
#include <mutex>
#include <string>
#include <utility>
#include <vector>

#include "engine/engine.h"
#include "kernels/core/status.h"
#include "server/generation_service.h"
#include "server/health.h"
#include "server/metrics.h"
#include "server/server_config.h"

namespace kvarn {

class ServerState {
 public:
  ServerState(ServerConfig server_config, std::vector<std::string> served_model_names);
  ~ServerState() { close_service(); }

  const ServerConfig config;
  const std::vector<std::string> served_names;  // never empty
  const std::string instance_id;                // random per process
  Health health;
  Metrics metrics;

  // Null while the model loads. Holders keep it alive.
  std::shared_ptr<GenerationService> service() const {
    const std::lock_guard lock(mutex_);
    return service_;
  }
  void set_service(std::unique_ptr<GenerationService> service);
  // After both doors stopped: waits for the last holder, then destroys the service on this thread.
  // The last holder may be one of the service's own workers, which could not join itself.
  void close_service();
  // The service, or why new requests are not taken: model_loading, server_draining,
  // engine_unavailable. Both doors ask this before they read a body. Counts a shed request.
  Result<std::shared_ptr<GenerationService>> admit();
  // As admit(), for what needs no engine: refused only while loading and draining.
  Result<std::shared_ptr<GenerationService>> loaded();
  EngineStats engine_stats() const;  // zeros while loading
  int retry_after_seconds() const;   // 1..60, for Retry-After

 private:
  mutable std::mutex mutex_;
  std::unique_ptr<GenerationService> owned_;
  std::shared_ptr<GenerationService> service_;  // what holders share; never destroys the service
  std::future<void> unheld_;                    // ready when they are gone
};

}  // namespace kvarn
