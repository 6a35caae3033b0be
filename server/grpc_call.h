// What every RPC does the same way: labels from metadata, trailing metadata, the status of a
// Status, the count in the metrics, and being known to the server while it runs.
#pragma once

#include <grpcpp/server_context.h>
#include <grpcpp/support/status.h>

#include <chrono>
#include <condition_variable>
#include <memory>
#include <mutex>
#include <optional>
#include <set>
#include <string>
#include <string_view>

#include "kernels/core/status.h"
#include "server/server_state.h"

namespace kvarn {

// A call with a client that may be slow: looked at once a second by the server's watch.
class WatchedCall {
 public:
  virtual ~WatchedCall() = default;
  // Drops the call if its client has taken nothing for too long. Any thread.
  virtual void check_progress(std::chrono::steady_clock::time_point now) = 0;
};

// The calls that run. Thread-safe.
class CallRegistry {
 public:
  void enter();
  void leave();
  // False: some still run at `deadline`.
  bool wait_idle(std::chrono::steady_clock::time_point deadline);

  void watch(const std::shared_ptr<WatchedCall>& call);
  void unwatch(const WatchedCall* call);
  void check_progress(std::chrono::steady_clock::time_point now);

 private:
  std::mutex mutex_;
  std::condition_variable idle_;
  int64_t running_ = 0;
  std::map<const WatchedCall*, std::weak_ptr<WatchedCall>> watched_;
};

// One call's labels and its end. finish() is called exactly once, before Finish() of the reactor.
class GrpcCall {
 public:
  // `rpc`: "Inference/Generate". `label`: the request's own id field, which wins over the metadata
  // x-request-id; a label of other characters than A-Za-z0-9._:- is replaced.
  GrpcCall(ServerState& state, CallRegistry& registry, grpc::CallbackServerContext& context,
           const char* rpc, const std::string& label = {});
  ~GrpcCall();
  GrpcCall(const GrpcCall&) = delete;
  GrpcCall& operator=(const GrpcCall&) = delete;

  const std::string& label() const { return label_; }
  const std::string& trace_id() const { return trace_id_; }  // of traceparent; empty: none
  std::optional<std::chrono::steady_clock::time_point> deadline() const;  // of the RPC
  // Why a cancelled call ended: its deadline, or its client left.
  Status cancel_reason() const;

  // Sets the trailing metadata and counts the call.
  grpc::Status finish(const Status& status);

 private:
  ServerState& state_;
  CallRegistry& registry_;
  grpc::CallbackServerContext& context_;
  const char* rpc_;
  std::string label_, trace_id_;
  std::chrono::steady_clock::time_point started_at_;
};

const char* grpc_code_name(StatusCode code);  // "INVALID_ARGUMENT"

}  // namespace kvarn
