// One HTTP answer and how its head is written. Pure: no sockets, no Beast.
#pragma once

#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "kernels/core/status.h"

namespace kvarn {

inline constexpr std::string_view kJsonType = "application/json; charset=utf-8";

struct HttpAnswer {
  int status = 200;
  std::string content_type{kJsonType};
  std::string body;
  std::vector<std::pair<std::string, std::string>> headers;  // beyond those every answer has
  bool close = false;                                        // close the connection after it
  std::string error;                                         // error code for the log; none: empty
};

HttpAnswer json_answer(std::string body, int status = 200);
// The error object with its status and headers (Retry-After in seconds, x-should-retry). `status`
// may be shown to clients: pass failures of ours through public_error() first.
HttpAnswer error_answer(const Status& status, int retry_after);

// How the answer is framed on this connection.
struct HttpFraming {
  int version = 11;  // of the request: 10 or 11
  bool keep_alive = true;
  bool head_only = false;  // HEAD: Content-Length of the body that is not sent
  std::string request_id;
};

// Status line and headers, with the body unless HEAD.
std::string write_answer(const HttpAnswer& answer, const HttpFraming& framing);
// Head of an event stream: chunked for HTTP/1.1, delimited by close for HTTP/1.0.
std::string write_stream_head(const HttpFraming& framing);

// Server-sent events. `chunked` wraps the bytes as one HTTP chunk.
std::string sse_event(std::string_view payload);  // "data: ...\n\n"
inline constexpr std::string_view kSsePing = ": ping\n\n";
inline constexpr std::string_view kSseDone = "data: [DONE]\n\n";
std::string http_chunk(std::string_view bytes);
inline constexpr std::string_view kLastChunk = "0\r\n\r\n";

}  // namespace kvarn
