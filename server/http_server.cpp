#include "server/http_server.h"

#include <condition_variable>
#include <mutex>
#include <thread>
#include <unordered_set>

#include <fmt/format.h>
#include <boost/asio/as_tuple.hpp>
#include <boost/asio/co_spawn.hpp>
#include <boost/asio/detached.hpp>
#include <boost/asio/io_context.hpp>
#include <boost/asio/ip/tcp.hpp>
#include <boost/asio/post.hpp>
#include <boost/asio/steady_timer.hpp>
#include <boost/asio/strand.hpp>
#include <boost/asio/thread_pool.hpp>
#include <boost/asio/use_awaitable.hpp>

#include "kernels/core/log.h"
#include "server/http_session.h"

namespace kvarn {
namespace {

namespace asio = boost::asio;
using asio::ip::tcp;
using boost::system::error_code;

constexpr int kBacklog = 4096;
constexpr size_t kTextThreads = 2;  // parse, render, tokenise

}  // namespace

class HttpServer::Impl {
 public:
  explicit Impl(ServerState& state) : state_(state) {}
  ~Impl() { stop(std::chrono::milliseconds(0)); }

  Status listen();
  void close_idle(bool also_fresh);
  void stop(std::chrono::milliseconds grace);
  int port() const { return port_; }

 private:
  asio::awaitable<void> accept();
  void open(tcp::socket socket);
  static asio::awaitable<void> refuse(tcp::socket socket, int retry_after);

  ServerState& state_;
  asio::io_context io_;
  asio::thread_pool text_pool_{kTextThreads};
  tcp::acceptor acceptor_{io_};
  std::vector<std::thread> threads_;
  int port_ = 0;
  std::mutex mutex_;
  std::condition_variable session_closed_;
  std::unordered_set<std::shared_ptr<HttpSession>> sessions_;
  bool stopped_ = false;
};

Status HttpServer::Impl::listen() {
  const ServerConfig& config = state_.config;
  const auto failed = [&](const error_code& error) {
    return Status::invalid_argument(
        fmt::format("cannot listen on {}:{}: {}; choose another --host or --port", config.host,
                    config.port, error.message()));
  };
  error_code error;
  tcp::resolver resolver(io_);
  const auto found =
      resolver.resolve(config.host, std::to_string(config.port), tcp::resolver::passive, error);
  if (error) return failed(error);
  const tcp::endpoint endpoint = found.begin()->endpoint();
  acceptor_.open(endpoint.protocol(), error);
  if (!error) acceptor_.set_option(tcp::acceptor::reuse_address(true), error);
  if (!error) acceptor_.bind(endpoint, error);
  if (!error) acceptor_.listen(kBacklog, error);
  if (error) return failed(error);
  port_ = acceptor_.local_endpoint().port();
  asio::co_spawn(io_, accept(), asio::detached);
  for (int i = 0; i < config.io_threads; ++i) {
    threads_.emplace_back([this] { io_.run(); });
  }
  return Status::ok();
}

asio::awaitable<void> HttpServer::Impl::accept() {
  asio::steady_timer pause(io_);
  for (;;) {
    auto [error, socket] = co_await acceptor_.async_accept(asio::make_strand(io_),
                                                           asio::as_tuple(asio::use_awaitable));
    if (error == asio::error::operation_aborted || !acceptor_.is_open()) co_return;
    if (error) {
      // Out of descriptors, mostly: without a pause this would spin.
      log_warning(fmt::format("http accept failed: {}", error.message()));
      pause.expires_after(std::chrono::milliseconds(50));
      co_await pause.async_wait(asio::as_tuple(asio::use_awaitable));
      continue;
    }
    open(std::move(socket));
  }
}

void HttpServer::Impl::open(tcp::socket socket) {
  auto executor = socket.get_executor();
  std::unique_lock lock(mutex_);
  if (sessions_.size() >= static_cast<size_t>(state_.config.max_connections)) {
    lock.unlock();
    state_.metrics.request_shed("too_many_connections");
    asio::co_spawn(executor, refuse(std::move(socket), state_.retry_after_seconds()),
                   asio::detached);
    return;
  }
  const auto session = std::make_shared<HttpSession>(std::move(socket), state_, text_pool_);
  sessions_.insert(session);
  lock.unlock();
  state_.metrics.add_http_connections(1);
  session->start([this, raw = session.get()] {
    state_.metrics.add_http_connections(-1);
    const std::lock_guard closing(mutex_);
    std::erase_if(sessions_, [raw](const auto& each) { return each.get() == raw; });
    session_closed_.notify_all();
  });
}

asio::awaitable<void> HttpServer::Impl::refuse(tcp::socket socket, int retry_after) {
  const HttpAnswer answer =
      error_answer(Status(StatusCode::kUnavailable, "too_many_connections",
                          "the server has as many connections as it takes (--max-connections)"),
                   retry_after);
  HttpFraming framing;
  framing.keep_alive = false;
  framing.request_id = make_request_id();
  const std::string bytes = write_answer(answer, framing);
  error_code ignored;
  socket.non_blocking(true, ignored);
  socket.write_some(asio::buffer(bytes), ignored);  // fits the empty send buffer
  socket.shutdown(tcp::socket::shutdown_send, ignored);
  // Let it be read before the socket closes; one short wait, no matter what the peer sends.
  asio::steady_timer wait(socket.get_executor(), std::chrono::milliseconds(500));
  co_await wait.async_wait(asio::as_tuple(asio::use_awaitable));
}

void HttpServer::Impl::close_idle(bool also_fresh) {
  const std::lock_guard lock(mutex_);
  for (const auto& session : sessions_) session->close_when_idle(also_fresh);
}

void HttpServer::Impl::stop(std::chrono::milliseconds grace) {
  if (stopped_) return;
  stopped_ = true;
  asio::post(io_, [this] {
    error_code ignored;
    acceptor_.close(ignored);
  });
  close_idle(/*also_fresh=*/true);
  {
    std::unique_lock lock(mutex_);
    session_closed_.wait_for(lock, grace, [this] { return sessions_.empty(); });
    for (const auto& session : sessions_) session->cut();
    session_closed_.wait_for(lock, std::chrono::seconds(2), [this] { return sessions_.empty(); });
  }
  io_.stop();
  for (std::thread& thread : threads_) thread.join();
  text_pool_.join();
}

HttpServer::HttpServer(std::unique_ptr<Impl> impl) : impl_(std::move(impl)) {}
HttpServer::~HttpServer() = default;

Result<std::unique_ptr<HttpServer>> HttpServer::start(ServerState& state) {
  auto impl = std::make_unique<Impl>(state);
  KVARN_RETURN_IF_ERROR(impl->listen());
  return std::unique_ptr<HttpServer>(new HttpServer(std::move(impl)));
}

int HttpServer::port() const { return impl_->port(); }
void HttpServer::close_idle() { impl_->close_idle(/*also_fresh=*/false); }
void HttpServer::stop(std::chrono::milliseconds grace) { impl_->stop(grace); }

}  // namespace kvarn
