// kvarn.v1.Inference. A generating call is a reactor that owns itself until OnDone. Output workers
// wake it through the stream's ready callback, which holds it weakly, so a late wake finds nothing.
// The end of a call always comes out of its TokenStream as StreamEnd: cancels, deadlines and errors
// end the stream, and the stream ends the call.
#include <algorithm>
#include <mutex>
#include <string>
#include <utility>

#include <fmt/format.h>

#include "engine/tokenizer/detokenizer.h"
#include "server/fold.h"
#include "server/generation_service.h"
#include "server/grpc_convert.h"
#include "server/grpc_service.h"

namespace kvarn {
namespace {

using Clock = std::chrono::steady_clock;

// Parses and submits: what both generating calls do before their first byte.
Result<Generation> start_generation(ServerState& state, const GrpcCall& call,
                                    const v1::GenerateRequest& proto, bool streamed,
                                    std::shared_ptr<GenerationService>& service) {
  KVARN_ASSIGN_OR_RETURN(service, state.admit());
  KVARN_ASSIGN_OR_RETURN(GenerateRequest request,
                         grpc_convert::to_request(proto, state.config.max_json_depth));
  request.streamed = streamed;
  request.label = call.label();
  request.trace_id = call.trace_id();
  request.deadline = call.deadline();
  return service->generate(std::move(request));
}

// All choices at once: folds the stream and answers at its end.
class GenerateReactor : public grpc::ServerUnaryReactor,
                        public std::enable_shared_from_this<GenerateReactor> {
 public:
  static grpc::ServerUnaryReactor* start(ServerState& state, CallRegistry& registry,
                                         grpc::CallbackServerContext* context,
                                         const v1::GenerateRequest* request,
                                         v1::GenerateResponse* response) {
    auto reactor = std::make_shared<GenerateReactor>(state, registry, context, request, response);
    reactor->self_ = reactor;
    reactor->begin(state, *request);
    return reactor.get();
  }

  GenerateReactor(ServerState& state, CallRegistry& registry, grpc::CallbackServerContext* context,
                  const v1::GenerateRequest* request, v1::GenerateResponse* response)
      : call_(state, registry, *context, "Inference/Generate", request->request_id()),
        response_(response) {}

  void OnCancel() override {
    if (service_ != nullptr && generation_.stream != nullptr) {
      service_->cancel(generation_, call_.cancel_reason());
    }
  }
  void OnDone() override { self_.reset(); }

 private:
  void begin(ServerState& state, const v1::GenerateRequest& request) {
    Result<Generation> generation =
        start_generation(state, call_, request, /*streamed=*/false, service_);
    if (!generation.is_ok()) {
      Finish(call_.finish(generation.status()));
      return;
    }
    generation_ = std::move(generation).value();
    fold_.emplace(generation_.num_prompts * generation_.n);
    const std::shared_ptr<TokenStream> stream = generation_.stream;  // outlives the callback below
    stream->set_ready_callback([weak = weak_from_this()] {
      if (const auto self = weak.lock()) self->pump();
    });
  }

  // One thread at a time: the stream runs its callback so.
  void pump() {
    while (std::optional<StreamItem> item = generation_.stream->try_take()) {
      if (auto* info = std::get_if<PromptInfo>(&*item)) fold_->add(std::move(*info));
      if (auto* delta = std::get_if<Delta>(&*item)) fold_->add(std::move(*delta));
      if (const auto* end = std::get_if<StreamEnd>(&*item)) {
        if (end->status.is_ok()) fill_response(end->usage);
        Finish(call_.finish(end->status));
        return;
      }
    }
  }

  void fill_response(const Usage& usage) {
    response_->set_id(generation_.id);
    if (!fold_->prompts().empty()) {
      *response_->mutable_prompt_info() = grpc_convert::to_proto(fold_->prompts().front());
    }
    int32_t index = 0;
    for (const FoldedChoice& choice : fold_->choices()) {
      *response_->add_outputs() = grpc_convert::to_proto(index++, choice);
    }
    *response_->mutable_usage() = grpc_convert::to_proto(usage);
  }

  GrpcCall call_;
  v1::GenerateResponse* response_;
  std::shared_ptr<GenerationService> service_;
  Generation generation_;
  std::optional<Fold> fold_;
  std::shared_ptr<GenerateReactor> self_;  // until OnDone
};

// Deltas as messages, one write in flight. While it waits for the client the stream merges what
// comes, up to its bound; a client that takes nothing for --write-seconds is dropped.
class GenerateStreamReactor : public grpc::ServerWriteReactor<v1::GenerateResponse>,
                              public WatchedCall,
                              public std::enable_shared_from_this<GenerateStreamReactor> {
 public:
  static grpc::ServerWriteReactor<v1::GenerateResponse>* start(ServerState& state,
                                                               CallRegistry& registry,
                                                               grpc::CallbackServerContext* context,
                                                               const v1::GenerateRequest* request) {
    auto reactor = std::make_shared<GenerateStreamReactor>(state, registry, context, request);
    reactor->self_ = reactor;
    registry.watch(reactor);
    reactor->begin(state, *request);
    return reactor.get();
  }

  GenerateStreamReactor(ServerState& state, CallRegistry& registry,
                        grpc::CallbackServerContext* context, const v1::GenerateRequest* request)
      : call_(state, registry, *context, "Inference/GenerateStream", request->request_id()),
        context_(context),
        registry_(registry),
        write_limit_(state.config.write_seconds) {}

  void OnCancel() override { cancel(call_.cancel_reason()); }

  void OnWriteDone(bool ok) override {
    {
      const std::lock_guard lock(mutex_);
      writing_ = false;
      broken_ |= !ok;
    }
    pump();
  }

  void OnDone() override {
    registry_.unwatch(this);
    self_.reset();
  }

  void check_progress(Clock::time_point now) override {
    {
      const std::lock_guard lock(mutex_);
      if (finished_ || !writing_ || now - write_started_ <= write_limit_) return;
    }
    cancel({StatusCode::kCancelled, "slow_reader", "the client does not take what it asked for"});
    context_->TryCancel();  // the pending write ends; OnWriteDone goes on from there
  }

 private:
  void begin(ServerState& state, const v1::GenerateRequest& request) {
    Result<Generation> generation =
        start_generation(state, call_, request, /*streamed=*/true, service_);
    if (!generation.is_ok()) {
      finish(generation.status());
      return;
    }
    std::shared_ptr<TokenStream> stream;  // outlives the callback below
    {
      const std::lock_guard lock(mutex_);
      generation_ = std::move(generation).value();
      stream = generation_.stream;
      tokens_.assign(static_cast<size_t>(generation_.num_prompts * generation_.n), 0);
    }
    stream->set_ready_callback([weak = weak_from_this()] {
      if (const auto self = weak.lock()) self->pump();
    });
  }

  void cancel(const Status& why) {
    if (service_ != nullptr && generation_.stream != nullptr) service_->cancel(generation_, why);
  }

  // Starts the next write if none is in flight. Called by the stream and by OnWriteDone, which may
  // meet: the mutex decides who takes the next item, and is not held while gRPC runs.
  void pump() {
    enum class Next { kNothing, kWrite, kLastWrite, kFinish } next = Next::kNothing;
    Status end_status;
    {
      const std::lock_guard lock(mutex_);
      while (!writing_ && !finished_ && next == Next::kNothing) {
        std::optional<StreamItem> item = generation_.stream->try_take();
        if (!item) return;
        if (auto* end = std::get_if<StreamEnd>(&*item)) {
          finished_ = true;
          end_status = end->status;
          next = Next::kFinish;
          if (end_status.is_ok() && !broken_) {
            message_.Clear();
            *message_.mutable_usage() = grpc_convert::to_proto(end->usage);
            next = Next::kLastWrite;
          }
        } else if (!broken_) {  // a broken call only waits for its end
          fill_message(*item);
          writing_ = true;
          write_started_ = Clock::now();
          next = Next::kWrite;
        }
      }
    }
    if (next == Next::kNothing) return;
    message_.set_id(generation_.id);
    if (next == Next::kWrite) StartWrite(&message_);
    if (next == Next::kLastWrite) {
      StartWriteAndFinish(&message_, grpc::WriteOptions(), call_.finish(end_status));
    }
    if (next == Next::kFinish) Finish(call_.finish(end_status));
  }

  void fill_message(const StreamItem& item) {
    message_.Clear();
    if (const auto* info = std::get_if<PromptInfo>(&item)) {
      *message_.mutable_prompt_info() = grpc_convert::to_proto(*info);
    }
    if (const auto* delta = std::get_if<Delta>(&item)) {
      int64_t& tokens = tokens_[static_cast<size_t>(delta->choice)];
      tokens += delta->num_tokens;
      *message_.add_outputs() = grpc_convert::to_proto(*delta, tokens);
    }
  }

  void finish(const Status& status) {
    {
      const std::lock_guard lock(mutex_);
      finished_ = true;
    }
    Finish(call_.finish(status));
  }

  GrpcCall call_;
  grpc::CallbackServerContext* context_;
  CallRegistry& registry_;
  const std::chrono::duration<double> write_limit_;
  std::shared_ptr<GenerationService> service_;
  Generation generation_;

  std::mutex mutex_;  // guards what follows
  bool writing_ = false, broken_ = false, finished_ = false;
  Clock::time_point write_started_;
  std::vector<int64_t> tokens_;   // generated so far, by choice
  v1::GenerateResponse message_;  // of the write in flight

  std::shared_ptr<GenerateStreamReactor> self_;  // until OnDone
};

class InferenceService : public v1::Inference::CallbackService {
 public:
  InferenceService(ServerState& state, CallRegistry& registry)
      : state_(state), registry_(registry) {}

  grpc::ServerUnaryReactor* Generate(grpc::CallbackServerContext* context,
                                     const v1::GenerateRequest* request,
                                     v1::GenerateResponse* response) override {
    return GenerateReactor::start(state_, registry_, context, request, response);
  }

  grpc::ServerWriteReactor<v1::GenerateResponse>* GenerateStream(
      grpc::CallbackServerContext* context, const v1::GenerateRequest* request) override {
    return GenerateStreamReactor::start(state_, registry_, context, request);
  }

  grpc::ServerUnaryReactor* Tokenize(grpc::CallbackServerContext* context,
                                     const v1::TokenizeRequest* request,
                                     v1::TokenizeResponse* response) override {
    return answer(
        context, "Inference/Tokenize", request->model(), [&](GenerationService& service) -> Status {
          response->set_max_model_len(static_cast<uint32_t>(service.model().max_model_len));
          if (request->input_case() == v1::TokenizeRequest::kText) {
            set_ids(service.tokenizer().encode(request->text()), response->mutable_token_ids());
            return Status::ok();
          }
          if (request->input_case() != v1::TokenizeRequest::kChat) {
            return missing("input", "one of text and chat");
          }
          KVARN_ASSIGN_OR_RETURN(const RenderedPrompt prompt, render(service, request->chat()));
          set_ids(prompt.token_ids, response->mutable_token_ids());
          return Status::ok();
        });
  }

  grpc::ServerUnaryReactor* Detokenize(grpc::CallbackServerContext* context,
                                       const v1::DetokenizeRequest* request,
                                       v1::DetokenizeResponse* response) override {
    return answer(
        context, "Inference/Detokenize", request->model(),
        [&](GenerationService& service) -> Status {
          const auto vocab_size = static_cast<uint32_t>(service.model().vocab_size);
          std::vector<int32_t> ids;
          ids.reserve(static_cast<size_t>(request->token_ids_size()));
          for (int i = 0; i < request->token_ids_size(); ++i) {
            const uint32_t id = request->token_ids(i);
            if (id >= vocab_size) {
              const std::string path = fmt::format("token_ids[{}]", i);
              return {StatusCode::kInvalidArgument, "invalid_value",
                      fmt::format("'{}' must be 0..{}, got {}", path, vocab_size - 1, id), path};
            }
            ids.push_back(static_cast<int32_t>(id));
          }
          response->set_text(
              sanitize_utf8(service.tokenizer().decode(ids, request->skip_special_tokens())));
          return Status::ok();
        });
  }

  grpc::ServerUnaryReactor* RenderChat(grpc::CallbackServerContext* context,
                                       const v1::RenderChatRequest* request,
                                       v1::RenderChatResponse* response) override {
    return answer(context, "Inference/RenderChat", request->model(),
                  [&](GenerationService& service) -> Status {
                    if (!request->has_chat()) return missing("chat", "the messages to render");
                    KVARN_ASSIGN_OR_RETURN(RenderedPrompt prompt, render(service, request->chat()));
                    set_ids(prompt.token_ids, response->mutable_token_ids());
                    response->set_text(std::move(prompt.text));
                    return Status::ok();
                  });
  }

 private:
  static void set_ids(const std::vector<int32_t>& ids,
                      google::protobuf::RepeatedField<uint32_t>* out) {
    out->Add(ids.begin(), ids.end());
  }
  static Status missing(const char* field, const char* what) {
    return {StatusCode::kInvalidArgument, "missing_required_parameter",
            fmt::format("'{}' is required: {}", field, what), field};
  }
  Result<RenderedPrompt> render(GenerationService& service, const v1::ChatPrompt& proto) const {
    KVARN_ASSIGN_OR_RETURN(const ChatPrompt chat,
                           grpc_convert::to_chat(proto, state_.config.max_json_depth));
    return service.render_chat(chat, kGrpcParams);
  }

  // The calls that answer at once, without the engine.
  template <typename Fn>
  grpc::ServerUnaryReactor* answer(grpc::CallbackServerContext* context, const char* rpc,
                                   const std::string& model, Fn&& fill) {
    GrpcCall call(state_, registry_, *context, rpc);
    Status status;
    if (Result<std::shared_ptr<GenerationService>> service = state_.admit(); !service.is_ok()) {
      status = service.status();
    } else {
      status = (*service)->check_model(model, kGrpcParams);
      if (status.is_ok()) status = fill(**service);
    }
    grpc::ServerUnaryReactor* reactor = context->DefaultReactor();
    reactor->Finish(call.finish(status));
    return reactor;
  }

  ServerState& state_;
  CallRegistry& registry_;
};

}  // namespace

std::unique_ptr<v1::Inference::CallbackService> make_inference_service(ServerState& state,
                                                                       CallRegistry& registry) {
  return std::make_unique<InferenceService>(state, registry);
}

}  // namespace kvarn
