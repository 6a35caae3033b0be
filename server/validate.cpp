#include "server/validate.h"

#include <algorithm>
#include <array>
#include <limits>
#include <random>
#include <set>
#include <string_view>

#include <fmt/format.h>
#include <nlohmann/json.hpp>

#include "server/param_error.h"

namespace kvarn {
namespace {

constexpr int64_t kMaxChoices = 128;
constexpr size_t kMaxLogitBias = 1024;
constexpr size_t kMaxStopStrings = 16, kMaxStopBytes = 256;
constexpr size_t kMaxStopIds = 128;
constexpr int64_t kMaxTopLogprobs = 20;
constexpr size_t kMaxSaltBytes = 128;
constexpr std::string_view kLater = "it belongs to a later stage; leave it out";

Status check_number(const char* path, const std::optional<double>& value, double low, double high,
                    std::string_view range) {
  // Written so that NaN fails.
  if (!value.has_value() || (*value >= low && *value <= high)) return Status::ok();
  return range_error(path, range, shown_value(*value));
}

Status check_integer(const char* path, int64_t value, int64_t low, int64_t high) {
  if (value >= low && value <= high) return Status::ok();
  return range_error(path, fmt::format("{}..{}", low, high), shown_value(value));
}

Status check_token_id(const std::string& path, int64_t id, const ModelInfo& model) {
  if (id >= 0 && id < model.vocab_size) return Status::ok();
  return range_error(path, fmt::format("a token id in 0..{}", model.vocab_size - 1),
                     shown_value(id));
}

Status check_prompts(const GenerateRequest& request, const ModelInfo& model) {
  const ParamNames& names = *request.names;
  const bool several = request.prompts.size() > 1;
  if (request.prompts.empty()) return missing_error(names.prompt);
  for (size_t i = 0; i < request.prompts.size(); ++i) {
    const auto path = [&](const char* name) {
      return several ? fmt::format("{}[{}]", name, i) : std::string(name);
    };
    const Prompt& prompt = request.prompts[i];
    if (const auto* chat = std::get_if<ChatPrompt>(&prompt)) {
      KVARN_RETURN_IF_ERROR(validate_chat(*chat, names));
    } else if (const auto* ids = std::get_if<TokenPrompt>(&prompt)) {
      if (ids->empty()) {
        return range_error(path(names.token_ids), fmt::format("1..{} tokens", model.max_model_len),
                           "0");
      }
      for (size_t j = 0; j < ids->size(); ++j) {
        if ((*ids)[j] < 0 || (*ids)[j] >= model.vocab_size) {
          return check_token_id(fmt::format("{}[{}]", path(names.token_ids), j), (*ids)[j], model);
        }
      }
    } else if (std::get<TextPrompt>(prompt).empty()) {
      return range_error(path(names.prompt), fmt::format("1..{} tokens", model.max_model_len), "0");
    }
  }
  return Status::ok();
}

Status check_sampling(const GenerateRequest& request, const ModelInfo& model,
                      const ServerConfig& config) {
  const ParamNames& names = *request.names;
  const SamplingOptions& sampling = request.sampling;
  KVARN_RETURN_IF_ERROR(check_number(names.temperature, sampling.temperature, 0, 2, "0..2"));
  KVARN_RETURN_IF_ERROR(check_number(names.top_p, sampling.top_p, 0, 1, "0..1"));
  if (sampling.top_k.value_or(0) < -1) {
    return range_error(names.top_k, "-1 or 0 (off) or at least 1", shown_value(*sampling.top_k));
  }
  KVARN_RETURN_IF_ERROR(check_number(names.min_p, sampling.min_p, 0, 1, "0..1"));
  KVARN_RETURN_IF_ERROR(check_number(names.repetition_penalty, sampling.repetition_penalty,
                                     std::numeric_limits<double>::min(), 10,
                                     "greater than 0 and at most 10"));
  KVARN_RETURN_IF_ERROR(
      check_number(names.presence_penalty, sampling.presence_penalty, -2, 2, "-2..2"));
  KVARN_RETURN_IF_ERROR(
      check_number(names.frequency_penalty, sampling.frequency_penalty, -2, 2, "-2..2"));
  if (sampling.logit_bias.size() > kMaxLogitBias) {
    return range_error(names.logit_bias, fmt::format("at most {} entries", kMaxLogitBias),
                       shown_value(static_cast<int64_t>(sampling.logit_bias.size())));
  }
  for (const auto& [id, bias] : sampling.logit_bias) {
    const std::string path = fmt::format("{}.{}", names.logit_bias, id);
    KVARN_RETURN_IF_ERROR(check_token_id(path, id, model));
    if (!(bias >= -100 && bias <= 100)) return range_error(path, "-100..100", shown_value(bias));
  }
  const int64_t max_n = std::min<int64_t>(kMaxChoices, model.max_num_seqs);
  const int64_t n = sampling.n.value_or(1);
  KVARN_RETURN_IF_ERROR(check_integer(names.n, n, 1, max_n));
  const auto sequences = static_cast<int64_t>(request.prompts.size()) * n;
  if (sequences > config.max_sequences_per_request) {
    return range_error(names.n,
                       fmt::format("such that prompts x n is at most {} "
                                   "(--max-sequences-per-request)",
                                   config.max_sequences_per_request),
                       shown_value(sequences));
  }
  return Status::ok();
}

Status check_stopping(const GenerateRequest& request, const ModelInfo& model) {
  const ParamNames& names = *request.names;
  const StoppingOptions& stopping = request.stopping;
  if (stopping.stop.size() > kMaxStopStrings) {
    return range_error(names.stop, fmt::format("at most {} strings", kMaxStopStrings),
                       shown_value(static_cast<int64_t>(stopping.stop.size())));
  }
  for (size_t i = 0; i < stopping.stop.size(); ++i) {
    const size_t bytes = stopping.stop[i].size();
    if (bytes >= 1 && bytes <= kMaxStopBytes) continue;
    const std::string path =
        stopping.stop_is_string ? names.stop : fmt::format("{}[{}]", names.stop, i);
    return range_error(path, fmt::format("1..{} bytes", kMaxStopBytes),
                       shown_value(static_cast<int64_t>(bytes)));
  }
  if (!stopping.stop.empty() && !request.response.text) {
    return needs_error(names.stop, names.text);
  }
  if (stopping.stop_token_ids.size() > kMaxStopIds) {
    return range_error(names.stop_token_ids, fmt::format("at most {} ids", kMaxStopIds),
                       shown_value(static_cast<int64_t>(stopping.stop_token_ids.size())));
  }
  for (size_t i = 0; i < stopping.stop_token_ids.size(); ++i) {
    KVARN_RETURN_IF_ERROR(check_token_id(fmt::format("{}[{}]", names.stop_token_ids, i),
                                         stopping.stop_token_ids[i], model));
  }
  const int64_t longest = stopping.max_tokens.value_or(model.max_model_len);
  return check_integer(names.min_tokens, stopping.min_tokens, 0, longest);
}

Status check_messages(const ChatPrompt& chat, const ParamNames& names) {
  constexpr size_t kMaxMessages = 4096;
  if (chat.messages.empty() || chat.messages.size() > kMaxMessages) {
    return range_error(names.messages, fmt::format("1..{} messages", kMaxMessages),
                       shown_value(static_cast<int64_t>(chat.messages.size())));
  }
  for (size_t i = 0; i < chat.messages.size(); ++i) {
    const ChatMessage& message = chat.messages[i];
    const auto path = [&](const char* member) {
      return fmt::format("{}[{}].{}", names.messages, i, member);
    };
    if (message.role == "function") {
      return unsupported_error(path("role"), "'function'", "use the role 'tool'");
    }
    static constexpr std::array kRoles = {"system", "developer", "user", "assistant", "tool"};
    if (std::find(kRoles.begin(), kRoles.end(), message.role) == kRoles.end()) {
      return range_error(path("role"), "one of system, developer, user, assistant, tool",
                         shown_value(std::string_view(message.role)));
    }
    const bool may_lack_content =
        message.role == "assistant" &&
        (!message.tool_calls.empty() || message.reasoning_content.has_value());
    if (!message.content.has_value() && !may_lack_content) return missing_error(path("content"));
    if (message.role == "tool" && !message.tool_call_id.has_value()) {
      return missing_error(path("tool_call_id"));
    }
  }
  return Status::ok();
}

Status check_tools(const ChatPrompt& chat, const ParamNames& names) {
  if (chat.tools != nullptr && !chat.tools->is_null()) {
    return unsupported_error(names.tools, "tool calls",
                             "they belong to a later stage; leave it out");
  }
  if (chat.tool_choice.has_value() && *chat.tool_choice != "none") {
    return unsupported_error(names.tool_choice, shown_value(std::string_view(*chat.tool_choice)),
                             "tool calls belong to a later stage; leave it out or send 'none'");
  }
  if (!chat.parallel_tool_calls.value_or(true)) {
    return unsupported_error(names.parallel_tool_calls, "false",
                             "tool calls belong to a later stage; leave it out");
  }
  return Status::ok();
}

Status check_template_kwargs(const ChatPrompt& chat, const ParamNames& names) {
  if (chat.template_kwargs == nullptr || chat.template_kwargs->is_null()) return Status::ok();
  const nlohmann::ordered_json& kwargs = *chat.template_kwargs;
  constexpr size_t kMaxKwargs = 64;
  if (!kwargs.is_object()) {
    return type_error(names.template_kwargs, "an object", kwargs.type_name());
  }
  if (kwargs.size() > kMaxKwargs) {
    return range_error(names.template_kwargs, fmt::format("at most {} keys", kMaxKwargs),
                       shown_value(static_cast<int64_t>(kwargs.size())));
  }
  for (const char* reserved : {"messages", "tools", "add_generation_prompt"}) {
    if (kwargs.contains(reserved)) {
      return range_error(fmt::format("{}.{}", names.template_kwargs, reserved),
                         "absent: the server sets this variable", "a value");
    }
  }
  const auto thinking = kwargs.find("enable_thinking");
  if (thinking == kwargs.end() || thinking->is_null()) return Status::ok();
  const std::string path = fmt::format("{}.enable_thinking", names.template_kwargs);
  if (!thinking->is_boolean()) return type_error(path, "a boolean", thinking->type_name());
  if (chat.enable_thinking.has_value() && *chat.enable_thinking != thinking->get<bool>()) {
    return conflict_error(names.enable_thinking, path);
  }
  return Status::ok();
}

// What only a generation refuses; templates may be rendered with it.
Status check_chat_generation(const ChatPrompt& chat, const ParamNames& names) {
  if (!chat.add_generation_prompt.value_or(true)) {
    return unsupported_error(names.add_generation_prompt, "false", kLater);
  }
  return Status::ok();
}

Status check_later_stages(const GenerateRequest& request) {
  const ParamNames& names = *request.names;
  const std::optional<int64_t>& budget = request.stopping.thinking_token_budget;
  if (budget.has_value() && *budget < -1) {
    return range_error(names.thinking_token_budget, "-1 (off) or at least 0", shown_value(*budget));
  }
  if (budget.value_or(-1) != -1) {
    return unsupported_error(names.thinking_token_budget, shown_value(*budget), kLater);
  }
  for (const Prompt& prompt : request.prompts) {
    if (const auto* chat = std::get_if<ChatPrompt>(&prompt)) {
      KVARN_RETURN_IF_ERROR(check_chat_generation(*chat, names));
    }
  }
  KVARN_RETURN_IF_ERROR(check_integer(names.priority, request.priority,
                                      std::numeric_limits<int32_t>::min(),
                                      std::numeric_limits<int32_t>::max()));
  if (request.priority != 0) {
    return unsupported_error(names.priority, shown_value(request.priority), kLater);
  }
  return Status::ok();
}

}  // namespace

Status validate_chat(const ChatPrompt& chat, const ParamNames& names) {
  KVARN_RETURN_IF_ERROR(check_messages(chat, names));
  KVARN_RETURN_IF_ERROR(check_tools(chat, names));
  KVARN_RETURN_IF_ERROR(check_template_kwargs(chat, names));
  if (chat.reasoning_effort.has_value()) {
    static constexpr std::array kEfforts = {"none", "minimal", "low", "medium",
                                            "high", "xhigh",   "max"};
    if (std::find(kEfforts.begin(), kEfforts.end(), *chat.reasoning_effort) == kEfforts.end()) {
      return range_error(names.reasoning_effort,
                         "one of none, minimal, low, medium, high, xhigh, max",
                         shown_value(std::string_view(*chat.reasoning_effort)));
    }
  }
  if (chat.continue_final_message.value_or(false)) {
    return unsupported_error(names.continue_final_message, "true", kLater);
  }
  return Status::ok();
}

Status validate(const GenerateRequest& request, const ModelInfo& model,
                const ServerConfig& config) {
  const ParamNames& names = *request.names;
  KVARN_RETURN_IF_ERROR(check_prompts(request, model));
  const bool is_chat = std::holds_alternative<ChatPrompt>(request.prompts.front());
  if (request.stopping.max_tokens.has_value()) {
    KVARN_RETURN_IF_ERROR(check_integer(names.max_tokens, *request.stopping.max_tokens,
                                        is_chat ? 1 : 0, model.max_model_len));
  }
  KVARN_RETURN_IF_ERROR(check_sampling(request, model, config));
  KVARN_RETURN_IF_ERROR(check_stopping(request, model));
  KVARN_RETURN_IF_ERROR(
      check_integer(names.top_logprobs, request.response.top_logprobs, 0, kMaxTopLogprobs));
  if (request.response.top_logprobs > 0 && !request.response.logprobs) {
    return needs_error(names.top_logprobs, names.logprobs);
  }
  if (request.response.echo && request.response.logprobs) {
    return unsupported_error(names.echo, "logprobs of the prompt",
                             "leave out either 'echo' or 'logprobs'");
  }
  KVARN_RETURN_IF_ERROR(check_later_stages(request));
  if (request.cache.salt.has_value() &&
      (request.cache.salt->empty() || request.cache.salt->size() > kMaxSaltBytes)) {
    return range_error(names.cache_salt, fmt::format("1..{} bytes", kMaxSaltBytes),
                       shown_value(static_cast<int64_t>(request.cache.salt->size())));
  }
  if (request.cache.bypass_prefix_cache) {
    return unsupported_error(names.bypass_prefix_cache, "true",
                             "give the request a 'cache_salt' of its own instead");
  }
  return Status::ok();
}

Status validate_model(const std::string& name, const ModelInfo& model, const ParamNames& names) {
  if (name.empty() || model.serves(name)) return Status::ok();
  return {StatusCode::kNotFound, "model_not_found",
          fmt::format("model {} does not exist; served: {}", shown_value(std::string_view(name)),
                      fmt::join(model.served_names, ", ")),
          names.model};
}

std::optional<bool> resolve_enable_thinking(const ChatPrompt& chat) {
  if (chat.enable_thinking.has_value()) return chat.enable_thinking;
  if (chat.template_kwargs != nullptr && chat.template_kwargs->is_object()) {
    const auto thinking = chat.template_kwargs->find("enable_thinking");
    if (thinking != chat.template_kwargs->end() && thinking->is_boolean()) {
      return thinking->get<bool>();
    }
  }
  if (chat.reasoning_effort.has_value()) return *chat.reasoning_effort != "none";
  return std::nullopt;
}

SamplingParams resolve_sampling(const GenerateRequest& request, const ModelInfo& model) {
  const SamplingOptions& asked = request.sampling;
  const SamplingDefaults& defaults = model.sampling;
  const auto pick = [](const std::optional<double>& value, double otherwise) {
    return static_cast<float>(value.value_or(otherwise));
  };
  SamplingParams params;
  params.temperature = pick(asked.temperature, defaults.temperature);
  params.top_p = pick(asked.top_p, defaults.top_p);
  params.min_p = pick(asked.min_p, defaults.min_p);
  // Beyond the vocabulary it filters nothing; -1 is the other spelling of off.
  params.top_k = static_cast<int32_t>(
      std::clamp<int64_t>(asked.top_k.value_or(defaults.top_k), 0, model.vocab_size));
  params.repetition_penalty = pick(asked.repetition_penalty, defaults.repetition_penalty);
  params.presence_penalty = pick(asked.presence_penalty, 0);
  params.frequency_penalty = pick(asked.frequency_penalty, 0);
  for (const auto& [id, bias] : asked.logit_bias) {
    params.logit_bias.push_back({static_cast<int32_t>(id), static_cast<float>(bias)});
  }
  if (asked.seed.has_value()) {
    params.seed = static_cast<uint64_t>(*asked.seed);
  } else {
    thread_local std::mt19937_64 random{std::random_device{}()};
    params.seed = random();
  }
  if (request.response.logprobs) {
    params.num_logprobs = static_cast<int32_t>(request.response.top_logprobs);
  }
  return params;
}

Result<int32_t> resolve_max_tokens(const GenerateRequest& request, int64_t prompt_tokens,
                                   bool is_chat, const std::string& path, const ModelInfo& model,
                                   const ServerConfig& config) {
  const int64_t context = model.max_model_len;
  const int64_t rest = context - prompt_tokens;
  int64_t requested = 0;
  if (request.stopping.max_tokens.has_value()) {
    requested = *request.stopping.max_tokens;
  } else {
    requested =
        std::max<int64_t>(rest, 1);  // no room for one token is an error, not an empty answer
    if (model.sampling.max_new_tokens.has_value()) {
      requested = std::min(requested, *model.sampling.max_new_tokens);
    }
    if (is_chat && config.default_max_tokens > 0) {
      requested = std::min(requested, config.default_max_tokens);
    }
  }
  if (requested > rest) {
    return Status(
        StatusCode::kInvalidArgument, "context_length_exceeded",
        fmt::format("this model's context is {} tokens; the prompt has {} and {} were "
                    "requested: {} > {}",
                    context, prompt_tokens, requested, prompt_tokens + requested, context),
        path);
  }
  if (request.stopping.min_tokens > requested) {
    return range_error(request.names->min_tokens, fmt::format("0..{}", requested),
                       shown_value(request.stopping.min_tokens));
  }
  return static_cast<int32_t>(requested);
}

}  // namespace kvarn
