#include "server/grpc_call.h"

#include <grpcpp/grpcpp.h>

#include <algorithm>
#include <cctype>
#include <random>

#include <fmt/format.h>

#include "kernels/core/log.h"

namespace kvarn {
namespace {

using Clock = std::chrono::steady_clock;

bool is_label(std::string_view text) {
  constexpr size_t kMaxLabel = 128;
  return !text.empty() && text.size() <= kMaxLabel &&
         std::all_of(text.begin(), text.end(), [](char c) {
           return std::isalnum(static_cast<unsigned char>(c)) != 0 || c == '.' || c == '_' ||
                  c == ':' || c == '-';
         });
}

std::string metadata(const grpc::CallbackServerContext& context, const char* key) {
  const auto it = context.client_metadata().find(key);
  return it == context.client_metadata().end() ? std::string()
                                               : std::string(it->second.data(), it->second.size());
}

std::string random_label() {
  thread_local std::mt19937_64 random{std::random_device{}()};
  return fmt::format("req-{:016x}", random());
}

bool is_hex(std::string_view text) {
  return std::all_of(text.begin(), text.end(),
                     [](char c) { return (c >= '0' && c <= '9') || (c >= 'a' && c <= 'f'); });
}

// W3C traceparent: version-traceid-parentid-flags. Empty where it is not one.
std::string trace_id_of(const std::string& traceparent) {
  constexpr size_t kLength = 2 + 1 + 32 + 1 + 16 + 1 + 2;
  if (traceparent.size() < kLength) return {};
  const std::string_view text = traceparent;
  const std::string_view version = text.substr(0, 2), trace = text.substr(3, 32),
                         parent = text.substr(36, 16), flags = text.substr(53, 2);
  const bool dashes = text[2] == '-' && text[35] == '-' && text[52] == '-';
  const bool zero = trace.find_first_not_of('0') == std::string_view::npos ||
                    parent.find_first_not_of('0') == std::string_view::npos;
  if (!dashes || zero || version == "ff" || !is_hex(version) || !is_hex(trace) || !is_hex(parent) ||
      !is_hex(flags)) {
    return {};
  }
  if (version == "00" && text.size() != kLength) return {};
  return std::string(trace);
}

// Metadata values are printable ASCII; a path may hold a client's characters.
std::string printable(std::string text) {
  for (char& c : text) {
    if (c < 0x20 || c > 0x7e) c = '?';
  }
  return text;
}

}  // namespace

void CallRegistry::enter() {
  const std::lock_guard lock(mutex_);
  ++running_;
}

void CallRegistry::leave() {
  const std::lock_guard lock(mutex_);
  if (--running_ == 0) idle_.notify_all();
}

bool CallRegistry::wait_idle(Clock::time_point deadline) {
  std::unique_lock lock(mutex_);
  return idle_.wait_until(lock, deadline, [this] { return running_ == 0; });
}

void CallRegistry::watch(const std::shared_ptr<WatchedCall>& call) {
  const std::lock_guard lock(mutex_);
  watched_[call.get()] = call;
}

void CallRegistry::unwatch(const WatchedCall* call) {
  const std::lock_guard lock(mutex_);
  watched_.erase(call);
}

void CallRegistry::check_progress(Clock::time_point now) {
  std::vector<std::shared_ptr<WatchedCall>> calls;
  {
    const std::lock_guard lock(mutex_);
    for (const auto& [key, weak] : watched_) {
      if (std::shared_ptr<WatchedCall> call = weak.lock()) calls.push_back(std::move(call));
    }
  }
  for (const std::shared_ptr<WatchedCall>& call : calls) call->check_progress(now);
}

GrpcCall::GrpcCall(ServerState& state, CallRegistry& registry, grpc::CallbackServerContext& context,
                   const char* rpc, const std::string& label)
    : state_(state),
      registry_(registry),
      context_(context),
      rpc_(rpc),
      label_(label.empty() ? metadata(context, "x-request-id") : label),
      trace_id_(trace_id_of(metadata(context, "traceparent"))),
      started_at_(Clock::now()) {
  if (!is_label(label_)) label_ = random_label();
  registry_.enter();
}

GrpcCall::~GrpcCall() { registry_.leave(); }

std::optional<Clock::time_point> GrpcCall::deadline() const {
  const std::chrono::system_clock::time_point deadline = context_.deadline();
  if (deadline == std::chrono::system_clock::time_point::max()) return std::nullopt;
  return Clock::now() + (deadline - std::chrono::system_clock::now());
}

Status GrpcCall::cancel_reason() const {
  const std::optional<Clock::time_point> end = deadline();
  if (end && *end <= Clock::now()) {
    return {StatusCode::kDeadlineExceeded, "deadline_exceeded", "the deadline of the call is over"};
  }
  return {StatusCode::kCancelled, "client_gone", "the client cancelled the call"};
}

grpc::Status GrpcCall::finish(const Status& status) {
  context_.AddTrailingMetadata("x-request-id", label_);
  if (!status.is_ok()) {
    context_.AddTrailingMetadata("kvarn-error-code", printable(status.reason()));
    if (!status.param().empty()) {
      context_.AddTrailingMetadata("kvarn-error-param", printable(status.param()));
    }
  }
  const char* code = grpc_code_name(status.code());
  state_.metrics.grpc_request(rpc_, code);
  if (log_enabled(LogLevel::kInfo)) {
    const std::chrono::duration<double> took = Clock::now() - started_at_;
    log_info(fmt::format("grpc rpc={} code={} label={} seconds={:.3f}{}{}", rpc_, code, label_,
                         took.count(), status.is_ok() ? "" : " error=" + status.reason(),
                         trace_id_.empty() ? "" : " trace=" + trace_id_));
  }
  if (status.is_ok()) return grpc::Status::OK;
  return {static_cast<grpc::StatusCode>(status.code()), status.message()};
}

const char* grpc_code_name(StatusCode code) {
  switch (code) {
    case StatusCode::kOk:
      return "OK";
    case StatusCode::kCancelled:
      return "CANCELLED";
    case StatusCode::kInvalidArgument:
      return "INVALID_ARGUMENT";
    case StatusCode::kDeadlineExceeded:
      return "DEADLINE_EXCEEDED";
    case StatusCode::kNotFound:
      return "NOT_FOUND";
    case StatusCode::kPermissionDenied:
      return "PERMISSION_DENIED";
    case StatusCode::kResourceExhausted:
      return "RESOURCE_EXHAUSTED";
    case StatusCode::kFailedPrecondition:
      return "FAILED_PRECONDITION";
    case StatusCode::kUnimplemented:
      return "UNIMPLEMENTED";
    case StatusCode::kInternal:
      return "INTERNAL";
    case StatusCode::kUnavailable:
      return "UNAVAILABLE";
    case StatusCode::kUnauthenticated:
      return "UNAUTHENTICATED";
  }
  return "UNKNOWN";
}

}  // namespace kvarn
