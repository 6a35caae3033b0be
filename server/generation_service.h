// GenerationService: from a GenerateRequest to a running generation. Validates, renders the chat
// template, tokenises, checks the length and submits to the engine; the output arrives in a
// TokenStream. The one place that both doors go through, so both give the same answers and errors.
// Thread-safe. validate, render and tokenise run on the caller's thread: keep it off an I/O thread.
#pragma once

#include <chrono>
#include <cstdint>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "engine/engine.h"
#include "engine/tokenizer/tokenizer.h"
#include "kernels/core/status.h"
#include "server/chat_template.h"
#include "server/generate_request.h"
#include "server/model_info.h"
#include "server/server_config.h"
#include "server/token_stream.h"

namespace kvarn {

class Metrics;
class OutputWorkers;

// One accepted request. The door reads `stream` until StreamEnd, or cancels.
struct Generation {
  std::string id;       // of the response: prefix + 16 hex digits, unique in the process
  std::string model;    // the name that the client sent, else the first served one
  int64_t created = 0;  // acceptance, seconds since the epoch
  int32_t num_prompts = 1, n = 1;
  std::shared_ptr<TokenStream> stream;
  std::vector<RequestId> engine_ids;  // one per prompt
};

struct RenderedPrompt {
  std::string text;
  std::vector<int32_t> token_ids;
};

class GenerationService {
 public:
  struct Parts {
    ServerConfig config;
    ModelInfo model;
    std::unique_ptr<Tokenizer> tokenizer;
    std::unique_ptr<ChatTemplate> chat_template;  // null: the model has none, chats are refused
    Engine* engine = nullptr;                     // borrowed; outlives the service
    Metrics* metrics = nullptr;                   // borrowed; outlives the service
  };
  explicit GenerationService(Parts parts);
  ~GenerationService();

  // All checks of the docs in their order, then submission. The deadline is the earlier of the
  // request's and --max-request-seconds. An error is the whole answer: nothing runs.
  Result<Generation> generate(GenerateRequest request);
  // Ends it wherever it is; the stream ends with `why` and what waits in it is dropped.
  void cancel(const Generation& generation, const Status& why);

  // Ends every generation with `why` without waiting for the engine, which may be stuck in a step.
  void fail_all(const Status& why);

  // Checks of the chat part of a request (roles, contents, template arguments), then the template.
  // `add_generation_prompt` of the chat is honoured here, as /apply-template needs it.
  Result<RenderedPrompt> render_chat(const ChatPrompt& chat, const ParamNames& names) const;
  // model_not_found, naming what is served. Empty is the default model.
  Status check_model(const std::string& name, const ParamNames& names) const;

  const ModelInfo& model() const;
  const Tokenizer& tokenizer() const;
  const ServerConfig& config() const;
  Engine& engine() const;
  size_t active() const;            // generations that have not ended
  int retry_after_seconds() const;  // 1..60, from the queue

 private:
  class Impl;
  std::unique_ptr<Impl> impl_;
};

}  // namespace kvarn
