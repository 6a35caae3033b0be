// Request bodies -> OpenAiRequest, fields in the order of the docs' tables.
#include <charconv>

#include <fmt/format.h>
#include <nlohmann/json.hpp>

#include "server/json_in.h"
#include "server/json_out.h"
#include "server/openai_api.h"
#include "server/param_error.h"

namespace kvarn {
namespace {

using nlohmann::ordered_json;

constexpr int64_t kCompletionDefaultTokens = 16;

std::string shown_json(const ordered_json& value) {
  if (value.is_string()) return shown_value(std::string_view(value.get_ref<const std::string&>()));
  if (value.is_array() || value.is_object()) return json_type(value);
  return value.dump();
}

void read_stream(FieldReader& fields, OpenAiRequest& request) {
  request.stream = request.generate.streamed = fields.boolean("stream").value_or(false);
  const ordered_json* options = fields.object("stream_options");
  if (options == nullptr) return;
  if (!request.stream) {
    fields.fail(needs_error("stream_options", "stream"));
    return;
  }
  FieldReader inner(*options, "stream_options.");
  request.include_usage = inner.boolean("include_usage").value_or(false);
  request.continuous_usage = inner.boolean("continuous_usage_stats").value_or(false);
  fields.fail(inner.status());
  if (request.continuous_usage && !request.include_usage) {
    fields.fail(
        needs_error("stream_options.continuous_usage_stats", "stream_options.include_usage"));
  }
}

void read_chat_limit(FieldReader& fields, GenerateRequest& request) {
  const std::optional<int64_t> newer = fields.integer("max_completion_tokens");
  const std::optional<int64_t> older = fields.integer("max_tokens");
  if (newer.has_value() && older.has_value() && *newer != *older) {
    fields.fail(conflict_error("max_completion_tokens", "max_tokens"));
  }
  request.stopping.max_tokens = newer.has_value() ? newer : older;
  request.names = newer.has_value() ? &kHttpChatParams : &kHttpParams;
}

void read_logit_bias(FieldReader& fields, SamplingOptions& sampling) {
  const ordered_json* bias = fields.object("logit_bias");
  if (bias == nullptr) return;
  for (const auto& [key, value] : bias->items()) {
    const std::string path = fmt::format("logit_bias.{}", quote_for_message(key));
    int64_t id = 0;
    const auto [end, error] = std::from_chars(key.data(), key.data() + key.size(), id);
    const bool decimal = error == std::errc() && end == key.data() + key.size();
    // "007" would name the same token as "7": one spelling keeps each id once.
    if (!decimal || fmt::format("{}", id) != key) {
      fields.fail(
          range_error(path, "named by a decimal token id", shown_value(std::string_view(key))));
      return;
    }
    if (!value.is_number()) {
      fields.fail(type_error(path, "a number", json_type(value)));
      return;
    }
    sampling.logit_bias.emplace_back(id, value.get<double>());
  }
}

void read_sampling(FieldReader& fields, SamplingOptions& sampling) {
  sampling.temperature = fields.number("temperature");
  sampling.top_p = fields.number("top_p");
  sampling.top_k = fields.integer("top_k");
  sampling.min_p = fields.number("min_p");
  sampling.repetition_penalty = fields.number("repetition_penalty");
  sampling.presence_penalty = fields.number("presence_penalty");
  sampling.frequency_penalty = fields.number("frequency_penalty");
  read_logit_bias(fields, sampling);
  sampling.seed = fields.integer("seed");
  sampling.n = fields.integer("n");
}

void read_stop(FieldReader& fields, StoppingOptions& stopping) {
  const ordered_json* stop = fields.find("stop");
  if (stop != nullptr && stop->is_string()) {
    stopping.stop = {stop->get<std::string>()};
    stopping.stop_is_string = true;
  } else if (stop != nullptr && stop->is_array()) {
    for (size_t i = 0; i < stop->size(); ++i) {
      const ordered_json& element = (*stop)[i];
      if (!element.is_string()) {
        fields.fail(type_error(fmt::format("stop[{}]", i), "a string", json_type(element)));
        return;
      }
      stopping.stop.push_back(element.get<std::string>());
    }
  } else if (stop != nullptr) {
    fields.fail(type_error("stop", "a string or an array of strings", json_type(*stop)));
  }
  stopping.stop_token_ids = fields.integers("stop_token_ids");
  stopping.min_tokens = fields.integer("min_tokens").value_or(0);
  stopping.ignore_eos = fields.boolean("ignore_eos").value_or(false);
  stopping.include_stop_str_in_output =
      fields.boolean("include_stop_str_in_output").value_or(false);
}

void read_response_format(FieldReader& fields) {
  const ordered_json* format = fields.object("response_format");
  if (format == nullptr) return;
  FieldReader inner(*format, "response_format.");
  const std::optional<std::string> type = inner.string("type");
  fields.fail(inner.status());
  if (!type.has_value()) {
    fields.fail(missing_error("response_format.type"));
  } else if (*type == "json_object" || *type == "json_schema" || *type == "regex" ||
             *type == "grammar" || *type == "choice") {
    fields.fail(unsupported_error("response_format.type", shown_value(std::string_view(*type)),
                                  "structured output belongs to a later stage; use 'text'"));
  } else if (*type != "text") {
    fields.fail(
        range_error("response_format.type", "'text'", shown_value(std::string_view(*type))));
  }
}

void read_extensions(FieldReader& fields, GenerateRequest& request) {
  request.priority = fields.integer("priority").value_or(0);
  request.cache.salt = fields.string("cache_salt");
  request.cache.bypass_prefix_cache = fields.boolean("bypass_prefix_cache").value_or(false);
}

void refuse_unsupported(FieldReader& fields, const ordered_json& body, bool chat) {
  for (const UnsupportedField& field : unsupported_fields()) {
    if (chat ? !field.chat : !field.completions) continue;
    const ordered_json* value = fields.find(field.name);
    if (value == nullptr || field.harmless(*value, body)) continue;
    fields.fail(unsupported_error(field.name, shown_json(*value), field.remedy));
  }
}

// "prompt": text, texts, ids, or lists of ids.
void read_prompts(FieldReader& fields, GenerateRequest& request) {
  const ordered_json* prompt = fields.find("prompt");
  if (prompt == nullptr) {
    if (fields.ok()) fields.fail(missing_error("prompt"));
    return;
  }
  constexpr const char* kKinds = "a string, an array of strings, of integers or of integer arrays";
  if (prompt->is_string()) {
    request.prompts.emplace_back(prompt->get<std::string>());
    return;
  }
  if (!prompt->is_array()) {
    fields.fail(type_error("prompt", kKinds, json_type(*prompt)));
    return;
  }
  if (prompt->empty()) {
    fields.fail(range_error("prompt", "at least one prompt", "an empty array"));
    return;
  }
  const bool strings = prompt->front().is_string(), arrays = prompt->front().is_array();
  if (!strings && !arrays) {
    request.prompts.emplace_back(fields.integers("prompt"));
    return;
  }
  for (size_t i = 0; i < prompt->size(); ++i) {
    const ordered_json& element = (*prompt)[i];
    const std::string path = fmt::format("prompt[{}]", i);
    if (strings ? !element.is_string() : !element.is_array()) {
      fields.fail(type_error(path, strings ? "a string like the first" : "an array like the first",
                             json_type(element)));
      return;
    }
    if (strings) {
      request.prompts.emplace_back(element.get<std::string>());
      continue;
    }
    TokenPrompt ids;
    for (size_t j = 0; j < element.size(); ++j) {
      const std::optional<int64_t> id = as_integer(element[j]);
      if (!id.has_value()) {
        fields.fail(
            type_error(fmt::format("{}[{}]", path, j), "an integer", json_type(element[j])));
        return;
      }
      ids.push_back(*id);
    }
    request.prompts.emplace_back(std::move(ids));
  }
}

Result<OpenAiRequest> parse_chat(const ordered_json& body) {
  OpenAiRequest out;
  out.endpoint = OpenAiEndpoint::kChat;
  GenerateRequest& request = out.generate;
  request.id_prefix = "chatcmpl-";
  FieldReader fields(body, "");
  request.model = fields.string("model").value_or("");
  KVARN_RETURN_IF_ERROR(fields.status());
  KVARN_ASSIGN_OR_RETURN(ChatPrompt chat, parse_chat_prompt(body));
  request.prompts.emplace_back(std::move(chat));
  read_stream(fields, out);
  read_chat_limit(fields, request);
  read_sampling(fields, request.sampling);
  read_stop(fields, request.stopping);
  ResponseOptions& response = request.response;
  response.skip_special_tokens = fields.boolean("skip_special_tokens").value_or(true);
  response.logprobs = fields.boolean("logprobs").value_or(false);
  response.top_logprobs = fields.integer("top_logprobs").value_or(0);
  response.token_ids = response.prompt_token_ids =
      fields.boolean("return_token_ids").value_or(false);
  read_response_format(fields);
  response.include_reasoning = fields.boolean("include_reasoning").value_or(true);
  request.stopping.thinking_token_budget = fields.integer("thinking_token_budget");
  read_extensions(fields, request);
  refuse_unsupported(fields, body, /*chat=*/true);
  KVARN_RETURN_IF_ERROR(fields.status());
  return out;
}

Result<OpenAiRequest> parse_completion(const ordered_json& body) {
  OpenAiRequest out;
  out.endpoint = OpenAiEndpoint::kCompletions;
  GenerateRequest& request = out.generate;
  request.id_prefix = "cmpl-";
  request.names = &kHttpCompletionParams;
  FieldReader fields(body, "");
  request.model = fields.string("model").value_or("");
  read_prompts(fields, request);
  read_stream(fields, out);
  request.stopping.max_tokens = fields.integer("max_tokens").value_or(kCompletionDefaultTokens);
  read_sampling(fields, request.sampling);
  read_stop(fields, request.stopping);
  ResponseOptions& response = request.response;
  response.skip_special_tokens = fields.boolean("skip_special_tokens").value_or(true);
  const std::optional<int64_t> logprobs = fields.integer("logprobs");
  response.logprobs = logprobs.has_value();
  response.top_logprobs = logprobs.value_or(0);
  response.echo = fields.boolean("echo").value_or(false);
  response.token_ids = response.prompt_token_ids =
      fields.boolean("return_token_ids").value_or(false);
  read_response_format(fields);
  read_extensions(fields, request);
  refuse_unsupported(fields, body, /*chat=*/false);
  KVARN_RETURN_IF_ERROR(fields.status());
  return out;
}

}  // namespace

Result<OpenAiRequest> parse_openai_request(OpenAiEndpoint endpoint, std::string_view body,
                                           int max_json_depth) {
  KVARN_ASSIGN_OR_RETURN(const ordered_json json, parse_body(body, max_json_depth));
  return endpoint == OpenAiEndpoint::kChat ? parse_chat(json) : parse_completion(json);
}

}  // namespace kvarn
