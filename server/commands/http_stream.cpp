#include "server/commands/http_stream.h"

#include <netdb.h>
#include <poll.h>
#include <sys/socket.h>
#include <unistd.h>

#include <algorithm>
#include <cctype>
#include <cerrno>
#include <charconv>
#include <cstring>
#include <memory>
#include <optional>

#include <fmt/format.h>

namespace kvarn::commands {
namespace {

constexpr int kPollMs = 100;            // how often `stop` is looked at
constexpr size_t kMaxHead = 64 * 1024;  // of the answer's status line and headers
constexpr size_t kMaxChunkLine = 1024;  // size line of a chunk

class Socket {
 public:
  explicit Socket(int fd) : fd_(fd) {}
  ~Socket() {
    if (fd_ >= 0) close(fd_);
  }
  Socket(Socket&& other) noexcept : fd_(std::exchange(other.fd_, -1)) {}
  Socket& operator=(Socket&&) = delete;
  int fd() const { return fd_; }

 private:
  int fd_;
};

Result<Socket> connect_to(const HttpAddress& address) {
  addrinfo hints{};
  hints.ai_socktype = SOCK_STREAM;
  addrinfo* found = nullptr;
  if (const int error = getaddrinfo(address.host.c_str(), address.port.c_str(), &hints, &found);
      error != 0) {
    return Status::invalid_argument(
        fmt::format("--url: {}:{}: {}", address.host, address.port, gai_strerror(error)));
  }
  const std::unique_ptr<addrinfo, void (*)(addrinfo*)> owner(found, freeaddrinfo);
  int last_error = 0;
  for (const addrinfo* a = found; a != nullptr; a = a->ai_next) {
    Socket socket(::socket(a->ai_family, a->ai_socktype, a->ai_protocol));
    if (socket.fd() >= 0 && ::connect(socket.fd(), a->ai_addr, a->ai_addrlen) == 0) return socket;
    last_error = errno;
  }
  return Status::unavailable(
      fmt::format("cannot reach http://{}:{} ({}); is `kvarn serve` running?", address.host,
                  address.port, std::strerror(last_error)));
}

Status send_all(const Socket& socket, std::string_view bytes) {
  while (!bytes.empty()) {
    const ssize_t sent = ::send(socket.fd(), bytes.data(), bytes.size(), MSG_NOSIGNAL);
    if (sent < 0 && errno == EINTR) continue;
    if (sent <= 0) return Status::unavailable("the server closed the connection");
    bytes.remove_prefix(static_cast<size_t>(sent));
  }
  return Status::ok();
}

// Some bytes; empty at the end of the connection.
Result<std::string> receive(const Socket& socket, const std::atomic<bool>& stop) {
  while (true) {
    if (stop) return Status(StatusCode::kCancelled, "client_gone", "stopped");
    pollfd poll{.fd = socket.fd(), .events = POLLIN, .revents = 0};
    if (::poll(&poll, 1, kPollMs) <= 0) continue;
    char buffer[16 * 1024];
    const ssize_t got = ::recv(socket.fd(), buffer, sizeof(buffer), 0);
    if (got < 0 && errno == EINTR) continue;
    if (got < 0) return Status::unavailable("the connection to the server broke");
    return std::string(buffer, static_cast<size_t>(got));
  }
}

struct Head {
  int status = 0;
  bool chunked = false;
  std::optional<size_t> length;
};

Result<Head> parse_head(std::string_view text) {
  const auto bad = [] { return Status::unavailable("the answer is not HTTP; check --url"); };
  Head head;
  constexpr std::string_view kVersion = "HTTP/1.";
  if (!text.starts_with(kVersion) || text.size() < 12) return bad();
  if (std::from_chars(text.data() + 9, text.data() + 12, head.status).ec != std::errc()) {
    return bad();
  }
  while (!text.empty()) {
    const size_t end = std::min(text.find("\r\n"), text.size());
    std::string line(text.substr(0, end));
    text.remove_prefix(std::min(end + 2, text.size()));
    std::transform(line.begin(), line.end(), line.begin(),
                   [](unsigned char c) { return static_cast<char>(std::tolower(c)); });
    if (line.starts_with("transfer-encoding:")) {
      head.chunked = line.find("chunked") != std::string::npos;
    }
    constexpr std::string_view kLength = "content-length:";
    if (line.starts_with(kLength)) {
      size_t length = 0;
      const size_t at = line.find_first_not_of(' ', kLength.size());
      if (at == std::string::npos ||
          std::from_chars(line.data() + at, line.data() + line.size(), length).ec != std::errc()) {
        return bad();
      }
      head.length = length;
    }
  }
  return head;
}

}  // namespace

Result<HttpAddress> parse_url(const std::string& url) {
  std::string rest = url;
  if (rest.starts_with("https://")) {
    return Status::invalid_argument(
        "--url: https is not in this version; use http, or a proxy that adds TLS");
  }
  constexpr std::string_view kScheme = "http://";
  if (rest.starts_with(kScheme)) rest.erase(0, kScheme.size());
  while (rest.ends_with('/')) rest.pop_back();
  if (rest.ends_with("/v1")) rest.resize(rest.size() - 3);
  const size_t bracket = rest.find(']');
  const size_t colon = rest.find(':', bracket == std::string::npos ? 0 : bracket);
  HttpAddress address;
  address.host = rest.substr(0, colon);
  address.port = colon == std::string::npos ? "80" : rest.substr(colon + 1);
  if (address.host.size() > 2 && address.host.front() == '[' && address.host.back() == ']') {
    address.host = address.host.substr(1, address.host.size() - 2);
  }
  const bool digits =
      !address.port.empty() && address.port.find_first_not_of("0123456789") == std::string::npos;
  if (address.host.empty() || address.host.find_first_of("/@ ") != std::string::npos || !digits) {
    return Status::invalid_argument(fmt::format("--url must be http://HOST:PORT, got '{}'",
                                                std::string_view(url).substr(0, 64)));
  }
  return address;
}

Result<int> http_request(const HttpAddress& address, const std::string& path,
                         const std::string& json_body,
                         const std::function<bool(int, std::string_view)>& on_data,
                         const std::atomic<bool>& stop) {
  KVARN_ASSIGN_OR_RETURN(const Socket socket, connect_to(address));
  const bool post = !json_body.empty();
  std::string request =
      fmt::format("{} {} HTTP/1.1\r\nHost: {}:{}\r\nConnection: close\r\nUser-Agent: kvarn\r\n",
                  post ? "POST" : "GET", path, address.host, address.port);
  if (post) {
    request +=
        fmt::format("Content-Type: application/json\r\nContent-Length: {}\r\n", json_body.size());
  }
  request += "\r\n";
  request += json_body;
  KVARN_RETURN_IF_ERROR(send_all(socket, request));

  std::string buffer;
  size_t head_end = std::string::npos;
  while ((head_end = buffer.find("\r\n\r\n")) == std::string::npos) {
    KVARN_ASSIGN_OR_RETURN(const std::string bytes, receive(socket, stop));
    if (bytes.empty() || buffer.size() > kMaxHead) {
      return Status::unavailable("the server closed the connection before it answered");
    }
    buffer += bytes;
  }
  KVARN_ASSIGN_OR_RETURN(const Head head, parse_head(std::string_view(buffer).substr(0, head_end)));
  std::string raw = buffer.substr(head_end + 4);
  ChunkedDecoder chunked;
  size_t received = 0;
  while (true) {
    std::string data;
    if (!head.chunked) {
      data.swap(raw);
    } else if (!chunked.push(raw, data)) {
      return Status::unavailable("the server's answer is broken (chunked coding)");
    }
    received += data.size();
    if (!data.empty() && !on_data(head.status, data)) return head.status;
    if (chunked.done() || (!head.chunked && head.length && received >= *head.length)) {
      return head.status;
    }
    KVARN_ASSIGN_OR_RETURN(raw, receive(socket, stop));
    if (!raw.empty()) continue;
    if (head.chunked || (head.length && received < *head.length)) {
      return Status::unavailable("the server closed the connection in the middle of its answer");
    }
    return head.status;
  }
}

bool ChunkedDecoder::push(std::string_view bytes, std::string& out) {
  while (!bytes.empty() && state_ != State::kDone) {
    if (state_ == State::kData) {
      const size_t count = std::min(left_, bytes.size());
      out += bytes.substr(0, count);
      bytes.remove_prefix(count);
      left_ -= count;
      if (left_ == 0) state_ = State::kDataEnd;
      continue;
    }
    const char c = bytes.front();
    bytes.remove_prefix(1);
    if (c != '\n') {
      line_ += c;
      if (line_.size() > kMaxChunkLine) return false;
      continue;
    }
    if (!line_.empty() && line_.back() == '\r') line_.pop_back();
    const std::string line = std::exchange(line_, {});
    if (state_ == State::kDataEnd) {
      if (!line.empty()) return false;
      state_ = State::kSize;
    } else if (state_ == State::kTrailer) {
      if (line.empty()) state_ = State::kDone;
    } else {
      const auto [end, error] = std::from_chars(line.data(), line.data() + line.size(), left_, 16);
      if (error != std::errc() ||
          (end != line.data() + line.size() && *end != ';' && *end != ' ')) {
        return false;
      }
      state_ = left_ == 0 ? State::kTrailer : State::kData;
    }
  }
  return true;
}

void SseDecoder::push(std::string_view bytes,
                      const std::function<void(const std::string&)>& on_event) {
  constexpr std::string_view kData = "data:";
  for (const char c : bytes) {
    if (c != '\n') {
      line_ += c;
      continue;
    }
    if (!line_.empty() && line_.back() == '\r') line_.pop_back();
    const std::string line = std::exchange(line_, {});
    if (line.empty()) {
      if (!data_.empty()) on_event(std::exchange(data_, {}));
    } else if (line.starts_with(kData)) {
      const size_t at =
          line.size() > kData.size() && line[kData.size()] == ' ' ? kData.size() + 1 : kData.size();
      if (!data_.empty()) data_ += '\n';
      data_ += line.substr(at);
    }
  }
}

}  // namespace kvarn::commands
