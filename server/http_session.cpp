#include "server/http_session.h"

#include <exception>
#include <typeinfo>

#include <fmt/format.h>
#include <boost/asio/as_tuple.hpp>
#include <boost/asio/buffer.hpp>
#include <boost/asio/co_spawn.hpp>
#include <boost/asio/experimental/awaitable_operators.hpp>
#include <boost/asio/post.hpp>
#include <boost/asio/this_coro.hpp>
#include <boost/asio/use_awaitable.hpp>

#include "kernels/core/log.h"
#include "server/http_status.h"
#include "server/simple_endpoints.h"

namespace kvarn {
namespace {

namespace asio = boost::asio;
using asio::experimental::awaitable_operators::operator||;
using boost::system::error_code;

constexpr auto kToken = asio::as_tuple(asio::use_awaitable);
// What the kernel may hold for a slow reader, beside its outbox.
constexpr int kSendBufferBytes = 128 * 1024;
constexpr size_t kMaxBuffered = 256 * 1024;  // beside a head: pipelined requests wait in the kernel

std::string_view known_method(const std::string& method) {
  for (const std::string_view known :
       {"GET", "POST", "HEAD", "OPTIONS", "PUT", "PATCH", "DELETE"}) {
    if (method == known) return known;
  }
  return "other";
}

}  // namespace

HttpSession::HttpSession(asio::ip::tcp::socket socket, ServerState& state,
                         asio::thread_pool& text_pool)
    : socket_(std::move(socket)),
      state_(state),
      text_pool_(text_pool),
      buffer_(static_cast<size_t>(state.config.max_header_bytes) + kMaxBuffered),
      timer_(socket_.get_executor()),
      wake_(socket_.get_executor()) {}

HttpSession::~HttpSession() = default;

void HttpSession::start(std::function<void()> on_closed) {
  on_closed_ = std::move(on_closed);
  error_code ignored;
  socket_.non_blocking(true, ignored);
  socket_.set_option(asio::ip::tcp::no_delay(true), ignored);
  socket_.set_option(asio::socket_base::send_buffer_size(kSendBufferBytes), ignored);
  asio::co_spawn(
      socket_.get_executor(), [self = shared_from_this()] { return self->run(); },
      [self = shared_from_this()](const std::exception_ptr&) {
        error_code ignored_at_end;
        self->socket_.close(ignored_at_end);
        self->on_closed_();
      });
}

void HttpSession::close_when_idle(bool also_fresh) {
  asio::post(socket_.get_executor(), [self = shared_from_this(), also_fresh] {
    if (!self->served_ && !also_fresh) return;
    self->closing_ = true;
    error_code ignored;
    if (self->idle_) self->socket_.cancel(ignored);
  });
}

void HttpSession::cut() {
  asio::post(socket_.get_executor(), [self = shared_from_this()] {
    self->closing_ = self->broken_ = true;
    self->wake_.cancel();
    error_code ignored;
    self->socket_.close(ignored);
  });
}

HttpSession::Awaitable<void> HttpSession::run() {
  while (!closing_ && !broken_) {
    HttpRequest request;
    const Turn turn = co_await read_request(request);
    if (turn == Turn::kEnd) break;
    if (turn == Turn::kRequest) co_await answer(request);
  }
  if (!broken_ && (lingers_ || buffer_.size() > 0)) co_await linger();
}

HttpAnswer HttpSession::error(const HttpRequest& request, const Status& status) const {
  return error_answer(public_error(status, request.framing.request_id),
                      state_.retry_after_seconds());
}

HttpSession::Awaitable<void> HttpSession::answer(HttpRequest& request) {
  const Handler handler = request.endpoint->handler;
  if (handler == Handler::kChat || handler == Handler::kCompletions) {
    co_await generate(request);
    co_return;
  }
  HttpAnswer answer;
  bool failed = false;
  try {
    std::function<void()> work = [&] {
      answer = answer_simple(state_, *request.endpoint, request.path, request.body,
                             request.framing.request_id);
    };
    // Tokenising a long text takes a while: off the I/O thread. Everything else is quick.
    if (request.endpoint->takes_body()) {
      co_await on_text_pool(work);
    } else {
      work();
    }
  } catch (const std::exception& failure) {
    log_error(fmt::format("http label={} internal_error={}", request.framing.request_id,
                          typeid(failure).name()));
    failed = true;
  }
  if (failed) answer = error(request, Status::internal("exception"));
  co_await send(request, answer);
}

HttpSession::Awaitable<void> HttpSession::on_text_pool(std::function<void()>& work) {
  struct Job {
    std::function<void()> work;
    std::exception_ptr error;
    bool done = false;  // on the strand
  };
  const auto job = std::make_shared<Job>();
  job->work = std::move(work);
  asio::post(text_pool_, [job, self = shared_from_this()] {
    try {
      job->work();
    } catch (...) {
      job->error = std::current_exception();
    }
    job->work = nullptr;  // what it held is let go here, not by whoever waits
    asio::post(self->socket_.get_executor(), [job, self] {
      job->done = true;
      self->wake_.cancel();
    });
  });
  while (!job->done) {
    wake_.expires_at(Clock::time_point::max());
    co_await wake_.async_wait(kToken);
  }
  if (job->error) std::rethrow_exception(job->error);
}

HttpSession::Awaitable<void> HttpSession::send(const HttpRequest& request, HttpAnswer& answer) {
  if (closing_ || state_.health.state() == HealthState::kDraining) answer.close = true;
  const bool close = answer.close || !request.framing.keep_alive;
  answered_ = true;
  finish(request, answer.status, answer.error);
  const std::string bytes = write_answer(answer, request.framing);
  co_await write_all(bytes);
  if (close) closing_ = true;
}

HttpSession::Awaitable<bool> HttpSession::write_all(std::string_view bytes) {
  const auto limit = std::chrono::duration_cast<Clock::duration>(
      std::chrono::duration<double>(state_.config.write_seconds));
  Clock::time_point until = Clock::now() + limit;
  while (!bytes.empty() && !broken_) {
    error_code error;
    const size_t written = socket_.write_some(asio::buffer(bytes.data(), bytes.size()), error);
    if (!error) {
      bytes.remove_prefix(written);
      until = Clock::now() + limit;
      continue;
    }
    if (error != asio::error::would_block && error != asio::error::try_again) {
      broken_ = true;
      break;
    }
    wake_.expires_at(until);
    co_await (socket_.async_wait(asio::ip::tcp::socket::wait_write, kToken) ||
              wake_.async_wait(kToken));
    // Woken by the outbox: what it holds is either merged into the next event or past its bound.
    const bool overflowed = watched_ != nullptr && watched_->aborted();
    if (overflowed || Clock::now() >= until) slow_ = broken_ = true;
  }
  co_return !broken_;
}

void HttpSession::finish(const HttpRequest& request, int status, std::string_view error) {
  const std::string_view route = request.endpoint == nullptr ? "other" : request.endpoint->pattern;
  const std::string_view method = known_method(request.method);
  state_.metrics.http_request(route, method, status);
  const bool probe = request.endpoint != nullptr && !request.endpoint->takes_body();
  const LogLevel level = probe ? LogLevel::kDebug : LogLevel::kInfo;
  if (!log_enabled(level)) return;
  std::string line =
      fmt::format("http method={} route={} status={} label={} seconds={:.3f}", method, route,
                  status, request.framing.request_id,
                  std::chrono::duration<double>(Clock::now() - request.received_at).count());
  if (!error.empty()) line += fmt::format(" error={}", error);
  if (!request.trace_id.empty()) line += " trace=" + request.trace_id;
  log_line(level, line);
}

}  // namespace kvarn
