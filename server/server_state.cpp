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

void ServerState::set_service(std::unique_ptr<GenerationService> service) {
  const std::lock_guard lock(mutex_);
  auto unheld = std::make_shared<std::promise<void>>();
  unheld_ = unheld->get_future();
  owned_ = std::move(service);
  service_ = {owned_.get(), [unheld](GenerationService*) { unheld->set_value(); }};
}

void ServerState::close_service() {
  {
    const std::lock_guard lock(mutex_);
    if (owned_ == nullptr) return;
    service_.reset();
  }
  unheld_.wait();
  owned_.reset();
}

Result<std::shared_ptr<GenerationService>> ServerState::loaded() {
  std::shared_ptr<GenerationService> ready = service();
  if (health.state() == HealthState::kDraining) {
    metrics.request_shed("server_draining");
    return Status(StatusCode::kUnavailable, "server_draining",
                  "the server is shutting down and takes no new requests");
  }
  if (ready == nullptr) {
    if (health.state() == HealthState::kFailed) {
      return Status(StatusCode::kUnavailable, "engine_unavailable", "the model did not load");
    }
    metrics.request_shed("model_loading");
    return Status(StatusCode::kUnavailable, "model_loading",
                  "the model is still loading; try again shortly");
  }
  return ready;
}

Result<std::shared_ptr<GenerationService>> ServerState::admit() {
  KVARN_ASSIGN_OR_RETURN(std::shared_ptr<GenerationService> ready, loaded());
  const HealthState now = health.state();
  if (now == HealthState::kStalled || now == HealthState::kFailed) {
    return Status(StatusCode::kUnavailable, "engine_unavailable",
                  "the engine makes no progress or has failed; the request was not started");
  }
  return ready;
}

int ServerState::retry_after_seconds() const {
  constexpr int kWhileLoading = 2;  // or draining: another instance may be up by then
  const std::shared_ptr<GenerationService> ready = service();
  if (ready == nullptr || health.state() != HealthState::kOk) return kWhileLoading;
  return ready->retry_after_seconds();
}

EngineStats ServerState::engine_stats() const {
  const std::shared_ptr<GenerationService> loaded = service();
  return loaded == nullptr ? EngineStats{} : loaded->engine().stats();
}

}  // namespace kvarn
