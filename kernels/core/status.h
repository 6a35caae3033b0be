// Expected failures as values. A Status carries a canonical gRPC code (one switch maps it to HTTP),
// the reason string of the wire (`error.code`, docs/api.md), the parameter it blames, and a message
// that says what happened, the numbers, and what to do. Bugs abort (check.h); failures of one step
// throw and are caught at the step boundary by the engine.
#pragma once

#include <optional>
#include <string>
#include <utility>
#include <variant>

#include "kernels/core/check.h"

namespace kvarn {

// Values are those of grpc::StatusCode.
enum class StatusCode : int {
  kOk = 0,
  kCancelled = 1,
  kInvalidArgument = 3,
  kDeadlineExceeded = 4,
  kNotFound = 5,
  kPermissionDenied = 7,
  kResourceExhausted = 8,
  kFailedPrecondition = 9,
  kUnimplemented = 12,
  kInternal = 13,
  kUnavailable = 14,
  kUnauthenticated = 16,
};

class [[nodiscard]] Status {
 public:
  Status() = default;  // OK
  Status(StatusCode code, std::string reason, std::string message, std::string param = {})
      : code_(code),
        reason_(std::move(reason)),
        message_(std::move(message)),
        param_(std::move(param)) {}

  static Status ok() { return {}; }
  // A bad file, flag or shape: start-up and library code, where no wire reason applies.
  static Status invalid_argument(std::string message) {
    return {StatusCode::kInvalidArgument, "invalid_value", std::move(message)};
  }
  static Status not_found(std::string message) {
    return {StatusCode::kNotFound, "not_found", std::move(message)};
  }
  static Status failed_precondition(std::string message) {
    return {StatusCode::kFailedPrecondition, "failed_precondition", std::move(message)};
  }
  static Status resource_exhausted(std::string message) {
    return {StatusCode::kResourceExhausted, "resource_exhausted", std::move(message)};
  }
  static Status unimplemented(std::string message) {
    return {StatusCode::kUnimplemented, "unsupported_endpoint", std::move(message)};
  }
  static Status unavailable(std::string message) {
    return {StatusCode::kUnavailable, "engine_unavailable", std::move(message)};
  }
  static Status internal(std::string message) {
    return {StatusCode::kInternal, "internal_error", std::move(message)};
  }

  bool is_ok() const { return code_ == StatusCode::kOk; }
  explicit operator bool() const { return is_ok(); }
  StatusCode code() const { return code_; }
  const std::string& reason() const {
    return reason_;
  }  // wire code, e.g. "context_length_exceeded"
  const std::string& message() const { return message_; }
  const std::string& param() const { return param_; }  // e.g. "messages[2].role"; empty: none

 private:
  StatusCode code_ = StatusCode::kOk;
  std::string reason_, message_, param_;
};

// A value or the Status that says why there is none.
template <typename T>
class [[nodiscard]] Result {
 public:
  Result(T value)
      : value_(std::move(value)) {}  // NOLINT(google-explicit-constructor): reads like T
  Result(Status status) : value_(std::move(status)) {  // NOLINT(google-explicit-constructor)
    CHECK(!std::get<Status>(value_).is_ok(), "a Result needs a value or an error");
  }

  bool is_ok() const { return std::holds_alternative<T>(value_); }
  explicit operator bool() const { return is_ok(); }
  const Status& status() const {
    static const Status ok;
    return is_ok() ? ok : std::get<Status>(value_);
  }
  T& value() & {
    CHECK(is_ok(), std::get<Status>(value_).message().c_str());
    return std::get<T>(value_);
  }
  const T& value() const& {
    CHECK(is_ok(), std::get<Status>(value_).message().c_str());
    return std::get<T>(value_);
  }
  T&& value() && {
    CHECK(is_ok(), std::get<Status>(value_).message().c_str());
    return std::get<T>(std::move(value_));
  }
  T& operator*() & { return value(); }
  const T& operator*() const& { return value(); }
  T* operator->() { return &value(); }
  const T* operator->() const { return &value(); }

 private:
  std::variant<T, Status> value_;
};

// Leaves the calling function with the error of `expr`, a Status.
#define KVARN_RETURN_IF_ERROR(expr)                                                           \
  do {                                                                                        \
    if (::kvarn::Status kvarn_status_ = (expr); !kvarn_status_.is_ok()) return kvarn_status_; \
  } while (0)

// KVARN_ASSIGN_OR_RETURN(auto x, try_make_x()): declares x or leaves with the error.
#define KVARN_ASSIGN_OR_RETURN(lhs, expr) \
  KVARN_ASSIGN_OR_RETURN_IMPL_(KVARN_CONCAT_(kvarn_result_, __LINE__), lhs, expr)
#define KVARN_ASSIGN_OR_RETURN_IMPL_(tmp, lhs, expr) \
  auto tmp = (expr);                                 \
  if (!tmp.is_ok()) return tmp.status();             \
  lhs = std::move(tmp).value()
#define KVARN_CONCAT_(a, b) KVARN_CONCAT_IMPL_(a, b)
#define KVARN_CONCAT_IMPL_(a, b) a##b

}  // namespace kvarn
