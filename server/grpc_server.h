// The gRPC door. Only grpc_*.cpp include gRPC.
#pragma once

#include <chrono>
#include <memory>

#include "kernels/core/status.h"
#include "server/server_state.h"

namespace kvarn {

class GrpcServer {
 public:
  virtual ~GrpcServer() = default;  // as shutdown() with no time left
  virtual int port() const = 0;
  // Waits at most `deadline` for running calls, then cancels them. Idempotent.
  virtual void shutdown(std::chrono::steady_clock::time_point deadline) = 0;
};

// Listens at once, also while the model loads (UNAVAILABLE "model_loading"; health NOT_SERVING
// follows state.health). `state` must outlive the server. Errors name the flag (--grpc-port in use,
// half-given TLS pair, unreadable PEM). Not called with grpc_port 0 (off).
Result<std::unique_ptr<GrpcServer>> start_grpc_server(ServerState& state);

}  // namespace kvarn
