#include "tests/server/http_client.h"

#include <arpa/inet.h>
#include <netinet/in.h>
#include <poll.h>
#include <sys/socket.h>
#include <unistd.h>

#include <algorithm>

#include <gtest/gtest.h>

namespace kvarn::test {
namespace {

using Clock = std::chrono::steady_clock;

std::string lower(std::string text) {
  std::transform(text.begin(), text.end(), text.begin(),
                 [](unsigned char c) { return static_cast<char>(std::tolower(c)); });
  return text;
}

}  // namespace

std::vector<std::string> HttpResponse::events() const {
  std::vector<std::string> out;
  size_t at = 0;
  while ((at = body.find("data: ", at)) != std::string::npos) {
    const size_t end = body.find("\n\n", at);
    if (end == std::string::npos) break;
    out.push_back(body.substr(at + 6, end - at - 6));
    at = end;
  }
  return out;
}

HttpClient::HttpClient(int port, int receive_buffer) {
  socket_ = ::socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
  EXPECT_GE(socket_, 0);
  if (receive_buffer > 0) {
    ::setsockopt(socket_, SOL_SOCKET, SO_RCVBUF, &receive_buffer, sizeof receive_buffer);
  }
  sockaddr_in address{};
  address.sin_family = AF_INET;
  address.sin_port = htons(static_cast<uint16_t>(port));
  address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
  EXPECT_EQ(::connect(socket_, reinterpret_cast<sockaddr*>(&address), sizeof address), 0);
}

HttpClient::~HttpClient() { close(); }

void HttpClient::close() {
  if (socket_ >= 0) ::close(socket_);
  socket_ = -1;
}

void HttpClient::reset() {
  const linger hard{1, 0};
  ::setsockopt(socket_, SOL_SOCKET, SO_LINGER, &hard, sizeof hard);
  close();
}

void HttpClient::shutdown_write() { ::shutdown(socket_, SHUT_WR); }

void HttpClient::send(std::string_view bytes) {
  while (!bytes.empty()) {
    const ssize_t sent = ::send(socket_, bytes.data(), bytes.size(), MSG_NOSIGNAL);
    if (sent <= 0) return;  // the server closed; the test sees its answer
    bytes.remove_prefix(static_cast<size_t>(sent));
  }
}

bool HttpClient::fill(Clock::time_point until) {
  const auto left = std::chrono::duration_cast<std::chrono::milliseconds>(until - Clock::now());
  if (left.count() <= 0 || socket_ < 0) return false;
  pollfd wait{socket_, POLLIN, 0};
  if (::poll(&wait, 1, static_cast<int>(left.count())) <= 0) return false;
  char bytes[16384];
  const ssize_t got = ::recv(socket_, bytes, sizeof bytes, 0);
  if (got <= 0) return false;
  buffer_.append(bytes, static_cast<size_t>(got));
  return true;
}

bool HttpClient::read_until(std::string_view text, std::chrono::milliseconds limit) {
  const auto until = Clock::now() + limit;
  while (buffer_.find(text) == std::string::npos) {
    if (!fill(until)) return false;
  }
  return true;
}

bool HttpClient::at_end(std::chrono::milliseconds limit) {
  const auto until = Clock::now() + limit;
  while (fill(until)) {
  }
  if (Clock::now() >= until) return false;
  return true;
}

HttpResponse HttpClient::read_response(bool head, std::chrono::milliseconds limit) {
  const auto until = Clock::now() + limit;
  HttpResponse response;
  size_t end = 0;
  while ((end = buffer_.find("\r\n\r\n")) == std::string::npos) {
    if (!fill(until)) return response;
  }
  const std::string head_text = buffer_.substr(0, end + 2);
  buffer_.erase(0, end + 4);
  response.status = std::stoi(head_text.substr(9, 3));
  for (size_t at = head_text.find("\r\n") + 2; at < head_text.size();) {
    const size_t stop = head_text.find("\r\n", at);
    const std::string line = head_text.substr(at, stop - at);
    const size_t colon = line.find(": ");
    response.headers[lower(line.substr(0, colon))] = line.substr(colon + 2);
    at = stop + 2;
  }
  if (head || response.status == 204 || response.status == 100) return response;
  if (response.header("transfer-encoding") == "chunked") {
    for (;;) {
      size_t line = 0;
      while ((line = buffer_.find("\r\n")) == std::string::npos) {
        if (!fill(until)) return response;
      }
      const size_t size = std::stoul(buffer_.substr(0, line), nullptr, 16);
      while (buffer_.size() < line + 2 + size + 2) {
        if (!fill(until)) return response;
      }
      response.body += buffer_.substr(line + 2, size);
      buffer_.erase(0, line + 2 + size + 2);
      if (size == 0) return response;
    }
  }
  if (const std::string length = response.header("content-length"); !length.empty()) {
    while (buffer_.size() < std::stoul(length)) {
      if (!fill(until)) break;
    }
    const size_t size = std::min<size_t>(buffer_.size(), std::stoul(length));
    response.body = buffer_.substr(0, size);
    buffer_.erase(0, size);
    return response;
  }
  while (fill(until)) {
  }
  response.body.swap(buffer_);
  return response;
}

std::string get(const std::string& path, const std::string& headers) {
  return "GET " + path + " HTTP/1.1\r\nHost: test\r\n" + headers + "\r\n";
}

std::string post(const std::string& path, const std::string& body, const std::string& headers) {
  return "POST " + path + " HTTP/1.1\r\nHost: test\r\nContent-Type: application/json\r\n" +
         headers + "Content-Length: " + std::to_string(body.size()) + "\r\n\r\n" + body;
}

HttpResponse fetch(int port, const std::string& request) {
  HttpClient client(port);
  client.send(request);
  return client.read_response(request.starts_with("HEAD"));
}

HttpResponse post_json(int port, const std::string& path, const std::string& body) {
  return fetch(port, post(path, body));
}

}  // namespace kvarn::test
