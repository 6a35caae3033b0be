// One parsed HTTP request and the checks that need no body. Pure: no sockets, no Beast.
#pragma once

#include <chrono>
#include <cstdint>
#include <optional>
#include <string>

#include "kernels/core/status.h"
#include "server/http_answer.h"
#include "server/routes.h"

namespace kvarn {

struct HttpRequest {
  std::string method;  // as sent
  std::string target;
  std::string path;
  const Endpoint* endpoint = nullptr;  // null: unknown path
  std::string body;
  HttpFraming framing;      // version, keep-alive, HEAD, X-Request-Id
  std::string trace_id;     // of a valid traceparent, else empty
  bool from_client = true;  // false: the head could not be read
  std::optional<std::chrono::steady_clock::time_point> deadline;  // of X-Request-Timeout
  std::chrono::steady_clock::time_point received_at;
};

// Header fields as the checks need them. Empty optional: absent.
struct HttpHead {
  int host_count = 0;
  std::optional<std::string> transfer_encoding, content_type, content_encoding, expect;
  std::optional<std::string> request_id, traceparent, request_timeout;
  std::optional<uint64_t> content_length;
  bool has_body = false;
  size_t header_bytes = 0, request_line_bytes = 0;
};

// Fills what the head says about the request: path, endpoint, id, trace, deadline.
Status read_head(const HttpHead& head, HttpRequest& request);
// Framing faults of the head: malformed_request, uri_too_long, headers_too_large.
Status check_framing(const HttpHead& head, const HttpRequest& request, int64_t max_header_bytes);
// Path and method, then media type, declared length and Expect. OPTIONS is answered elsewhere.
Status check_endpoint(const HttpRequest& request);
Status check_body_headers(const HttpHead& head, const HttpRequest& request, int64_t max_body_bytes);

bool valid_request_id(const std::string& id);
std::string make_request_id();
std::string trace_id_of(const std::string& traceparent);  // empty: invalid

}  // namespace kvarn
