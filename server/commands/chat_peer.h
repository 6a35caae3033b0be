// Who answers in `kvarn chat`: a model in this process, or a server at a URL. One conversation at a
// time; not thread-safe.
#pragma once

#include <atomic>
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "engine/config.h"
#include "kernels/core/status.h"

namespace kvarn::commands {

struct ChatTurn {
  std::string role, content;
};

struct ChatSettings {
  std::string model;  // served name; empty: the first
  std::optional<double> temperature;
  std::optional<int64_t> max_tokens;
  std::optional<bool> thinking;
};

struct ChatReply {
  std::string content;  // of the answer, without reasoning
  int64_t prompt_tokens = 0, cached_tokens = 0, output_tokens = 0;
  bool cut = false;  // by the token limit
};

class ChatPeer {
 public:
  virtual ~ChatPeer() = default;
  // Blocks until the reply is whole, calling on_text(text, is_reasoning) as it comes. When `stop`
  // turns true the reply is ended (kCancelled).
  virtual Result<ChatReply> reply(const std::vector<ChatTurn>& turns, const ChatSettings& settings,
                                  const std::function<void(std::string_view, bool)>& on_text,
                                  const std::atomic<bool>& stop) = 0;
  virtual std::string description() const = 0;  // one line for the greeting
};

Result<std::unique_ptr<ChatPeer>> make_local_peer(const EngineConfig& config);
// "http://host:port"; asks it for its models, so that a wrong address is known at once.
Result<std::unique_ptr<ChatPeer>> make_http_peer(const std::string& url);

}  // namespace kvarn::commands
