// `kvarn chat --url`: a server's chat completions as a stream.
#include <fmt/format.h>
#include <nlohmann/json.hpp>

#include "server/commands/chat_peer.h"
#include "server/commands/http_stream.h"

namespace kvarn::commands {
namespace {

using Json = nlohmann::ordered_json;

// The message of an error body, or the body's beginning.
std::string error_text(int status, const std::string& body) {
  const Json json = Json::parse(body, nullptr, /*allow_exceptions=*/false);
  if (json.is_object() && json.contains("error") && json["error"].is_object()) {
    const Json message = json["error"].value("message", Json());
    if (message.is_string()) return message.get<std::string>();
  }
  return fmt::format("HTTP {}: {}", status, std::string_view(body).substr(0, 200));
}

Status server_error(int status, const std::string& body) {
  return {status < 500 ? StatusCode::kInvalidArgument : StatusCode::kUnavailable, "server_error",
          error_text(status, body)};
}

class HttpPeer : public ChatPeer {
 public:
  HttpPeer(HttpAddress address, std::string model)
      : address_(std::move(address)), model_(std::move(model)) {}

  std::string description() const override {
    return fmt::format("{} at http://{}:{}", model_, address_.host, address_.port);
  }

  Result<ChatReply> reply(const std::vector<ChatTurn>& turns, const ChatSettings& settings,
                          const std::function<void(std::string_view, bool)>& on_text,
                          const std::atomic<bool>& stop) override {
    ChatReply reply;
    Status failed;
    bool complete = false;
    std::string error_body;
    SseDecoder events;
    const auto on_event = [&](const std::string& data) {
      if (data == "[DONE]") {
        complete = true;
        return;
      }
      const Json event = Json::parse(data, nullptr, /*allow_exceptions=*/false);
      if (!event.is_object()) {
        failed = Status::unavailable("the server sent an event that is not JSON");
      } else if (event.contains("error")) {
        failed = Status::unavailable(error_text(200, data));
      } else {
        read_chunk(event, reply, on_text);
      }
    };
    const auto on_data = [&](int status, std::string_view bytes) {
      if (status != 200) {
        error_body += bytes;
      } else {
        events.push(bytes, on_event);
      }
      return failed.is_ok();
    };
    KVARN_ASSIGN_OR_RETURN(const int status,
                           http_request(address_, "/v1/chat/completions",
                                        request_body(turns, settings).dump(), on_data, stop));
    if (status != 200) return server_error(status, error_body);
    if (!failed.is_ok()) return failed;
    if (!complete) return Status::unavailable("the answer ended early");
    return reply;
  }

 private:
  Json request_body(const std::vector<ChatTurn>& turns, const ChatSettings& settings) const {
    Json messages = Json::array();
    for (const ChatTurn& turn : turns) {
      messages.push_back({{"role", turn.role}, {"content", turn.content}});
    }
    Json body = {{"model", settings.model.empty() ? model_ : settings.model},
                 {"messages", std::move(messages)},
                 {"stream", true},
                 {"stream_options", {{"include_usage", true}}}};
    if (settings.temperature) body["temperature"] = *settings.temperature;
    if (settings.max_tokens) body["max_completion_tokens"] = *settings.max_tokens;
    if (settings.thinking) body["enable_thinking"] = *settings.thinking;
    return body;
  }

  static void read_chunk(const Json& chunk, ChatReply& reply,
                         const std::function<void(std::string_view, bool)>& on_text) {
    for (const Json& choice : chunk.value("choices", Json::array())) {
      const Json delta = choice.value("delta", Json::object());
      for (const auto& [member, is_reasoning] :
           {std::pair{"reasoning_content", true}, std::pair{"content", false}}) {
        const Json text = delta.value(member, Json());
        if (!text.is_string() || text.get_ref<const std::string&>().empty()) continue;
        on_text(text.get_ref<const std::string&>(), is_reasoning);
        if (!is_reasoning) reply.content += text.get_ref<const std::string&>();
      }
      reply.cut |= choice.value("finish_reason", Json()) == "length";
    }
    const Json usage = chunk.value("usage", Json());
    if (!usage.is_object()) return;
    reply.prompt_tokens = usage.value("prompt_tokens", int64_t{0});
    reply.output_tokens = usage.value("completion_tokens", int64_t{0});
    const Json details = usage.value("prompt_tokens_details", Json::object());
    if (details.is_object()) reply.cached_tokens = details.value("cached_tokens", int64_t{0});
  }

  HttpAddress address_;
  std::string model_;
};

}  // namespace

Result<std::unique_ptr<ChatPeer>> make_http_peer(const std::string& url) {
  KVARN_ASSIGN_OR_RETURN(HttpAddress address, parse_url(url));
  std::string body;
  const std::atomic<bool> never = false;
  KVARN_ASSIGN_OR_RETURN(const int status, http_request(
                                               address, "/v1/models", "",
                                               [&](int, std::string_view bytes) {
                                                 body += bytes;
                                                 return true;
                                               },
                                               never));
  if (status != 200) return server_error(status, body);
  const Json json = Json::parse(body, nullptr, /*allow_exceptions=*/false);
  const Json models = json.is_object() ? json.value("data", Json()) : Json();
  if (!models.is_array() || models.empty() || !models[0].is_object() ||
      !models[0].value("id", Json()).is_string()) {
    return Status::unavailable(fmt::format("{} lists no models; is it a chat server?", url));
  }
  return std::unique_ptr<ChatPeer>(
      std::make_unique<HttpPeer>(std::move(address), models[0]["id"].get<std::string>()));
}

}  // namespace kvarn::commands
