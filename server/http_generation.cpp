// The generating endpoints on a connection: start the generation off the I/O thread, then fold or
// stream its deltas while watching for the client's departure.
#include <exception>
#include <typeinfo>

#include <fmt/format.h>
#include <boost/asio/as_tuple.hpp>
#include <boost/asio/experimental/awaitable_operators.hpp>
#include <boost/asio/post.hpp>
#include <boost/asio/use_awaitable.hpp>

#include "kernels/core/log.h"
#include "server/fold.h"
#include "server/http_session.h"
#include "server/http_status.h"
#include "server/openai_api.h"

namespace kvarn {

namespace asio = boost::asio;
using asio::experimental::awaitable_operators::operator||;
using boost::system::error_code;

// A generation that a connection owns: whatever ends the connection cancels it.
struct RunningGeneration {
  ~RunningGeneration() {
    if (service == nullptr) return;
    generation.stream->set_ready_callback({});
    if (!ended) {
      service->cancel(
          generation,
          slow ? Status(StatusCode::kCancelled, "slow_reader", "the client read too slowly")
               : Status(StatusCode::kCancelled, "client_gone", "the client closed the connection"));
    }
  }

  std::shared_ptr<GenerationService> service;  // null: nothing runs
  Generation generation;
  OpenAiRequest request;
  ResponseStyle style;
  Status refused;  // why nothing runs
  bool ended = false, slow = false;
};

namespace {

constexpr auto kToken = asio::as_tuple(asio::use_awaitable);
constexpr size_t kMaxPipelined = 64 * 1024;  // read ahead of the present answer

ResponseStyle style_of(const OpenAiRequest& request, const Generation& generation,
                       const GenerationService& service) {
  ResponseStyle style;
  style.endpoint = request.endpoint;
  style.id = generation.id;
  style.model = generation.model;
  style.system_fingerprint = service.model().system_fingerprint;
  style.created = generation.created;
  style.num_prompts = generation.num_prompts;
  style.n = generation.n;
  style.logprobs = request.generate.response.logprobs;
  style.token_ids = request.generate.response.token_ids;
  style.include_usage = request.include_usage;
  style.continuous_usage = request.continuous_usage;
  style.reasoning_field = parse_reasoning_field(service.config().reasoning_field);
  return style;
}

// Parse, validate, render, tokenise, submit.
Status begin_generation(ServerState& state, const HttpRequest& http, RunningGeneration& running) {
  KVARN_ASSIGN_OR_RETURN(const std::shared_ptr<GenerationService> service, state.admit());
  const OpenAiEndpoint endpoint = http.endpoint->handler == Handler::kChat
                                      ? OpenAiEndpoint::kChat
                                      : OpenAiEndpoint::kCompletions;
  KVARN_ASSIGN_OR_RETURN(running.request,
                         parse_openai_request(endpoint, http.body, state.config.max_json_depth));
  GenerateRequest& generate = running.request.generate;
  generate.label = http.framing.request_id;
  generate.trace_id = http.trace_id;
  generate.deadline = http.deadline;
  KVARN_ASSIGN_OR_RETURN(running.generation, service->generate(generate));
  running.service = service;
  running.style = style_of(running.request, running.generation, *service);
  return Status::ok();
}

}  // namespace

HttpSession::Awaitable<void> HttpSession::generate(HttpRequest& request) {
  co_await (watch_for_disconnect() || run_generation(request));
  watched_.reset();
  if (!answered_) {
    broken_ = true;
    finish(request, 499);
  }
}

// Ends when the peer closes its side or the connection breaks. Pipelined bytes are kept, up to a
// bound; beyond it they wait in the kernel.
HttpSession::Awaitable<void> HttpSession::watch_for_disconnect() {
  while (buffer_.size() < kMaxPipelined) {
    co_await socket_.async_wait(asio::ip::tcp::socket::wait_read, kToken);
    error_code error;
    const size_t bytes = socket_.read_some(buffer_.prepare(4096), error);
    if (!error) {
      buffer_.commit(bytes);
    } else if (error != asio::error::would_block && error != asio::error::try_again) {
      broken_ = true;
      co_return;
    }
  }
  const auto [error] = co_await socket_.async_wait(asio::ip::tcp::socket::wait_error, kToken);
  if (error != asio::error::operation_aborted) broken_ = true;
}

HttpSession::Awaitable<void> HttpSession::run_generation(HttpRequest& request) {
  // Shared with the job: if this coroutine is given up meanwhile, the job's end cancels what it
  // began.
  const auto running = std::make_shared<RunningGeneration>();
  const auto shared_request = std::make_shared<HttpRequest>(std::move(request));
  request.endpoint = shared_request->endpoint;
  bool failed = false;
  try {
    std::function<void()> work = [&state = state_, running, shared_request] {
      running->refused = begin_generation(state, *shared_request, *running);
    };
    co_await on_text_pool(work);
    shared_request->body.clear();
    shared_request->body.shrink_to_fit();
    if (!running->refused.is_ok()) {
      HttpAnswer refusal = error(*shared_request, running->refused);
      co_await send(*shared_request, refusal);
    } else {
      watched_ = running->generation.stream;
      output_ready_ = false;
      watched_->set_ready_callback([weak = weak_from_this(), executor = socket_.get_executor()] {
        asio::post(executor, [weak] {
          const std::shared_ptr<HttpSession> self = weak.lock();
          if (self == nullptr) return;
          self->output_ready_ = true;
          self->wake_.cancel();
        });
      });
      if (running->request.stream) {
        co_await send_streamed(*shared_request, *running);
      } else {
        co_await send_folded(*shared_request, *running);
      }
      running->slow = slow_;
    }
  } catch (const std::exception& failure) {
    // A cancelled wait after the peer left comes here too.
    failed = !broken_;
    if (failed) {
      log_error(fmt::format("http label={} internal_error={}", shared_request->framing.request_id,
                            typeid(failure).name()));
    }
  }
  if (failed && !answered_) {
    HttpAnswer apology = error(*shared_request, Status::internal("exception"));
    co_await send(*shared_request, apology);
  } else if (failed) {
    broken_ = true;
  }
}

HttpSession::Awaitable<void> HttpSession::wait_for_output(Clock::time_point until) {
  if (!output_ready_) {
    wake_.expires_at(until);
    co_await wake_.async_wait(kToken);
  }
  output_ready_ = false;
}

HttpSession::Awaitable<void> HttpSession::send_folded(const HttpRequest& request,
                                                      RunningGeneration& running) {
  Fold fold(running.generation.num_prompts * running.generation.n);
  for (;;) {
    std::optional<StreamItem> item = running.generation.stream->try_take();
    if (!item.has_value()) {
      co_await wait_for_output(Clock::time_point::max());
      continue;
    }
    if (auto* info = std::get_if<PromptInfo>(&*item)) {
      fold.add(std::move(*info));
    } else if (auto* delta = std::get_if<Delta>(&*item)) {
      fold.add(std::move(*delta));
    } else {
      running.ended = true;
      const Status& status = std::get<StreamEnd>(*item).status;
      HttpAnswer answer = status.is_ok() ? json_answer(openai_body(running.style, fold))
                                         : error_answer(status, state_.retry_after_seconds());
      co_await send(request, answer);
      co_return;
    }
  }
}

HttpSession::Awaitable<void> HttpSession::send_streamed(const HttpRequest& request,
                                                        RunningGeneration& running) {
  OpenAiStream stream(running.style);
  const bool chunked = request.framing.version == 11;
  const auto ping_every = std::chrono::duration_cast<Clock::duration>(
      std::chrono::duration<double>(state_.config.sse_ping_seconds));
  Clock::time_point last_output = Clock::now();
  std::vector<std::string> payloads;
  for (bool done = false; !done;) {
    std::string events;
    payloads.clear();
    bool failed = false;
    while (std::optional<StreamItem> item = running.generation.stream->try_take()) {
      if (const auto* info = std::get_if<PromptInfo>(&*item)) {
        stream.write(*info);
      } else if (const auto* delta = std::get_if<Delta>(&*item)) {
        stream.write(*delta, payloads);
      } else {
        done = running.ended = true;
        const Status& status = std::get<StreamEnd>(*item).status;
        if (status.is_ok()) {
          stream.write_end(payloads);
        } else if (status.reason() == "slow_reader") {
          slow_ = broken_ = true;
          if (!answered_) finish(request, 499);
          answered_ = true;
          co_return;
        } else if (!answered_ && payloads.empty()) {
          HttpAnswer answer = error_answer(status, state_.retry_after_seconds());
          co_await send(request, answer);
          co_return;
        } else {
          failed = closing_ = true;
          payloads.push_back(error_body(status));
        }
      }
    }
    for (const std::string& payload : payloads) events += sse_event(payload);
    if (done && !failed) events += kSseDone;
    if (events.empty()) {
      const bool pings = state_.config.sse_ping_seconds > 0;
      const Clock::time_point next = pings ? last_output + ping_every : Clock::time_point::max();
      if (Clock::now() < next) {
        co_await wait_for_output(next);
        continue;
      }
      events = kSsePing;
      state_.metrics.sse_ping();
    }
    std::string bytes;
    if (!answered_) {
      if (closing_ || state_.health.state() == HealthState::kDraining) closing_ = true;
      HttpFraming framing = request.framing;
      framing.keep_alive = framing.keep_alive && !closing_;
      if (!framing.keep_alive || !chunked) closing_ = true;
      bytes = write_stream_head(framing);
      finish(request, 200);
      answered_ = true;
    }
    bytes += chunked ? http_chunk(events) : events;
    if (done && chunked) bytes += kLastChunk;
    if (!co_await write_all(bytes)) co_return;
    last_output = Clock::now();
  }
}

}  // namespace kvarn
