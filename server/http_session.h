// One HTTP connection: requests in, answers out, one after the other. Runs on its own strand;
// members are touched there only, except where said. Included by http_*.cpp only: this is Asio's
// home.
#pragma once

#include <chrono>
#include <functional>
#include <memory>
#include <string>
#include <string_view>

#include <boost/asio/awaitable.hpp>
#include <boost/asio/ip/tcp.hpp>
#include <boost/asio/steady_timer.hpp>
#include <boost/asio/thread_pool.hpp>
#include <boost/beast/core/flat_buffer.hpp>
#include <boost/beast/http/empty_body.hpp>
#include <boost/beast/http/parser.hpp>

#include "server/http_answer.h"
#include "server/http_request.h"
#include "server/routes.h"
#include "server/server_state.h"

namespace kvarn {

struct RunningGeneration;

class HttpSession : public std::enable_shared_from_this<HttpSession> {
 public:
  using Clock = std::chrono::steady_clock;

  // `socket` lives on a strand. `text_pool` runs parsing, rendering and tokenising.
  HttpSession(boost::asio::ip::tcp::socket socket, ServerState& state,
              boost::asio::thread_pool& text_pool);
  ~HttpSession();
  // Serves until the connection ends, then calls `on_closed` on the strand.
  void start(std::function<void()> on_closed);
  // Thread-safe. Ends the connection if it waits for a request; else after the present answer.
  // `also_fresh`: connections that have not asked for anything yet, too. A first request may be on
  // its way, and while draining it gets its answer (503) and not a reset.
  void close_when_idle(bool also_fresh);
  // Thread-safe. Ends the connection now.
  void cut();

 private:
  template <typename T>
  using Awaitable = boost::asio::awaitable<T>;
  using HeadParser = boost::beast::http::request_parser<boost::beast::http::empty_body>;
  enum class Read : uint8_t { kData, kEnd, kTimeout };
  enum class Turn : uint8_t { kRequest, kAnswered, kEnd };

  // GCC 12 destroys some temporaries of a co_await expression twice. So the coroutines below take
  // lvalues, and callers name what they pass.
  Awaitable<void> run();

  // Reading (http_read.cpp).
  Awaitable<Read> read_some(Clock::time_point until);
  Awaitable<bool> wait_for_first_byte();  // false: the connection ends
  // A request whose body is read, or one that was answered by its head alone.
  Awaitable<Turn> read_request(HttpRequest& request);
  Awaitable<Read> read_header(HeadParser& parser, boost::system::error_code& error);
  Awaitable<Turn> read_body(HttpRequest& request, HeadParser& parser, bool expects_continue);
  // Answers a request by its head. A short body is read and dropped, a long one ends the
  // connection.
  Awaitable<Turn> answer_early(HttpRequest& request, HttpAnswer& answer, HeadParser& parser,
                               bool expects_continue);
  Awaitable<Turn> fail(HttpRequest& request, const char* reason, const char* message);
  Awaitable<Turn> fail(HttpRequest& request, const Status& status);  // a connection-level error
  Awaitable<void> linger();  // lets the peer read the last answer before the socket is closed

  // Answering (http_session.cpp).
  Awaitable<void> answer(HttpRequest& request);
  // Runs `work` on the text pool and waits for it. If the waiting is given up, the work still runs
  // to its end: what it touches must be owned by it or outlive the pool. Rethrows its exception.
  Awaitable<void> on_text_pool(std::function<void()>& work);
  Awaitable<void> send(const HttpRequest& request, HttpAnswer& answer);
  Awaitable<bool> write_all(std::string_view bytes);  // false: broken_
  void finish(const HttpRequest& request, int status, std::string_view error = {});
  HttpAnswer error(const HttpRequest& request, const Status& status) const;

  // Generating (http_generation.cpp).
  Awaitable<void> generate(HttpRequest& request);
  Awaitable<void> run_generation(HttpRequest& request);
  Awaitable<void> send_folded(const HttpRequest& request, RunningGeneration& running);
  Awaitable<void> send_streamed(const HttpRequest& request, RunningGeneration& running);
  Awaitable<void> watch_for_disconnect();
  Awaitable<void> wait_for_output(Clock::time_point until);

  boost::asio::ip::tcp::socket socket_;
  ServerState& state_;
  boost::asio::thread_pool& text_pool_;
  boost::beast::flat_buffer buffer_;  // bytes read and not used yet: the next requests
  boost::asio::steady_timer timer_;   // of reads
  boost::asio::steady_timer wake_;    // of output and writes
  bool output_ready_ = false;         // a TokenStream has something
  bool idle_ = true;                  // between requests
  bool served_ = false;               // a request came
  bool closing_ = false;              // no further request
  bool lingers_ = false;              // the last answer came before its request was read
  bool broken_ = false;               // the peer is gone or is to be cut: nothing can be written
  bool slow_ = false;                 // it is broken because the peer read too slowly
  bool answered_ = false;             // the present request has its status line
  std::shared_ptr<TokenStream> watched_;  // a write gives up when this stream was aborted
  std::function<void()> on_closed_;
};

}  // namespace kvarn
