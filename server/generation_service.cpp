#include "server/generation_service.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <limits>
#include <mutex>
#include <random>
#include <utility>

#include <fmt/format.h>
#include <nlohmann/json.hpp>

#include "engine/tokenizer/detokenizer.h"
#include "kernels/core/log.h"
#include "server/metrics.h"
#include "server/output_worker.h"
#include "server/validate.h"

namespace kvarn {
namespace {

using Clock = std::chrono::steady_clock;
using nlohmann::ordered_json;

// Bijective (splitmix64's finaliser), so ids stay unique and say nothing about how many came
// before.
uint64_t mix(uint64_t x) {
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9u;
  x = (x ^ (x >> 27)) * 0x94d049bb133111ebu;
  return x ^ (x >> 31);
}

ordered_json tool_call_variable(const ToolCallInput& call) {
  ordered_json function;
  function["name"] = call.name;
  function["arguments"] =
      call.arguments_object != nullptr ? *call.arguments_object : ordered_json(call.arguments);
  ordered_json out;
  if (!call.id.empty()) out["id"] = call.id;
  out["type"] = "function";
  out["function"] = std::move(function);
  return out;
}

ordered_json message_variable(const ChatMessage& message) {
  ordered_json out;
  out["role"] = message.role == "developer" ? "system" : message.role;
  out["content"] = message.content.value_or("");
  if (message.role == "assistant") {
    if (message.reasoning_content.has_value()) {
      out["reasoning_content"] = *message.reasoning_content;
    }
    if (!message.tool_calls.empty()) {
      ordered_json& calls = out["tool_calls"] = ordered_json::array();
      for (const ToolCallInput& call : message.tool_calls)
        calls.push_back(tool_call_variable(call));
    }
  }
  if (message.role == "tool") out["tool_call_id"] = message.tool_call_id.value_or("");
  return out;
}

ordered_json template_variables(const ChatPrompt& chat) {
  ordered_json variables;
  ordered_json& messages = variables["messages"] = ordered_json::array();
  for (const ChatMessage& message : chat.messages) messages.push_back(message_variable(message));
  if (chat.tools != nullptr) variables["tools"] = *chat.tools;
  variables["add_generation_prompt"] = chat.add_generation_prompt.value_or(true);
  if (chat.template_kwargs != nullptr) {
    for (const auto& [name, value] : chat.template_kwargs->items()) variables[name] = value;
  }
  variables.erase("enable_thinking");  // null in the arguments means absent
  if (const std::optional<bool> thinking = resolve_enable_thinking(chat)) {
    variables["enable_thinking"] = *thinking;
  }
  return variables;
}

std::optional<Clock::time_point> earlier(std::optional<Clock::time_point> a,
                                         std::optional<Clock::time_point> b) {
  if (!a.has_value()) return b;
  if (!b.has_value()) return a;
  return std::min(*a, *b);
}

// A prompt ready for the engine.
struct Tokenised {
  std::vector<int32_t> token_ids;
  std::string text;  // what `echo` shows
  int32_t max_tokens = 0;
};

}  // namespace

class GenerationService::Impl {
 public:
  explicit Impl(Parts parts)
      : config(std::move(parts.config)),
        model(std::move(parts.model)),
        tokenizer(std::move(parts.tokenizer)),
        chat_template(std::move(parts.chat_template)),
        engine(*parts.engine),
        metrics(*parts.metrics),
        format(model.reasoning_parser == "qwen3" ? OutputFormat::qwen3(*tokenizer)
                                                 : OutputFormat::plain()),
        id_salt((uint64_t{std::random_device{}()} << 32) | std::random_device{}()),
        workers(config.output_threads, *tokenizer, format, engine, metrics) {}

  Result<RenderedPrompt> render(const ChatPrompt& chat) const;
  Result<std::vector<Tokenised>> tokenise(const GenerateRequest& request) const;
  EngineRequest engine_request(const GenerateRequest& request, const Tokenised& prompt,
                               RequestId id) const;
  OutputPlan output_plan(const GenerateRequest& request, const EngineRequest& engine_request,
                         const Tokenised& prompt, size_t index) const;
  std::function<void(const Status&)> log_at_end(const Generation& generation,
                                                const GenerateRequest& request,
                                                Clock::time_point accepted_at);

  const ServerConfig config;
  const ModelInfo model;
  const std::unique_ptr<Tokenizer> tokenizer;
  const std::unique_ptr<ChatTemplate> chat_template;
  Engine& engine;
  Metrics& metrics;
  const OutputFormat format;
  const uint64_t id_salt;
  std::atomic<double> usual_seconds{1.0};  // smoothed duration of a request, for Retry-After
  OutputWorkers workers;
};

Result<RenderedPrompt> GenerationService::Impl::render(const ChatPrompt& chat) const {
  if (chat_template == nullptr) {
    return Status(StatusCode::kInvalidArgument, "template_error",
                  "this model has no chat template; use /v1/completions with a raw prompt",
                  "messages");
  }
  RenderedPrompt rendered;
  KVARN_ASSIGN_OR_RETURN(rendered.text, chat_template->render(template_variables(chat)));
  rendered.token_ids = tokenizer->encode(rendered.text);
  return rendered;
}

Result<std::vector<Tokenised>> GenerationService::Impl::tokenise(
    const GenerateRequest& request) const {
  const ParamNames& names = *request.names;
  std::vector<Tokenised> out;
  for (size_t i = 0; i < request.prompts.size(); ++i) {
    const Prompt& prompt = request.prompts[i];
    const bool several = request.prompts.size() > 1;
    std::string path = names.prompt;
    Tokenised tokenised;
    const auto* chat = std::get_if<ChatPrompt>(&prompt);
    if (chat != nullptr) {
      path = names.messages;
      Result<RenderedPrompt> rendered = render(*chat);
      if (!rendered.is_ok()) {
        const Status& status = rendered.status();
        return Status(status.code(), status.reason(), status.message(), path);
      }
      tokenised.token_ids = std::move(rendered->token_ids);
    } else if (const auto* ids = std::get_if<TokenPrompt>(&prompt)) {
      path = names.token_ids;
      tokenised.token_ids.assign(ids->begin(), ids->end());
      if (request.response.echo) {
        tokenised.text = sanitize_utf8(
            tokenizer->decode(tokenised.token_ids, request.response.skip_special_tokens));
      }
    } else {
      tokenised.text = std::get<TextPrompt>(prompt);
      tokenised.token_ids = tokenizer->encode(tokenised.text);
    }
    if (several) path = fmt::format("{}[{}]", path, i);
    KVARN_ASSIGN_OR_RETURN(tokenised.max_tokens,
                           resolve_max_tokens(request, std::ssize(tokenised.token_ids),
                                              chat != nullptr, path, model, config));
    out.push_back(std::move(tokenised));
  }
  return out;
}

EngineRequest GenerationService::Impl::engine_request(const GenerateRequest& request,
                                                      const Tokenised& prompt, RequestId id) const {
  EngineRequest out;
  out.id = id;
  out.label = request.label;
  out.prompt = prompt.token_ids;
  out.n = static_cast<int32_t>(request.sampling.n.value_or(1));
  out.sampling = resolve_sampling(request, model);  // each prompt draws a seed of its own
  out.stop.max_tokens = prompt.max_tokens;
  out.stop.min_tokens = static_cast<int32_t>(request.stopping.min_tokens);
  out.stop.eos_token_ids = model.eos_token_ids;
  out.stop.stop_token_ids.assign(request.stopping.stop_token_ids.begin(),
                                 request.stopping.stop_token_ids.end());
  out.stop.ignore_eos = request.stopping.ignore_eos;
  out.cache_salt = request.cache.salt.value_or("");
  out.deadline = request.deadline;
  return out;
}

OutputPlan GenerationService::Impl::output_plan(const GenerateRequest& request,
                                                const EngineRequest& engine_request,
                                                const Tokenised& prompt, size_t index) const {
  OutputPlan plan;
  plan.engine_id = engine_request.id;
  plan.prompt_index = static_cast<int32_t>(index);
  plan.n = engine_request.n;
  plan.first_choice = plan.prompt_index * plan.n;
  plan.prompt = engine_request.prompt;
  if (request.response.echo) plan.echo = prompt.text;
  plan.parse = std::holds_alternative<ChatPrompt>(request.prompts[index]);
  plan.stop = request.stopping.stop;
  plan.min_tokens = engine_request.stop.min_tokens;
  plan.max_tokens = engine_request.stop.max_tokens;
  plan.include_stop_string = request.stopping.include_stop_str_in_output;
  plan.response = request.response;
  return plan;
}

std::function<void(const Status&)> GenerationService::Impl::log_at_end(
    const Generation& generation, const GenerateRequest& request, Clock::time_point accepted_at) {
  std::string line = fmt::format("request id={} label={}", generation.id, request.label);
  if (!request.trace_id.empty()) line += fmt::format(" trace={}", request.trace_id);
  return [this, line = std::move(line), accepted_at](const Status& status) {
    const double seconds = std::chrono::duration<double>(Clock::now() - accepted_at).count();
    if (status.is_ok()) {
      usual_seconds = 0.9 * usual_seconds + 0.1 * seconds;  // a lost update only slows the average
    }
    log_info(fmt::format("{} seconds={:.3f} outcome={}", line, seconds,
                         status.is_ok() ? "complete" : status.reason()));
  };
}

GenerationService::GenerationService(Parts parts)
    : impl_(std::make_unique<Impl>(std::move(parts))) {}
GenerationService::~GenerationService() = default;

Result<Generation> GenerationService::generate(GenerateRequest request) {
  Impl& impl = *impl_;
  const auto accepted_at = Clock::now();
  KVARN_RETURN_IF_ERROR(validate(request, impl.model, impl.config));
  KVARN_RETURN_IF_ERROR(check_model(request.model, *request.names));
  KVARN_ASSIGN_OR_RETURN(const std::vector<Tokenised> prompts, impl.tokenise(request));
  if (impl.config.max_request_seconds > 0) {
    const auto limit =
        accepted_at + std::chrono::duration_cast<Clock::duration>(
                          std::chrono::duration<double>(impl.config.max_request_seconds));
    request.deadline = earlier(request.deadline, limit);
  }
  if (request.deadline.has_value() && *request.deadline <= Clock::now()) {
    impl.metrics.request_aborted("deadline_exceeded");
    return Status(StatusCode::kDeadlineExceeded, "deadline_exceeded",
                  "the request's deadline passed before it could be queued");
  }

  Generation generation;
  generation.model = request.model.empty() ? impl.model.served_names.front() : request.model;
  generation.created = std::chrono::duration_cast<std::chrono::seconds>(
                           std::chrono::system_clock::now().time_since_epoch())
                           .count();
  generation.num_prompts = static_cast<int32_t>(prompts.size());
  generation.n = static_cast<int32_t>(request.sampling.n.value_or(1));
  // Only a client that reads while the answer is made can be too slow for it.
  const size_t outbox_bytes = request.streamed ? static_cast<size_t>(impl.config.outbox_bytes)
                                               : std::numeric_limits<size_t>::max();
  generation.stream = std::make_shared<TokenStream>(outbox_bytes, &impl.metrics.outbox_bytes());

  std::vector<EngineRequest> engine_requests;
  std::vector<OutputPlan> plans;
  for (size_t i = 0; i < prompts.size(); ++i) {
    const RequestId id = impl.engine.next_request_id();
    generation.engine_ids.push_back(id);
    engine_requests.push_back(impl.engine_request(request, prompts[i], id));
    plans.push_back(impl.output_plan(request, engine_requests.back(), prompts[i], i));
  }
  generation.id = fmt::format("{}{:016x}", request.id_prefix,
                              mix(generation.engine_ids.front() ^ impl.id_salt));
  const std::vector<std::shared_ptr<EventSink>> sinks =
      impl.workers.open(std::move(plans), generation.id, generation.stream, accepted_at,
                        impl.log_at_end(generation, request, accepted_at));
  for (size_t i = 0; i < engine_requests.size(); ++i) {
    engine_requests[i].sink = sinks[i];
    const Status status = impl.engine.submit(std::move(engine_requests[i]));
    if (status.is_ok()) continue;
    // Taken whole or not at all: the worker ends the prompts that were taken and counts the case.
    sinks[i]->on_event(generation.engine_ids[i], ErrorEvent{status});
    if (status.reason() == "context_length_exceeded" && status.param().empty()) {
      return Status(status.code(), status.reason(), status.message(), request.names->prompt);
    }
    return status;
  }
  impl.metrics.request_accepted(generation.n);
  return generation;
}

void GenerationService::cancel(const Generation& generation, const Status& why) {
  generation.stream->abort(why);
  for (const RequestId id : generation.engine_ids) impl_->engine.cancel(id, why);
}

void GenerationService::fail_all(const Status& why) { impl_->workers.fail_all(why); }

Result<RenderedPrompt> GenerationService::render_chat(const ChatPrompt& chat,
                                                      const ParamNames& names) const {
  KVARN_RETURN_IF_ERROR(validate_chat(chat, names));
  return impl_->render(chat);
}

Status GenerationService::check_model(const std::string& name, const ParamNames& names) const {
  return validate_model(name, impl_->model, names);
}

const ModelInfo& GenerationService::model() const { return impl_->model; }
const Tokenizer& GenerationService::tokenizer() const { return *impl_->tokenizer; }
const ServerConfig& GenerationService::config() const { return impl_->config; }
Engine& GenerationService::engine() const { return impl_->engine; }
size_t GenerationService::active() const { return impl_->workers.active(); }

int GenerationService::retry_after_seconds() const {
  const EngineStats stats = impl_->engine.stats();
  // The queue moves by one batch in about the time of one request.
  const double batches = static_cast<double>(stats.waiting + 1) /
                         static_cast<double>(std::max<int64_t>(stats.running, 1));
  return static_cast<int>(std::clamp(std::ceil(batches * impl_->usual_seconds), 1.0, 60.0));
}

}  // namespace kvarn
