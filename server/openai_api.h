// The OpenAI surface as data: JSON <-> GenerateRequest and deltas -> JSON, for /v1/chat/completions
// and /v1/completions. Names and types only: ranges and defaults live in validate(). Pure; no
// sockets, no engine.
#pragma once

#include <cstdint>
#include <map>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include <nlohmann/json_fwd.hpp>

#include "kernels/core/status.h"
#include "server/fold.h"
#include "server/generate_output.h"
#include "server/generate_request.h"

namespace kvarn {

enum class OpenAiEndpoint : uint8_t { kChat, kCompletions };
enum class ReasoningField : uint8_t { kBoth, kReasoningContent, kReasoning };
ReasoningField parse_reasoning_field(const std::string& flag);  // a validated --reasoning-field

struct OpenAiRequest {
  GenerateRequest generate;
  OpenAiEndpoint endpoint = OpenAiEndpoint::kChat;
  bool stream = false;
  bool include_usage = false, continuous_usage = false;
};

Result<OpenAiRequest> parse_openai_request(OpenAiEndpoint endpoint, std::string_view body,
                                           int max_json_depth);
// The messages and template fields of a body, as /tokenize and /apply-template share them.
Result<ChatPrompt> parse_chat_prompt(const nlohmann::ordered_json& body);

// A member that is known but not served yet. The tests compare this list with the docs.
struct UnsupportedField {
  const char* name;
  const char* remedy;
  bool chat, completions;  // where it is known
  // Whether this value asks for nothing (null never gets here).
  bool (*harmless)(const nlohmann::ordered_json& value, const nlohmann::ordered_json& body);
};
std::span<const UnsupportedField> unsupported_fields();

// What every chunk and body of one response begins with, and how it is written.
struct ResponseStyle {
  OpenAiEndpoint endpoint = OpenAiEndpoint::kChat;
  std::string id, model, system_fingerprint;
  int64_t created = 0;
  int32_t num_prompts = 1, n = 1;
  bool logprobs = false, token_ids = false;
  bool include_usage = false, continuous_usage = false;
  ReasoningField reasoning_field = ReasoningField::kBoth;
};

// The whole answer, from the fold of its deltas.
std::string openai_body(const ResponseStyle& style, const Fold& fold);

// The streamed answer: JSON payloads of `data:` lines, without the closing [DONE].
class OpenAiStream {
 public:
  explicit OpenAiStream(ResponseStyle style);
  // Appends the chunks for one item. PromptInfo gives none by itself.
  void write(const PromptInfo& info);
  void write(const Delta& delta, std::vector<std::string>& payloads);
  // After the last delta: the usage chunk, if asked for.
  void write_end(std::vector<std::string>& payloads);

 private:
  std::string chunk(int32_t choice, nlohmann::ordered_json choice_json);
  nlohmann::ordered_json head() const;

  const ResponseStyle style_;
  Usage usage_;
  std::vector<bool> started_;                                 // per choice
  std::vector<int64_t> text_offset_;                          // per choice, legacy logprobs
  std::map<int32_t, std::vector<int32_t>> prompt_token_ids_;  // by prompt, until shown
};

}  // namespace kvarn
