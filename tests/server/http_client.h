// A raw HTTP client on a loopback socket, for tests: sends exactly the given bytes, reads answers
// with a time limit. Failures are test failures.
#pragma once

#include <chrono>
#include <map>
#include <string>
#include <string_view>
#include <vector>

namespace kvarn::test {

struct HttpResponse {
  int status = 0;                              // 0: no answer came
  std::map<std::string, std::string> headers;  // names in lower case
  std::string body;                            // chunks joined
  std::vector<std::string> events() const;     // payloads of `data:` lines, [DONE] included
  std::string header(const std::string& name) const {
    const auto found = headers.find(name);
    return found == headers.end() ? "" : found->second;
  }
};

class HttpClient {
 public:
  explicit HttpClient(int port, int receive_buffer = 0);
  ~HttpClient();
  HttpClient(const HttpClient&) = delete;
  HttpClient& operator=(const HttpClient&) = delete;

  void send(std::string_view bytes);
  void shutdown_write();  // FIN, still reads
  void reset();           // closes with RST
  void close();
  // One whole answer. `head`: it has no body whatever its headers say.
  HttpResponse read_response(bool head = false,
                             std::chrono::milliseconds limit = std::chrono::seconds(20));
  // Waits until the bytes read so far contain `text`; false at end, error or time-out.
  bool read_until(std::string_view text,
                  std::chrono::milliseconds limit = std::chrono::seconds(20));
  bool at_end(std::chrono::milliseconds limit = std::chrono::seconds(10));  // peer closed
  const std::string& buffered() const { return buffer_; }

 private:
  bool fill(std::chrono::steady_clock::time_point until);
  int socket_ = -1;
  std::string buffer_;
};

std::string get(const std::string& path, const std::string& headers = "");
std::string post(const std::string& path, const std::string& body, const std::string& headers = "");
// One request on a connection of its own.
HttpResponse fetch(int port, const std::string& request);
HttpResponse post_json(int port, const std::string& path, const std::string& body);

}  // namespace kvarn::test
