// From loading to the end: keeps the health state true to the engine, drains on request. Used by
// the main thread only; everything it calls is thread-safe.
#pragma once

#include <chrono>
#include <functional>

#include "server/grpc_server.h"
#include "server/http_server.h"
#include "server/server_state.h"

namespace kvarn {

class Lifecycle {
 public:
  // Borrowed. `grpc` may be null.
  Lifecycle(ServerState& state, HttpServer& http, GrpcServer* grpc)
      : state_(state), http_(http), grpc_(grpc) {}

  // Health from the engine's state; call a few times a second. A failed engine's requests are all
  // answered here, without waiting for it.
  void watch();
  // Refuses new requests, lets accepted ones run for --drain-seconds or until `hurry` says so, ends
  // the rest with server_shutdown, and stops both doors. True: nothing was cut off.
  bool drain(const std::function<bool()>& hurry);

 private:
  bool wait_until_idle(std::chrono::steady_clock::time_point until,
                       const std::function<bool()>& hurry);

  ServerState& state_;
  HttpServer& http_;
  GrpcServer* grpc_;
  bool draining_ = false;
};

}  // namespace kvarn
