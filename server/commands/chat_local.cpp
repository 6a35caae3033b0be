// `kvarn chat` without a server: the same service that both doors of a server share, in this
// process.
#include <condition_variable>
#include <mutex>

#include <fmt/format.h>

#include "engine/tokenizer/tokenizer.h"
#include "server/commands/chat_peer.h"
#include "server/engine_factory.h"
#include "server/generation_service.h"
#include "server/model_files.h"
#include "server/model_info.h"
#include "server/server_state.h"

namespace kvarn::commands {
namespace {

constexpr auto kStopPeriod = std::chrono::milliseconds(100);  // how often `stop` is looked at

class LocalPeer : public ChatPeer {
 public:
  static Result<std::unique_ptr<ChatPeer>> make(const EngineConfig& config) {
    std::unique_ptr<LocalPeer> peer(new LocalPeer(config));
    KVARN_RETURN_IF_ERROR(peer->load(config));
    return std::unique_ptr<ChatPeer>(std::move(peer));
  }

  std::string description() const override {
    return fmt::format("{} on {}, KV {}", service_->model().served_names.front(),
                       service_->model().backend, service_->model().kv_cache_dtype);
  }

  Result<ChatReply> reply(const std::vector<ChatTurn>& turns, const ChatSettings& settings,
                          const std::function<void(std::string_view, bool)>& on_text,
                          const std::atomic<bool>& stop) override {
    KVARN_ASSIGN_OR_RETURN(const Generation generation,
                           service_->generate(make_request(turns, settings)));
    Reader reader(*generation.stream);
    ChatReply reply;
    bool stopped = false;
    while (true) {
      std::optional<StreamItem> item = reader.next(kStopPeriod);
      if (!item) {
        if (stop && !std::exchange(stopped, true)) {
          service_->cancel(generation, {StatusCode::kCancelled, "client_gone", "stopped"});
        }
        continue;
      }
      if (const auto* delta = std::get_if<Delta>(&*item)) {
        const bool is_reasoning = delta->kind == DeltaKind::kReasoning;
        if (!delta->text.empty()) on_text(delta->text, is_reasoning);
        if (!is_reasoning) reply.content += delta->text;
        reply.cut |= delta->finish && delta->finish->kind == FinishKind::kLength;
      }
      if (const auto* end = std::get_if<StreamEnd>(&*item)) {
        if (!end->status.is_ok()) return end->status;
        reply.prompt_tokens = end->usage.prompt_tokens;
        reply.cached_tokens = end->usage.cached_tokens;
        reply.output_tokens = end->usage.completion_tokens;
        return reply;
      }
    }
  }

 private:
  // Waits on a TokenStream. The callback is taken back before the wait's mutex goes.
  class Reader {
   public:
    explicit Reader(TokenStream& stream) : stream_(stream) {
      stream_.set_ready_callback([this] {
        const std::lock_guard lock(mutex_);
        ready_ = true;
        changed_.notify_one();
      });
    }
    ~Reader() { stream_.set_ready_callback({}); }

    std::optional<StreamItem> next(std::chrono::milliseconds timeout) {
      if (std::optional<StreamItem> item = stream_.try_take()) return item;
      std::unique_lock lock(mutex_);
      changed_.wait_for(lock, timeout, [this] { return ready_; });
      ready_ = false;
      lock.unlock();
      return stream_.try_take();
    }

   private:
    TokenStream& stream_;
    std::mutex mutex_;
    std::condition_variable changed_;
    bool ready_ = false;
  };

  explicit LocalPeer(const EngineConfig& config)
      : state_(ServerConfig{}, served_model_names(config)) {}

  Status load(const EngineConfig& config) {
    KVARN_ASSIGN_OR_RETURN(loaded_, load_engine(config, &state_.metrics));
    if (loaded_.tokenizer_path.empty()) {
      return Status::invalid_argument(
          "--model is required: a chat needs a tokenizer (weights may be random with --load-format "
          "dummy)");
    }
    GenerationService::Parts parts;
    parts.config = state_.config;
    KVARN_ASSIGN_OR_RETURN(parts.tokenizer, Tokenizer::load(loaded_.tokenizer_path));
    KVARN_ASSIGN_OR_RETURN(parts.chat_template, load_chat_template(loaded_.model_dir));
    KVARN_ASSIGN_OR_RETURN(parts.model,
                           make_model_info(config, state_.config, loaded_, *parts.tokenizer,
                                           parts.chat_template.get()));
    parts.engine = loaded_.engine.get();
    parts.metrics = &state_.metrics;
    state_.metrics.set_model(parts.model);
    service_ = std::make_unique<GenerationService>(std::move(parts));
    return Status::ok();
  }

  static GenerateRequest make_request(const std::vector<ChatTurn>& turns,
                                      const ChatSettings& settings) {
    ChatPrompt chat;
    for (const ChatTurn& turn : turns) {
      ChatMessage message;
      message.role = turn.role;
      message.content = turn.content;
      chat.messages.push_back(std::move(message));
    }
    chat.enable_thinking = settings.thinking;
    GenerateRequest request;
    request.id_prefix = "chat-";
    request.label = "chat";
    request.model = settings.model;
    request.prompts.emplace_back(std::move(chat));
    request.sampling.temperature = settings.temperature;
    request.stopping.max_tokens = settings.max_tokens;
    return request;
  }

  // The service borrows the engine and both the metrics: they go in reverse order.
  ServerState state_;
  LoadedEngine loaded_;
  std::unique_ptr<GenerationService> service_;
};

}  // namespace

Result<std::unique_ptr<ChatPeer>> make_local_peer(const EngineConfig& config) {
  return LocalPeer::make(config);
}

}  // namespace kvarn::commands
