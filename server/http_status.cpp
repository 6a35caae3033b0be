#include "server/http_status.h"

#include <nlohmann/json.hpp>

#include "server/json_out.h"

namespace kvarn {

int http_status(const Status& status) {
  const std::string& reason = status.reason();
  switch (status.code()) {
    case StatusCode::kOk:
      return 200;
    case StatusCode::kCancelled:
      return 499;
    case StatusCode::kInvalidArgument:
      // These have no gRPC case: malformed framing that only HTTP can carry.
      if (reason == "method_not_allowed") return 405;
      if (reason == "request_timeout") return 408;
      if (reason == "body_too_large") return 413;
      if (reason == "uri_too_long") return 414;
      if (reason == "unsupported_media_type") return 415;
      if (reason == "expectation_failed") return 417;
      if (reason == "headers_too_large") return 431;
      return 400;
    case StatusCode::kDeadlineExceeded:
      return 504;
    case StatusCode::kNotFound:
      return 404;
    case StatusCode::kPermissionDenied:
      return 403;
    case StatusCode::kResourceExhausted:
      return 429;
    case StatusCode::kFailedPrecondition:
      return 400;
    case StatusCode::kUnimplemented:
      return 501;
    case StatusCode::kInternal:
      return 500;
    case StatusCode::kUnavailable:
      return 503;
    case StatusCode::kUnauthenticated:
      return 401;
  }
  return 500;
}

const char* error_type(int http_status) {
  if (http_status == 429) return "rate_limit_error";
  return http_status >= 500 ? "server_error" : "invalid_request_error";
}

std::string error_body(const Status& status) {
  nlohmann::ordered_json error;
  error["message"] = status.message();
  error["type"] = error_type(http_status(status));
  error["param"] = nullptr;
  if (!status.param().empty()) error["param"] = status.param();
  error["code"] = status.reason();
  return dump_json(nlohmann::ordered_json{{"error", std::move(error)}});
}

Status public_error(const Status& status, const std::string& request_id) {
  const std::string& reason = status.reason();
  std::string text;
  if (status.code() == StatusCode::kInternal) {
    text = reason == "engine_error" ? "the engine failed in a step" : "an internal error occurred";
  } else if (reason == "engine_unavailable") {
    text = "the engine is not available";
  } else if (reason == "server_shutdown") {
    text = "the server shut down before the request was complete";
  } else {
    return status;
  }
  return {status.code(), reason, text + "; request " + request_id, status.param()};
}

bool wants_retry_after(const Status& status) {
  if (status.code() == StatusCode::kResourceExhausted) return true;
  const std::string& reason = status.reason();
  return reason == "model_loading" || reason == "server_draining" ||
         reason == "too_many_connections";
}

bool retry_is_pointless(const Status& status) {
  return status.code() == StatusCode::kUnimplemented ||
         status.code() == StatusCode::kDeadlineExceeded;
}

}  // namespace kvarn
