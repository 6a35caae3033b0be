// Builds and owns the grpc::Server: address, TLS, limits, what is mounted, and its end.
#include "server/grpc_server.h"

#include <google/protobuf/stubs/logging.h>
#include <grpc/support/log.h>
#include <grpcpp/grpcpp.h>
#include <grpcpp/impl/server_builder_option.h>
#include <grpcpp/impl/server_builder_plugin.h>

#include <algorithm>
#include <condition_variable>
#include <limits>
#include <thread>

#include <fmt/format.h>

#include "kernels/core/log.h"
#include "server/grpc_health.h"
#include "server/grpc_service.h"
#include "server/grpc_tls.h"

namespace kvarn {
namespace {

using Clock = std::chrono::steady_clock;

constexpr int kKeepaliveTimeoutMs = 20'000;  // an unanswered ping ends the connection
constexpr int kMinClientPingMs = 10'000;     // clients may ping this often without being cut off
constexpr auto kWatchPeriod = std::chrono::seconds(1);
constexpr auto kLastWords = std::chrono::milliseconds(200);  // for answers on their way out

// The library's reflection plugin adds itself to every builder from a static initialiser.
class WithoutReflection : public grpc::ServerBuilderOption {
 public:
  void UpdateArguments(grpc::ChannelArguments*) override {}
  void UpdatePlugins(std::vector<std::unique_ptr<grpc::ServerBuilderPlugin>>* plugins) override {
    std::erase_if(*plugins, [](const std::unique_ptr<grpc::ServerBuilderPlugin>& plugin) {
      return plugin->name() == "proto_server_reflection";
    });
  }
};

Result<std::vector<std::string>> mounted_services(const std::string& list) {
  std::vector<std::string> services;
  for (size_t begin = 0; begin <= list.size();) {
    const size_t end = std::min(list.find(',', begin), list.size());
    const std::string name = list.substr(begin, end - begin);
    begin = end + 1;
    if (name == "inference") {
      services.emplace_back("kvarn.v1.Inference");
    } else if (name == "control") {
      services.emplace_back("kvarn.v1.Control");
    } else if (!name.empty()) {
      return Status::invalid_argument(
          fmt::format("--grpc-services must be of inference and control, got '{}'", name));
    }
  }
  return services;
}

std::string address_of(const std::string& host, int port) {
  return host.find(':') == std::string::npos ? fmt::format("{}:{}", host, port)
                                             : fmt::format("[{}]:{}", host, port);
}

class GrpcServerImpl : public GrpcServer {
 public:
  explicit GrpcServerImpl(ServerState& state) : state_(state) {}
  ~GrpcServerImpl() override { shutdown(Clock::now()); }

  Status start() {
    const ServerConfig& config = state_.config;
    KVARN_ASSIGN_OR_RETURN(const std::vector<std::string> services,
                           mounted_services(config.grpc_services));
    KVARN_ASSIGN_OR_RETURN(const std::shared_ptr<grpc::ServerCredentials> credentials,
                           make_grpc_credentials(config));
    grpc::ServerBuilder builder;
    const std::string address = address_of(config.host, config.grpc_port);
    builder.AddListeningPort(address, credentials, &port_);
    // With SO_REUSEPORT, the library's default, a second server would quietly share the port.
    builder.AddChannelArgument(GRPC_ARG_ALLOW_REUSEPORT, 0);
    builder.AddChannelArgument(GRPC_ARG_KEEPALIVE_TIME_MS, config.grpc_keepalive_seconds * 1000);
    builder.AddChannelArgument(GRPC_ARG_KEEPALIVE_TIMEOUT_MS, kKeepaliveTimeoutMs);
    builder.AddChannelArgument(GRPC_ARG_KEEPALIVE_PERMIT_WITHOUT_CALLS, 1);
    builder.AddChannelArgument(GRPC_ARG_HTTP2_MIN_RECV_PING_INTERVAL_WITHOUT_DATA_MS,
                               kMinClientPingMs);
    const int64_t max_message =
        config.grpc_max_message_bytes > 0 ? config.grpc_max_message_bytes : config.max_body_bytes;
    builder.SetMaxReceiveMessageSize(
        static_cast<int>(std::min<int64_t>(max_message, std::numeric_limits<int>::max())));
    builder.SetMaxSendMessageSize(-1);
    if (!config.grpc_reflection) builder.SetOption(std::make_unique<WithoutReflection>());

    const auto is_mounted = [&](const char* name) {
      return std::find(services.begin(), services.end(), name) != services.end();
    };
    health_ = make_health_service(state_.health, services);
    builder.RegisterService(health_.get());
    if (is_mounted("kvarn.v1.Inference")) {
      inference_ = make_inference_service(state_, registry_);
      builder.RegisterService(inference_.get());
    }
    if (is_mounted("kvarn.v1.Control")) {
      control_ = make_control_service(state_, registry_, services);
      builder.RegisterService(control_.get());
    }
    server_ = builder.BuildAndStart();
    if (server_ == nullptr || port_ == 0) {
      return Status::unavailable(fmt::format(
          "cannot listen on {}: the port is in use or the address is not of this host; choose "
          "another --grpc-port (0: no gRPC) or --host",
          address));
    }
    watch_ = std::jthread([this](const std::stop_token& stop) { watch(stop); });
    return Status::ok();
  }

  int port() const override { return port_; }

  void shutdown(Clock::time_point deadline) override {
    if (server_ == nullptr) return;
    // Watch and reflection streams stay open for as long as clients like, so the library's own
    // graceful shutdown would always take all of the time: wait for the calls that count first.
    registry_.wait_idle(deadline);
    server_->Shutdown(std::chrono::system_clock::now() + kLastWords);
    watch_ = {};  // stops and joins
    // Every call has ended; an output worker may still hold one for a moment, and it knows us.
    while (!registry_.wait_idle(Clock::now() + std::chrono::seconds(1))) {
    }
    server_.reset();
  }

 private:
  void watch(const std::stop_token& stop) {
    std::mutex mutex;
    std::condition_variable_any wake;
    std::unique_lock lock(mutex);
    while (!wake.wait_for(lock, stop, kWatchPeriod, [&] { return stop.stop_requested(); })) {
      registry_.check_progress(Clock::now());
      if (stop.stop_requested()) return;
    }
  }

  ServerState& state_;
  CallRegistry registry_;
  std::unique_ptr<grpc::health::v1::Health::CallbackService> health_;
  std::unique_ptr<v1::Inference::CallbackService> inference_;
  std::unique_ptr<v1::Control::CallbackService> control_;
  int port_ = 0;
  std::unique_ptr<grpc::Server> server_;
  std::jthread watch_;
};

// The library's own messages go where ours go, and are news to developers only.
void forward_log(gpr_log_func_args* args) {
  if (log_enabled(LogLevel::kDebug))
    log_debug(fmt::format("grpc_library message=\"{}\"", args->message));
}

void forward_protobuf_log(google::protobuf::LogLevel, const char*, int,
                          const std::string& message) {
  if (log_enabled(LogLevel::kDebug)) log_debug(fmt::format("protobuf message=\"{}\"", message));
}

}  // namespace

Result<std::unique_ptr<GrpcServer>> start_grpc_server(ServerState& state) {
  gpr_set_log_function(forward_log);
  google::protobuf::SetLogHandler(forward_protobuf_log);
  auto server = std::make_unique<GrpcServerImpl>(state);
  KVARN_RETURN_IF_ERROR(server->start());
  return std::unique_ptr<GrpcServer>(std::move(server));
}

}  // namespace kvarn
