#include "server/grpc_convert.h"

#include <algorithm>
#include <cstdlib>

#include <fmt/format.h>
#include <nlohmann/json.hpp>

#include "server/json_in.h"
#include "server/json_out.h"

namespace kvarn::grpc_convert {
namespace {

using Json = nlohmann::ordered_json;

Status invalid(const char* reason, std::string message, std::string param) {
  return {StatusCode::kInvalidArgument, reason, std::move(message), std::move(param)};
}

Status later_stage(const std::string& path, const std::string& remedy) {
  return invalid("unsupported_parameter",
                 fmt::format("'{}' is not supported: set; {}", path, remedy), path);
}

// An object inside a string field, with the members in the client's order.
Result<SharedJson> parse_object(const std::string& text, const std::string& path, int max_depth) {
  Result<Json> value = parse_json(text, max_depth);
  if (!value.is_ok()) {
    const Status& error = value.status();
    return Status(error.code(), error.reason(), fmt::format("'{}': {}", path, error.message()),
                  path);
  }
  if (!value->is_object()) {
    return invalid("invalid_type",
                   fmt::format("'{}' must be object, got {}", path, json_type(*value)), path);
  }
  return SharedJson(std::make_shared<const Json>(std::move(value).value()));
}

// The double that a reader of the float's shortest decimal form would get, so that 0.1f is 0.1 in
// messages, as it is over HTTP. NaN and infinity pass; validate() refuses them.
double to_double(float value) { return std::strtod(fmt::format("{}", value).c_str(), nullptr); }

void read_sampling(const v1::SamplingParams& proto, SamplingOptions& out) {
  if (proto.has_temperature()) out.temperature = to_double(proto.temperature());
  if (proto.has_top_p()) out.top_p = to_double(proto.top_p());
  if (proto.has_top_k()) out.top_k = proto.top_k();
  if (proto.has_min_p()) out.min_p = to_double(proto.min_p());
  if (proto.has_repetition_penalty()) {
    out.repetition_penalty = to_double(proto.repetition_penalty());
  }
  if (proto.presence_penalty() != 0) out.presence_penalty = to_double(proto.presence_penalty());
  if (proto.frequency_penalty() != 0) out.frequency_penalty = to_double(proto.frequency_penalty());
  for (const auto& [token, bias] : proto.logit_bias()) {
    out.logit_bias.emplace_back(token, to_double(bias));
  }
  // A protobuf map has no order; errors must not depend on its hash.
  std::sort(out.logit_bias.begin(), out.logit_bias.end());
  if (proto.has_seed()) out.seed = proto.seed();
  if (proto.n() != 0) out.n = proto.n();
}

void read_stopping(const v1::StoppingCriteria& proto, StoppingOptions& out) {
  if (proto.has_max_tokens()) out.max_tokens = proto.max_tokens();
  out.min_tokens = proto.min_tokens();
  out.stop.assign(proto.stop().begin(), proto.stop().end());
  out.stop_token_ids.assign(proto.stop_token_ids().begin(), proto.stop_token_ids().end());
  out.include_stop_str_in_output = proto.include_stop_str_in_output();
  out.ignore_eos = proto.ignore_eos();
  if (proto.has_thinking_token_budget()) out.thinking_token_budget = proto.thinking_token_budget();
}

void read_response(const v1::ResponseOptions& proto, ResponseOptions& out) {
  if (proto.has_text()) out.text = proto.text();
  out.token_ids = proto.token_ids() || !out.text;
  out.prompt_token_ids = proto.prompt_token_ids();
  out.logprobs = proto.logprobs();
  out.top_logprobs = proto.top_logprobs();
  if (proto.has_skip_special_tokens()) out.skip_special_tokens = proto.skip_special_tokens();
  if (proto.has_include_reasoning()) out.include_reasoning = proto.include_reasoning();
}

ChatMessage to_message(const v1::ChatMessage& proto) {
  ChatMessage message;
  message.role = proto.role();
  if (!proto.reasoning_content().empty()) message.reasoning_content = proto.reasoning_content();
  if (!proto.tool_call_id().empty()) message.tool_call_id = proto.tool_call_id();
  for (const v1::ToolCall& call : proto.tool_calls()) {
    message.tool_calls.push_back({call.id(), call.name(), call.arguments(), nullptr});
  }
  // proto3 cannot tell an empty content from an absent one; only an assistant may have none.
  const bool may_be_absent =
      proto.role() == "assistant" && (message.reasoning_content || !message.tool_calls.empty());
  if (!proto.content().empty() || !may_be_absent) message.content = proto.content();
  return message;
}

Status read_tool_choice(const v1::ToolChoice& proto, std::optional<std::string>& out) {
  const std::string path = kGrpcParams.tool_choice;
  if (proto.names_size() > 0) {
    return later_stage(path + ".names", "leave it empty");
  }
  switch (proto.mode()) {
    case v1::ToolChoice::MODE_UNSPECIFIED:
      return Status::ok();
    case v1::ToolChoice::MODE_NONE:
      out = "none";
      return Status::ok();
    case v1::ToolChoice::MODE_AUTO:
      out = "auto";
      return Status::ok();
    case v1::ToolChoice::MODE_REQUIRED:
      out = "required";
      return Status::ok();
    default:
      return invalid(
          "invalid_value",
          fmt::format("'{}.mode' must be 0..3, got {}", path, static_cast<int>(proto.mode())),
          path + ".mode");
  }
}

v1::TokenLogprob to_proto(const TokenText& token) {
  v1::TokenLogprob out;
  out.set_id(static_cast<uint32_t>(token.id));
  out.set_logprob(static_cast<float>(finite_logprob(token.logprob)));
  out.set_token(token.bytes);
  return out;
}

void add_logprobs(const std::vector<TokenLogprobs>& logprobs, v1::SequenceOutput& out) {
  for (const TokenLogprobs& entry : logprobs) {
    v1::TokenLogprob& token = *out.add_logprobs();
    token = to_proto(entry.token);
    for (const TokenText& top : entry.top) *token.add_top() = to_proto(top);
  }
}

void set_finish(const Finish& finish, int64_t num_output_tokens, v1::FinishInfo& out) {
  switch (finish.kind) {
    case FinishKind::kStop:
      out.set_reason(v1::FinishInfo::REASON_STOP);
      break;
    case FinishKind::kLength:
      out.set_reason(v1::FinishInfo::REASON_LENGTH);
      break;
    case FinishKind::kToolCalls:
      out.set_reason(v1::FinishInfo::REASON_TOOL_CALLS);
      break;
  }
  if (finish.eos_token_id) out.set_eos_token_id(static_cast<uint32_t>(*finish.eos_token_id));
  if (finish.stop_token_id) out.set_stop_token_id(static_cast<uint32_t>(*finish.stop_token_id));
  if (finish.stop_string) out.set_stop_string(*finish.stop_string);
  out.set_num_output_tokens(static_cast<uint32_t>(num_output_tokens));
}

void set_call(const ToolCallDelta& call, v1::ToolCallDelta& out) {
  out.set_index(static_cast<uint32_t>(call.index));
  out.set_id(call.id);
  out.set_name(call.name);
  out.set_arguments(call.arguments);
}

}  // namespace

Result<ChatPrompt> to_chat(const v1::ChatPrompt& proto, int max_json_depth) {
  ChatPrompt chat;
  for (const v1::ChatMessage& message : proto.messages()) {
    chat.messages.push_back(to_message(message));
  }
  if (proto.tools_json_size() > 0) {
    Json tools = Json::array();
    for (int i = 0; i < proto.tools_json_size(); ++i) {
      KVARN_ASSIGN_OR_RETURN(
          const SharedJson tool,
          parse_object(proto.tools_json(i), fmt::format("{}[{}]", kGrpcParams.tools, i),
                       max_json_depth));
      tools.push_back(*tool);
    }
    chat.tools = std::make_shared<const Json>(std::move(tools));
  }
  if (proto.has_tool_choice()) {
    KVARN_RETURN_IF_ERROR(read_tool_choice(proto.tool_choice(), chat.tool_choice));
  }
  if (proto.has_parallel_tool_calls()) chat.parallel_tool_calls = proto.parallel_tool_calls();
  if (!proto.template_kwargs_json().empty()) {
    KVARN_ASSIGN_OR_RETURN(
        chat.template_kwargs,
        parse_object(proto.template_kwargs_json(), kGrpcParams.template_kwargs, max_json_depth));
  }
  if (proto.has_add_generation_prompt()) {
    chat.add_generation_prompt = proto.add_generation_prompt();
  }
  if (proto.continue_final_message()) chat.continue_final_message = true;
  if (!proto.reasoning_effort().empty()) chat.reasoning_effort = proto.reasoning_effort();
  return chat;
}

Result<GenerateRequest> to_request(const v1::GenerateRequest& proto, int max_json_depth) {
  GenerateRequest request;
  request.names = &kGrpcParams;
  request.id_prefix = "gen-";
  request.model = proto.model();
  switch (proto.prompt_case()) {
    case v1::GenerateRequest::kText:
      request.prompts.emplace_back(TextPrompt(proto.text()));
      break;
    case v1::GenerateRequest::kTokenIds:
      request.prompts.emplace_back(
          TokenPrompt(proto.token_ids().ids().begin(), proto.token_ids().ids().end()));
      break;
    case v1::GenerateRequest::kChat: {
      KVARN_ASSIGN_OR_RETURN(ChatPrompt chat, to_chat(proto.chat(), max_json_depth));
      request.prompts.emplace_back(std::move(chat));
      break;
    }
    case v1::GenerateRequest::PROMPT_NOT_SET:
      return invalid("missing_required_parameter",
                     "'prompt' is required: one of text, token_ids and chat", "prompt");
  }
  if (proto.has_structured_output()) {
    return later_stage("structured_output", "leave it unset and ask for the format in the prompt");
  }
  read_sampling(proto.sampling(), request.sampling);
  read_stopping(proto.stopping(), request.stopping);
  read_response(proto.response(), request.response);
  if (!proto.cache().salt().empty()) request.cache.salt = proto.cache().salt();
  request.cache.bypass_prefix_cache = proto.cache().bypass_prefix_cache();
  request.priority = proto.priority();
  return request;
}

v1::PromptInfo to_proto(const PromptInfo& info) {
  v1::PromptInfo out;
  out.set_num_prompt_tokens(static_cast<uint32_t>(info.num_prompt_tokens));
  out.set_num_cached_tokens(static_cast<uint32_t>(info.num_cached_tokens));
  out.mutable_token_ids()->Add(info.token_ids.begin(), info.token_ids.end());
  return out;
}

v1::Usage to_proto(const Usage& usage) {
  v1::Usage out;
  out.set_prompt_tokens(static_cast<uint32_t>(usage.prompt_tokens));
  out.set_completion_tokens(static_cast<uint32_t>(usage.completion_tokens));
  out.set_cached_tokens(static_cast<uint32_t>(usage.cached_tokens));
  out.set_reasoning_tokens(static_cast<uint32_t>(usage.reasoning_tokens));
  return out;
}

v1::SequenceOutput to_proto(const Delta& delta, int64_t num_output_tokens) {
  v1::SequenceOutput out;
  out.set_index(static_cast<uint32_t>(delta.choice));
  if (delta.kind == DeltaKind::kContent) out.set_text(delta.text);
  if (delta.kind == DeltaKind::kReasoning) out.set_reasoning(delta.text);
  if (delta.kind == DeltaKind::kToolCall) set_call(delta.tool_call, *out.add_tool_calls());
  out.set_num_tokens(static_cast<uint32_t>(delta.num_tokens));
  out.mutable_token_ids()->Add(delta.token_ids.begin(), delta.token_ids.end());
  add_logprobs(delta.logprobs, out);
  if (delta.finish) set_finish(*delta.finish, num_output_tokens, *out.mutable_finish());
  return out;
}

v1::SequenceOutput to_proto(int32_t index, const FoldedChoice& choice) {
  v1::SequenceOutput out;
  out.set_index(static_cast<uint32_t>(index));
  out.set_text(choice.content);
  out.set_reasoning(choice.reasoning);
  for (const ToolCallDelta& call : choice.tool_calls) set_call(call, *out.add_tool_calls());
  out.set_num_tokens(static_cast<uint32_t>(choice.num_tokens));
  out.mutable_token_ids()->Add(choice.token_ids.begin(), choice.token_ids.end());
  add_logprobs(choice.logprobs, out);
  if (choice.finish) set_finish(*choice.finish, choice.num_tokens, *out.mutable_finish());
  return out;
}

v1::GetModelInfoResponse to_model_info(const ModelInfo& model) {
  v1::GetModelInfoResponse out;
  out.set_model_id(model.served_names.front());
  for (const std::string& name : model.served_names) out.add_served_names(name);
  out.set_architecture(model.architecture);
  out.set_vocab_size(static_cast<uint32_t>(model.vocab_size));
  for (const int32_t id : model.eos_token_ids) out.add_eos_token_ids(static_cast<uint32_t>(id));
  out.set_reasoning_parser(model.reasoning_parser);
  out.set_tool_call_parser(model.tool_call_parser);
  const SamplingDefaults& sampling = model.sampling;
  Json defaults = {{"temperature", sampling.temperature},
                   {"top_p", sampling.top_p},
                   {"top_k", sampling.top_k},
                   {"min_p", sampling.min_p},
                   {"repetition_penalty", sampling.repetition_penalty}};
  if (sampling.max_new_tokens) defaults["max_new_tokens"] = *sampling.max_new_tokens;
  out.set_default_sampling_json(dump_json(defaults));
  return out;
}

}  // namespace kvarn::grpc_convert
