// A minimal HTTP/1.1 client for the command line: one request a connection, plain http, bodies that
// are chunked, of known length, or up to the end. One thread.
#pragma once

#include <atomic>
#include <functional>
#include <string>
#include <string_view>

#include "kernels/core/status.h"

namespace kvarn::commands {

struct HttpAddress {
  std::string host, port;
};
// "http://host:port[/]" or "host:port"; an error says what else it is (https, a path, no port).
Result<HttpAddress> parse_url(const std::string& url);

// Sends the request and hands out the body as it arrives. Returns the status code. `on_data` says
// whether to read on. While waiting, `stop` is looked at a few times a second; when it is true the
// connection is closed (kCancelled). An empty body sends GET.
Result<int> http_request(const HttpAddress& address, const std::string& path,
                         const std::string& json_body,
                         const std::function<bool(int status, std::string_view)>& on_data,
                         const std::atomic<bool>& stop);

// Takes a chunked body apart, in pieces of any size. Pure.
class ChunkedDecoder {
 public:
  // Appends the decoded bytes to `out`. False: the coding is broken.
  bool push(std::string_view bytes, std::string& out);
  bool done() const { return state_ == State::kDone; }

 private:
  enum class State { kSize, kData, kDataEnd, kTrailer, kDone };
  State state_ = State::kSize;
  std::string line_;
  size_t left_ = 0;
};

// Splits an event stream into the payloads of its `data:` lines. Pure.
class SseDecoder {
 public:
  // Calls on_event for each payload that `bytes` completes.
  void push(std::string_view bytes, const std::function<void(const std::string&)>& on_event);

 private:
  std::string line_, data_;
};

}  // namespace kvarn::commands
