#include "server/http_answer.h"

#include <ctime>

#include <fmt/format.h>

#include "server/http_status.h"

namespace kvarn {
namespace {

std::string_view reason_phrase(int status) {
  switch (status) {
    case 200:
      return "OK";
    case 204:
      return "No Content";
    case 400:
      return "Bad Request";
    case 401:
      return "Unauthorized";
    case 403:
      return "Forbidden";
    case 404:
      return "Not Found";
    case 405:
      return "Method Not Allowed";
    case 408:
      return "Request Timeout";
    case 413:
      return "Content Too Large";
    case 414:
      return "URI Too Long";
    case 415:
      return "Unsupported Media Type";
    case 417:
      return "Expectation Failed";
    case 429:
      return "Too Many Requests";
    case 431:
      return "Request Header Fields Too Large";
    case 499:
      return "Client Closed Request";
    case 500:
      return "Internal Server Error";
    case 501:
      return "Not Implemented";
    case 503:
      return "Service Unavailable";
    case 504:
      return "Gateway Timeout";
    default:
      return "Unknown";
  }
}

// IMF-fixdate, written without the locale.
std::string http_date() {
  static constexpr const char* kDays[] = {"Sun", "Mon", "Tue", "Wed", "Thu", "Fri", "Sat"};
  static constexpr const char* kMonths[] = {"Jan", "Feb", "Mar", "Apr", "May", "Jun",
                                            "Jul", "Aug", "Sep", "Oct", "Nov", "Dec"};
  const std::time_t now = std::time(nullptr);
  std::tm utc{};
  gmtime_r(&now, &utc);
  return fmt::format("{}, {:02} {} {} {:02}:{:02}:{:02} GMT", kDays[utc.tm_wday], utc.tm_mday,
                     kMonths[utc.tm_mon], 1900 + utc.tm_year, utc.tm_hour, utc.tm_min, utc.tm_sec);
}

void append_common(std::string& out, const HttpFraming& framing, int status, bool keep_alive) {
  fmt::format_to(std::back_inserter(out), "HTTP/1.{} {} {}\r\nDate: {}\r\n",
                 framing.version == 10 ? 0 : 1, status, reason_phrase(status), http_date());
  if (!framing.request_id.empty()) {
    fmt::format_to(std::back_inserter(out), "X-Request-Id: {}\r\n", framing.request_id);
  }
  if (!keep_alive) {
    out += "Connection: close\r\n";
  } else if (framing.version == 10) {
    out += "Connection: keep-alive\r\n";
  }
}

}  // namespace

HttpAnswer json_answer(std::string body, int status) {
  HttpAnswer answer;
  answer.status = status;
  answer.body = std::move(body);
  return answer;
}

HttpAnswer error_answer(const Status& status, int retry_after) {
  HttpAnswer answer = json_answer(error_body(status), http_status(status));
  if (wants_retry_after(status)) {
    answer.headers.emplace_back("Retry-After", fmt::format("{}", retry_after));
  }
  if (retry_is_pointless(status)) answer.headers.emplace_back("x-should-retry", "false");
  const std::string& reason = status.reason();
  answer.error = reason;
  for (const char* closing :
       {"malformed_request", "request_timeout", "body_too_large", "uri_too_long",
        "headers_too_large", "server_draining", "too_many_connections"}) {
    if (reason == closing) answer.close = true;
  }
  return answer;
}

std::string write_answer(const HttpAnswer& answer, const HttpFraming& framing) {
  std::string out;
  append_common(out, framing, answer.status, framing.keep_alive && !answer.close);
  if (answer.status != 204) {
    fmt::format_to(std::back_inserter(out), "Content-Type: {}\r\nContent-Length: {}\r\n",
                   answer.content_type, answer.body.size());
  }
  for (const auto& [name, value] : answer.headers) {
    fmt::format_to(std::back_inserter(out), "{}: {}\r\n", name, value);
  }
  out += "\r\n";
  if (!framing.head_only && answer.status != 204) out += answer.body;
  return out;
}

std::string write_stream_head(const HttpFraming& framing) {
  std::string out;
  append_common(out, framing, 200, framing.keep_alive && framing.version == 11);
  out +=
      "Content-Type: text/event-stream; charset=utf-8\r\n"
      "Cache-Control: no-cache\r\n"
      "X-Accel-Buffering: no\r\n";
  if (framing.version == 11) out += "Transfer-Encoding: chunked\r\n";
  out += "\r\n";
  return out;
}

std::string sse_event(std::string_view payload) { return fmt::format("data: {}\n\n", payload); }

std::string http_chunk(std::string_view bytes) {
  return fmt::format("{:x}\r\n{}\r\n", bytes.size(), bytes);
}

}  // namespace kvarn
