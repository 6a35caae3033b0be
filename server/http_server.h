// The HTTP door: listener, I/O threads and the sessions on them. Thread-safe.
#pragma once

#include <chrono>
#include <memory>

#include "kernels/core/status.h"
#include "server/server_state.h"

namespace kvarn {

class HttpServer {
 public:
  // Listens at once, also while the model loads. `state` must outlive the server. An error names
  // the address and the flag.
  static Result<std::unique_ptr<HttpServer>> start(ServerState& state);
  ~HttpServer();  // as stop() with no time left

  int port() const;
  // Drain: closes connections that wait for a request; the others follow after their answer.
  void close_idle();
  // Closes the listener, waits at most `grace` until running answers are written, cuts the rest and
  // joins the threads. Idempotent.
  void stop(std::chrono::milliseconds grace);

 private:
  class Impl;
  explicit HttpServer(std::unique_ptr<Impl> impl);
  std::unique_ptr<Impl> impl_;
};

}  // namespace kvarn
