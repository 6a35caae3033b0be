#include "server/http_request.h"

#include <algorithm>
#include <charconv>
#include <cmath>
#include <random>

#include <fmt/format.h>

#include "server/param_error.h"

namespace kvarn {
namespace {

constexpr size_t kMaxRequestLine = 8 * 1024;

Status http_error(const char* reason, std::string message) {
  return {StatusCode::kInvalidArgument, reason, std::move(message)};
}

std::string lower(std::string text) {
  for (char& c : text) c = c >= 'A' && c <= 'Z' ? static_cast<char>(c - 'A' + 'a') : c;
  return text;
}

std::string trimmed(std::string_view text) {
  const size_t begin = text.find_first_not_of(" \t");
  if (begin == std::string_view::npos) return {};
  return std::string(text.substr(begin, text.find_last_not_of(" \t") - begin + 1));
}

// application/json, with no parameter but charset=utf-8.
bool is_json_type(const std::string& value) {
  size_t at = value.find(';');
  if (lower(trimmed(value.substr(0, at))) != "application/json") return false;
  while (at != std::string::npos) {
    const size_t end = value.find(';', at + 1);
    const std::string parameter = lower(trimmed(std::string_view(value).substr(
        at + 1, end == std::string::npos ? std::string::npos : end - at - 1)));
    if (parameter.starts_with("charset=")) {
      std::string charset = parameter.substr(8);
      std::erase(charset, '"');
      if (charset != "utf-8" && charset != "utf8") return false;
    }
    at = end;
  }
  return true;
}

}  // namespace

bool valid_request_id(const std::string& id) {
  return !id.empty() && id.size() <= 128 && std::all_of(id.begin(), id.end(), [](char c) {
    return (c >= 'A' && c <= 'Z') || (c >= 'a' && c <= 'z') || (c >= '0' && c <= '9') || c == '.' ||
           c == '_' || c == ':' || c == '-';
  });
}

std::string make_request_id() {
  thread_local std::mt19937_64 random{std::random_device{}()};
  return fmt::format("req-{:016x}", random());
}

std::string trace_id_of(const std::string& traceparent) {
  // version "-" trace-id "-" parent-id "-" flags, lower-case hex; ff is no version, zeros no id.
  const auto hex = [&](size_t from, size_t count) {
    return std::all_of(traceparent.begin() + static_cast<std::ptrdiff_t>(from),
                       traceparent.begin() + static_cast<std::ptrdiff_t>(from + count),
                       [](char c) { return (c >= '0' && c <= '9') || (c >= 'a' && c <= 'f'); });
  };
  if (traceparent.size() < 55 || traceparent[2] != '-' || traceparent[35] != '-' ||
      traceparent[52] != '-' || !hex(0, 2) || !hex(3, 32) || !hex(36, 16) || !hex(53, 2)) {
    return {};
  }
  const std::string version = traceparent.substr(0, 2), trace = traceparent.substr(3, 32);
  const bool longer = traceparent.size() > 55;
  if (version == "ff" || (version == "00" && longer) || (longer && traceparent[55] != '-') ||
      trace == std::string(32, '0') || traceparent.substr(36, 16) == std::string(16, '0')) {
    return {};
  }
  return trace;
}

Status read_head(const HttpHead& head, HttpRequest& request) {
  request.path = std::string(target_path(request.target));
  request.endpoint = find_endpoint(request.path);
  request.framing.head_only = request.method == "HEAD";
  request.framing.request_id = head.request_id.has_value() && valid_request_id(*head.request_id)
                                   ? *head.request_id
                                   : make_request_id();
  request.trace_id = trace_id_of(head.traceparent.value_or(""));
  if (!head.request_timeout.has_value()) return Status::ok();
  const std::string& text = *head.request_timeout;
  double seconds = 0;
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), seconds);
  if (error != std::errc() || end != text.data() + text.size() || !std::isfinite(seconds) ||
      !(seconds > 0)) {
    return range_error("X-Request-Timeout", "seconds, greater than 0",
                       shown_value(std::string_view(text)));
  }
  constexpr double kYear = 366.0 * 86400;  // sums of time points stay far from overflow
  request.deadline =
      request.received_at + std::chrono::duration_cast<std::chrono::steady_clock::duration>(
                                std::chrono::duration<double>(std::min(seconds, kYear)));
  return Status::ok();
}

Status check_framing(const HttpHead& head, const HttpRequest& request, int64_t max_header_bytes) {
  if (head.request_line_bytes > kMaxRequestLine) {
    return http_error("uri_too_long",
                      fmt::format("the request line is longer than {} bytes", kMaxRequestLine));
  }
  if (head.header_bytes > static_cast<size_t>(max_header_bytes)) {
    return http_error(
        "headers_too_large",
        fmt::format("the headers are longer than {} bytes (--max-header-bytes)", max_header_bytes));
  }
  if (head.host_count > 1 || (head.host_count == 0 && request.framing.version == 11)) {
    return http_error("malformed_request",
                      fmt::format("a request has one Host header, got {}", head.host_count));
  }
  if (head.transfer_encoding.has_value()) {
    if (head.content_length.has_value()) {
      return http_error("malformed_request",
                        "Content-Length and Transfer-Encoding exclude each other");
    }
    if (lower(trimmed(*head.transfer_encoding)) != "chunked" || request.framing.version == 10) {
      return http_error("malformed_request", "the only transfer coding is chunked, in HTTP/1.1");
    }
  }
  return Status::ok();
}

Status check_endpoint(const HttpRequest& request) {
  if (request.endpoint == nullptr) {
    return {StatusCode::kNotFound, "not_found",
            fmt::format("there is no endpoint {}", shown_value(std::string_view(request.path)))};
  }
  const bool matches = request.method == request.endpoint->method ||
                       (request.method == "HEAD" && request.endpoint->method == "GET");
  if (!matches) {
    return http_error("method_not_allowed", fmt::format("{} answers {}", request.endpoint->pattern,
                                                        request.endpoint->allow()));
  }
  return Status::ok();
}

Status check_body_headers(const HttpHead& head, const HttpRequest& request,
                          int64_t max_body_bytes) {
  if (request.endpoint->takes_body()) {
    if (!is_json_type(head.content_type.value_or(""))) {
      return http_error("unsupported_media_type",
                        "Content-Type must be application/json, in UTF-8");
    }
    if (lower(trimmed(head.content_encoding.value_or("identity"))) != "identity") {
      return http_error("unsupported_media_type", "Content-Encoding must be identity");
    }
  }
  if (head.content_length.value_or(0) > static_cast<uint64_t>(max_body_bytes)) {
    return http_error(
        "body_too_large",
        fmt::format("the body is longer than {} bytes (--max-body-bytes)", max_body_bytes));
  }
  if (head.expect.has_value() && lower(trimmed(*head.expect)) != "100-continue") {
    return http_error("expectation_failed", "the only expectation is 100-continue");
  }
  return Status::ok();
}

}  // namespace kvarn
