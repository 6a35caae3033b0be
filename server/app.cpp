#include "server/app.h"

#include <signal.h>

#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <ctime>
#include <filesystem>
#include <memory>
#include <optional>
#include <thread>

#include <fmt/format.h>

#include "engine/tokenizer/tokenizer.h"
#include "kernels/core/log.h"
#include "server/build_info.h"
#include "server/engine_factory.h"
#include "server/grpc_server.h"
#include "server/http_server.h"
#include "server/lifecycle.h"
#include "server/model_files.h"
#include "server/server_state.h"

namespace kvarn {
namespace {

constexpr int kExitOk = 0, kExitFailed = 1;
constexpr long kWatchNanoseconds = 100'000'000;

sigset_t stop_signals() {
  sigset_t set;
  sigemptyset(&set);
  sigaddset(&set, SIGTERM);
  sigaddset(&set, SIGINT);
  return set;
}

// The signal that arrived within the time, or 0.
int wait_for_signal(long nanoseconds) {
  const sigset_t set = stop_signals();
  const timespec timeout{0, nanoseconds};
  return std::max(0, sigtimedwait(&set, nullptr, &timeout));
}

std::string mib(uint64_t bytes) {
  return fmt::format("{:.1f} MiB", static_cast<double>(bytes) / (1024.0 * 1024.0));
}

bool is_loopback(const std::string& host) {
  return host == "localhost" || host == "::1" || host.starts_with("127.");
}

void say(const std::string& line) {
  std::fprintf(stdout, "%s\n", line.c_str());
  std::fflush(stdout);
}

// Lives as long as the process serves. The engine is declared before the state that borrows it and
// ends after it.
struct Loaded {
  LoadedEngine engine;
  Status status;
};

Status load(const EngineConfig& engine_config, ServerState& state, Loaded& loaded) {
  // The texts first: they are read in no time, weights are not.
  if (engine_config.model.empty()) {
    return Status::invalid_argument(
        "serving needs a tokenizer: give --model a directory with config.json and tokenizer.json "
        "(its weights may be random with --load-format dummy)");
  }
  const std::filesystem::path directory = engine_config.model;
  std::error_code error;
  if (!std::filesystem::is_directory(directory, error)) {
    return load_engine(engine_config, nullptr).status();  // it knows what to say about --model
  }
  GenerationService::Parts parts;
  parts.config = state.config;
  KVARN_ASSIGN_OR_RETURN(parts.tokenizer, Tokenizer::load(directory / "tokenizer.json"));
  KVARN_ASSIGN_OR_RETURN(parts.chat_template, load_chat_template(directory));
  KVARN_ASSIGN_OR_RETURN(loaded.engine, load_engine(engine_config, &state.metrics));
  KVARN_ASSIGN_OR_RETURN(parts.model, make_model_info(engine_config, state.config, loaded.engine,
                                                      *parts.tokenizer, parts.chat_template.get()));
  parts.engine = loaded.engine.engine.get();
  parts.metrics = &state.metrics;
  state.metrics.set_model(parts.model);
  state.set_service(std::make_unique<GenerationService>(std::move(parts)));
  return Status::ok();
}

// Host and port as a URL has them: an IPv6 address in brackets.
std::string address(const std::string& host, int port) {
  return host.find(':') == std::string::npos ? fmt::format("{}:{}", host, port)
                                             : fmt::format("[{}]:{}", host, port);
}

void print_plan(const ModelInfo& model, const MemoryPlan& plan) {
  say(fmt::format("model   {} ({}, {:.1f} M parameters, {}) on {}", model.served_names.front(),
                  model.architecture, static_cast<double>(model.num_parameters) / 1e6,
                  model.weights_dtype, model.backend));
  say(fmt::format("memory  weights {}, workspace {}, KV pool {} = {} pages of {} B",
                  mib(plan.weight_bytes), mib(plan.workspace_bytes), mib(plan.pool_bytes),
                  plan.num_pages, plan.page_id_bytes));
  say(fmt::format("KV      {}: {} tokens in {:.1f} sequences of {}, {:.2f}x as many as dense fp16",
                  model.kv_cache_dtype, model.kv_capacity_tokens, model.max_concurrency,
                  model.max_model_len, model.compression_at_context_length));
}

// The engine thread may hang in a device call: joining it would hang the process too.
[[noreturn]] void leave_at_once(int code) {
  std::fflush(stdout);
  std::_Exit(code);
}

}  // namespace

int run_server(const EngineConfig& engine_config, const ServerConfig& server_config) {
  // Blocked before any thread exists, so that only wait_for_signal() sees them.
  const sigset_t signals = stop_signals();
  pthread_sigmask(SIG_BLOCK, &signals, nullptr);
  signal(SIGPIPE, SIG_IGN);

  Loaded loaded;
  ServerState state(server_config, served_model_names(engine_config));
  const auto failed = [](const Status& status) {
    std::fprintf(stderr, "kvarn serve: %s\n", status.message().c_str());
    return kExitFailed;
  };
  Result<std::unique_ptr<HttpServer>> http = HttpServer::start(state);
  if (!http.is_ok()) return failed(http.status());
  std::unique_ptr<GrpcServer> grpc;
  if (server_config.grpc_port != 0) {
    Result<std::unique_ptr<GrpcServer>> started = start_grpc_server(state);
    if (!started.is_ok()) return failed(started.status());
    grpc = std::move(*started);
  }
  if (!is_loopback(server_config.host)) {
    log_warning(
        fmt::format("serve host={} open=\"anyone who reaches it may use it: API keys come "
                    "with a later stage\"",
                    server_config.host));
  }
  say(fmt::format("kvarn {} loading {}", build_info().version, state.served_names.front()));

  Lifecycle lifecycle(state, **http, grpc.get());
  std::atomic<bool> load_ended{false};
  std::thread loader([&] {
    loaded.status = load(engine_config, state, loaded);
    load_ended = true;
  });
  while (!load_ended) {
    if (wait_for_signal(kWatchNanoseconds) == 0) continue;
    // Nothing was accepted yet, and weights cannot be read half.
    lifecycle.drain([] { return true; });
    leave_at_once(kExitOk);
  }
  loader.join();
  if (!loaded.status.is_ok()) {
    state.health.set(HealthState::kFailed);
    (*http)->stop(std::chrono::milliseconds(0));
    return failed(loaded.status);
  }
  state.health.set(HealthState::kOk);
  print_plan(state.service()->model(), loaded.engine.memory_plan);
  say("http    http://" + address(server_config.host, (*http)->port()));
  if (grpc != nullptr) say("grpc    " + address(server_config.host, grpc->port()));
  say("ready");

  while (wait_for_signal(kWatchNanoseconds) == 0) {
    lifecycle.watch();
    if (state.health.state() != HealthState::kFailed) continue;
    log_error("serve error=\"the engine failed\"");
    lifecycle.drain([] { return true; });
    leave_at_once(kExitFailed);
  }
  say("draining");
  const bool complete = lifecycle.drain([] { return wait_for_signal(1) != 0; });
  if (state.engine_stats().state == EngineState::kStalled) leave_at_once(kExitFailed);
  // In this order: no reader, no worker, then the engine they borrow.
  grpc.reset();
  http->reset();
  state.close_service();
  loaded.engine.engine.reset();
  return complete ? kExitOk : kExitFailed;
}

}  // namespace kvarn
