// Requests off the wire, within limits and time. The socket is non-blocking and waited on by
// readiness, so giving up a wait never loses bytes.
#include <boost/asio/as_tuple.hpp>
#include <boost/asio/experimental/awaitable_operators.hpp>
#include <boost/asio/use_awaitable.hpp>
#include <boost/beast/http/error.hpp>
#include <boost/beast/http/string_body.hpp>

#include <fmt/format.h>

#include "server/http_session.h"

namespace kvarn {
namespace {

namespace asio = boost::asio;
namespace http = boost::beast::http;
using asio::experimental::awaitable_operators::operator||;
using boost::system::error_code;
using Clock = HttpSession::Clock;

constexpr auto kToken = asio::as_tuple(asio::use_awaitable);
constexpr size_t kReadBytes = 64 * 1024;
constexpr size_t kRequestLineRoom = 8 * 1024 + 64;  // beside --max-header-bytes
constexpr uint64_t kShortBody = 64 * 1024;          // read and dropped to keep the connection
constexpr auto kLingerTime = std::chrono::seconds(2);

Clock::duration seconds(double value) {
  return std::chrono::duration_cast<Clock::duration>(std::chrono::duration<double>(value));
}

std::optional<std::string> field(const auto& fields, auto name) {
  const auto found = fields.find(name);
  if (found == fields.end()) return std::nullopt;
  return std::string(found->value());
}

HttpHead head_of(const auto& parser) {
  const auto& message = parser.get();
  HttpHead head;
  head.host_count = static_cast<int>(message.count(http::field::host));
  head.transfer_encoding = field(message, http::field::transfer_encoding);
  head.content_type = field(message, http::field::content_type);
  head.content_encoding = field(message, http::field::content_encoding);
  head.expect = field(message, http::field::expect);
  head.request_id = field(message, "X-Request-Id");
  head.traceparent = field(message, "traceparent");
  head.request_timeout = field(message, "X-Request-Timeout");
  if (message.count(http::field::content_length) > 0) {
    head.content_length = parser.content_length() ? *parser.content_length() : 0;
  }
  head.request_line_bytes = message.method_string().size() + message.target().size() + 12;
  for (const auto& entry : message) {
    head.header_bytes += entry.name_string().size() + entry.value().size() + 4;
  }
  return head;
}

}  // namespace

HttpSession::Awaitable<HttpSession::Read> HttpSession::read_some(Clock::time_point until) {
  for (;;) {
    error_code error;
    const size_t bytes = socket_.read_some(buffer_.prepare(kReadBytes), error);
    if (!error) {
      buffer_.commit(bytes);
      co_return Read::kData;
    }
    if (error != asio::error::would_block && error != asio::error::try_again) co_return Read::kEnd;
    timer_.expires_at(until);
    const auto first = co_await (socket_.async_wait(asio::ip::tcp::socket::wait_read, kToken) ||
                                 timer_.async_wait(kToken));
    if (first.index() == 1) co_return Read::kTimeout;
    if (std::get<0>(std::get<0>(first))) co_return Read::kEnd;
  }
}

HttpSession::Awaitable<bool> HttpSession::wait_for_first_byte() {
  idle_ = true;
  const auto until = Clock::now() + seconds(state_.config.keep_alive_seconds);
  for (;;) {
    // Empty lines before a request are left over from sloppy clients; RFC 9112 2.2 skips them.
    while (buffer_.size() > 0) {
      const char first = *static_cast<const char*>(buffer_.data().data());
      if (first != '\r' && first != '\n') break;
      buffer_.consume(1);
    }
    if (buffer_.size() > 0) break;
    if (closing_ || co_await read_some(until) != Read::kData) co_return false;
  }
  idle_ = false;
  served_ = true;
  co_return true;
}

HttpSession::Awaitable<HttpSession::Read> HttpSession::read_header(HeadParser& parser,
                                                                   error_code& error) {
  const auto until = Clock::now() + seconds(state_.config.header_seconds);
  for (;;) {
    error = {};
    buffer_.consume(parser.put(buffer_.data(), error));
    if (parser.is_header_done() || (error && error != http::error::need_more)) {
      co_return Read::kData;
    }
    const Read read = co_await read_some(until);
    if (read != Read::kData) co_return read;
  }
}

HttpSession::Awaitable<HttpSession::Turn> HttpSession::fail(HttpRequest& request,
                                                            const char* reason,
                                                            const char* message) {
  const Status status(StatusCode::kInvalidArgument, reason, message);
  co_return co_await fail(request, status);
}

HttpSession::Awaitable<HttpSession::Turn> HttpSession::fail(HttpRequest& request,
                                                            const Status& status) {
  if (request.framing.request_id.empty()) request.framing.request_id = make_request_id();
  request.framing.keep_alive = false;
  HttpAnswer answer = error(request, status);
  lingers_ = true;
  co_await send(request, answer);
  co_return Turn::kEnd;
}

HttpSession::Awaitable<HttpSession::Turn> HttpSession::read_request(HttpRequest& request) {
  if (!co_await wait_for_first_byte()) co_return Turn::kEnd;
  request.received_at = Clock::now();
  answered_ = false;
  HeadParser parser;
  parser.header_limit(static_cast<uint32_t>(static_cast<size_t>(state_.config.max_header_bytes) +
                                            kRequestLineRoom));
  parser.body_limit(boost::none);  // checked below, in the order of the docs
  error_code error;
  const Read read = co_await read_header(parser, error);
  if (read == Read::kEnd) co_return Turn::kEnd;
  if (read == Read::kTimeout) {
    co_return co_await fail(request, "request_timeout",
                            "the headers did not arrive in time "
                            "(--header-seconds)");
  }
  if (error == http::error::header_limit || error == http::error::buffer_overflow) {
    if (!parser.get().target().empty()) {  // the request line was complete
      co_return co_await fail(request, "headers_too_large",
                              "the headers are too long (--max-header-bytes)");
    }
    co_return co_await fail(request, "uri_too_long", "the request line is longer than 8192 bytes");
  }
  if (error && error != http::error::need_more) {
    co_return co_await fail(request, "malformed_request", "not a valid HTTP/1.1 request");
  }
  const HttpHead head = head_of(parser);
  request.method = std::string(parser.get().method_string());
  request.target = std::string(parser.get().target());
  request.framing.version = static_cast<int>(parser.get().version());
  request.framing.keep_alive = parser.keep_alive();
  const Status values = read_head(head, request);
  if (const Status bad = check_framing(head, request, state_.config.max_header_bytes);
      !bad.is_ok()) {
    co_return co_await fail(request, bad);
  }
  const bool expects = head.expect.has_value();
  if (request.method == "OPTIONS" && (request.endpoint != nullptr || request.path == "*")) {
    HttpAnswer options;
    options.status = 204;
    options.headers.emplace_back("Allow", request.endpoint == nullptr
                                              ? "GET, HEAD, POST, OPTIONS"
                                              : std::string(request.endpoint->allow()));
    co_return co_await answer_early(request, options, parser, expects);
  }
  Status refused = check_endpoint(request);
  const bool wrong_method = refused.reason() == "method_not_allowed";
  if (refused.is_ok() && request.endpoint->handler == Handler::kLaterStage) {
    refused = Status(StatusCode::kUnimplemented, "unsupported_endpoint",
                     fmt::format("{} {} belongs to a later stage and is not served yet",
                                 request.endpoint->method, request.endpoint->pattern));
  }
  if (refused.is_ok()) refused = check_body_headers(head, request, state_.config.max_body_bytes);
  if (refused.is_ok() && !request.endpoint->open) refused = state_.loaded().status();
  if (refused.is_ok()) refused = values;
  if (!refused.is_ok()) {
    HttpAnswer no = this->error(request, refused);
    if (wrong_method) no.headers.emplace_back("Allow", std::string(request.endpoint->allow()));
    co_return co_await answer_early(request, no, parser, expects);
  }
  co_return co_await read_body(request, parser, expects);
}

HttpSession::Awaitable<HttpSession::Turn> HttpSession::answer_early(HttpRequest& request,
                                                                    HttpAnswer& answer,
                                                                    HeadParser& parser,
                                                                    bool expects_continue) {
  if (!parser.is_done()) {
    const bool is_short = parser.content_length() && *parser.content_length() <= kShortBody;
    if (!is_short || expects_continue || answer.close) {
      answer.close = lingers_ = true;
    } else if (co_await read_body(request, parser, false) != Turn::kRequest) {
      co_return Turn::kEnd;
    }
  }
  co_await send(request, answer);
  co_return Turn::kAnswered;
}

HttpSession::Awaitable<HttpSession::Turn> HttpSession::read_body(HttpRequest& request,
                                                                 HeadParser& parser,
                                                                 bool expects_continue) {
  if (parser.is_done()) co_return Turn::kRequest;
  if (expects_continue && buffer_.size() == 0 &&
      !co_await write_all("HTTP/1.1 100 Continue\r\n\r\n")) {
    co_return Turn::kEnd;
  }
  http::request_parser<http::string_body> body(std::move(parser));
  body.body_limit(static_cast<uint64_t>(state_.config.max_body_bytes));
  while (!body.is_done()) {
    error_code error;
    if (buffer_.size() > 0) buffer_.consume(body.put(buffer_.data(), error));
    if (body.is_done()) break;
    if (error == http::error::body_limit) {
      const Status too_large(StatusCode::kInvalidArgument, "body_too_large",
                             fmt::format("the body is longer than {} bytes (--max-body-bytes)",
                                         state_.config.max_body_bytes));
      co_return co_await fail(request, too_large);
    }
    if (error && error != http::error::need_more) {
      co_return co_await fail(request, "malformed_request",
                              "the body's chunks are "
                              "malformed");
    }
    if (!error && buffer_.size() > 0) continue;
    const Read read = co_await read_some(Clock::now() + seconds(state_.config.body_seconds));
    if (read == Read::kEnd) co_return Turn::kEnd;
    if (read == Read::kTimeout) {
      co_return co_await fail(request, "request_timeout",
                              "the body stopped arriving (--body-seconds)");
    }
  }
  request.body = std::move(body.get().body());
  co_return Turn::kRequest;
}

// A socket closed with unread bytes resets the connection, and the peer may lose our answer.
HttpSession::Awaitable<void> HttpSession::linger() {
  error_code ignored;
  socket_.shutdown(asio::ip::tcp::socket::shutdown_send, ignored);
  const auto until = Clock::now() + kLingerTime;
  do {
    buffer_.consume(buffer_.size());
  } while (Clock::now() < until && co_await read_some(until) == Read::kData);
}

}  // namespace kvarn
