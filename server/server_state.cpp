#include "server/server_state.h"

#include <random>

#include <fmt/core.h>

namespace kvarn {
namespace {

std::string random_id() {
  std::random_device device;
  const uint64_t bits = (uint64_t{device()} << 32) | device();
  return fmt::format("{:016x}", bits);
}

}  // namespace

ServerState::ServerState(ServerConfig server_config, std::vector<std::string> served_model_names)
    : config(std::move(server_config)),
      served_names(std::move(served_model_names)),
      instance_id(random_id()),
      metrics(served_names.front(), config.metrics_compat == "vllm") {}

Result<std::shared_ptr<GenerationService>> ServerState::admit() {
  const auto refuse = [this](const char* reason, const char* message) {
    metrics.request_shed(reason);
    return Status(StatusCode::kUnavailable, reason, message);
  };
  switch (health.state()) {
    case HealthState::kLoading:
      return refuse("model_loading", "the model is still loading; try again shortly");
    case HealthState::kDraining:
      return refuse("server_draining", "the server is shutting down and takes no new requests");
    case HealthState::kStalled:
      return Status(StatusCode::kUnavailable, "engine_unavailable",
                    "the engine makes no progress; the request was not started");
    case HealthState::kFailed:
      return Status(StatusCode::kUnavailable, "engine_unavailable",
                    "the engine has failed; the request was not started");
    case HealthState::kOk:
      break;
  }
  std::shared_ptr<GenerationService> ready = service();
  if (ready == nullptr) {
    return refuse("model_loading", "the model is still loading; try again shortly");
  }
  return ready;
}

EngineStats ServerState::engine_stats() const {
  const std::shared_ptr<GenerationService> loaded = service();
  return loaded == nullptr ? EngineStats{} : loaded->engine().stats();
}

}  // namespace kvarn
