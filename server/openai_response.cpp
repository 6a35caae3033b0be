// Deltas -> chunks, and their fold -> the whole body, to the letter of the official schema.
#include <algorithm>

#include <fmt/format.h>
#include <nlohmann/json.hpp>

#include "engine/tokenizer/detokenizer.h"
#include "server/json_out.h"
#include "server/openai_api.h"

namespace kvarn {
namespace {

using nlohmann::ordered_json;

const char* finish_name(const Finish& finish) {
  switch (finish.kind) {
    case FinishKind::kStop:
      return "stop";
    case FinishKind::kLength:
      return "length";
    case FinishKind::kToolCalls:
      return "tool_calls";
  }
  return "stop";
}

ordered_json stop_reason(const Finish& finish) {
  if (finish.stop_string.has_value()) return *finish.stop_string;
  if (finish.stop_token_id.has_value()) return *finish.stop_token_id;
  return nullptr;
}

ordered_json usage_json(const Usage& usage) {
  ordered_json out;
  out["prompt_tokens"] = usage.prompt_tokens;
  out["completion_tokens"] = usage.completion_tokens;
  out["total_tokens"] = usage.prompt_tokens + usage.completion_tokens;
  out["prompt_tokens_details"]["cached_tokens"] = usage.cached_tokens;
  out["completion_tokens_details"]["reasoning_tokens"] = usage.reasoning_tokens;
  return out;
}

// Chats: one entry per token.
ordered_json token_json(const TokenText& token) {
  ordered_json out;
  out["token"] = sanitize_utf8(token.bytes);
  out["logprob"] = finite_logprob(token.logprob);
  ordered_json& bytes = out["bytes"] = ordered_json::array();
  for (const char byte : token.bytes) bytes.push_back(static_cast<unsigned char>(byte));
  return out;
}

ordered_json chat_logprobs(const std::vector<TokenLogprobs>& tokens) {
  ordered_json content = ordered_json::array();
  for (const TokenLogprobs& entry : tokens) {
    ordered_json token = token_json(entry.token);
    ordered_json& top = token["top_logprobs"] = ordered_json::array();
    for (const TokenText& other : entry.top) top.push_back(token_json(other));
    content.push_back(std::move(token));
  }
  ordered_json out;
  out["content"] = std::move(content);
  out["refusal"] = nullptr;
  return out;
}

// Legacy: a token that is not UTF-8 by itself is written by its bytes, so keys stay distinct.
std::string legacy_token(const TokenText& token) {
  if (is_valid_utf8(token.bytes)) return token.bytes;
  std::string out = "bytes:";
  for (const char byte : token.bytes) {
    out += fmt::format("\\x{:02x}", static_cast<unsigned char>(byte));
  }
  return out;
}

// `offset`: code points of the choice's text before the first of `tokens`; moved past them.
ordered_json legacy_logprobs(const std::vector<TokenLogprobs>& tokens, int64_t& offset) {
  ordered_json names = ordered_json::array(), values = ordered_json::array(),
               tops = ordered_json::array(), offsets = ordered_json::array();
  for (const TokenLogprobs& entry : tokens) {
    const std::string name = legacy_token(entry.token);
    names.push_back(name);
    values.push_back(finite_logprob(entry.token.logprob));
    ordered_json top = ordered_json::object();
    for (const TokenText& other : entry.top) {
      top[legacy_token(other)] = finite_logprob(other.logprob);
    }
    top[name] = finite_logprob(entry.token.logprob);
    tops.push_back(std::move(top));
    offsets.push_back(offset);
    if (!entry.in_text) continue;
    // A character counts where its first byte is; continuation bytes add nothing.
    offset += std::count_if(entry.token.bytes.begin(), entry.token.bytes.end(), [](char byte) {
      return (static_cast<unsigned char>(byte) & 0xC0u) != 0x80u;
    });
  }
  ordered_json out;
  out["tokens"] = std::move(names);
  out["token_logprobs"] = std::move(values);
  out["top_logprobs"] = std::move(tops);
  out["text_offset"] = std::move(offsets);
  return out;
}

void put_reasoning(ordered_json& to, const std::string& text, ReasoningField field) {
  if (field != ReasoningField::kReasoning) to["reasoning_content"] = text;
  if (field != ReasoningField::kReasoningContent) to["reasoning"] = text;
}

ordered_json head_json(const ResponseStyle& style, const char* object) {
  ordered_json out;
  out["id"] = style.id;
  out["object"] = object;
  out["created"] = style.created;
  out["model"] = style.model;
  out["system_fingerprint"] = style.system_fingerprint;
  return out;
}

ordered_json message_json(const FoldedChoice& choice, ReasoningField field) {
  ordered_json message;
  message["role"] = "assistant";
  const bool other_output = !choice.reasoning.empty() || !choice.tool_calls.empty();
  message["content"] = nullptr;
  if (!choice.content.empty() || !other_output) message["content"] = choice.content;
  message["refusal"] = nullptr;
  if (!choice.reasoning.empty()) put_reasoning(message, choice.reasoning, field);
  for (const ToolCallDelta& call : choice.tool_calls) {
    ordered_json function;
    function["name"] = call.name;
    function["arguments"] = call.arguments;
    ordered_json out;
    out["id"] = call.id;
    out["type"] = "function";
    out["function"] = std::move(function);
    message["tool_calls"].push_back(std::move(out));
  }
  return message;
}

ordered_json choice_json(const ResponseStyle& style, const FoldedChoice& choice, size_t index) {
  const bool chat = style.endpoint == OpenAiEndpoint::kChat;
  ordered_json out;
  out["index"] = index;
  if (chat) {
    out["message"] = message_json(choice, style.reasoning_field);
  } else {
    out["text"] = choice.content;
  }
  out["logprobs"] = nullptr;
  if (style.logprobs) {
    int64_t offset = 0;
    out["logprobs"] =
        chat ? chat_logprobs(choice.logprobs) : legacy_logprobs(choice.logprobs, offset);
  }
  const Finish finish = choice.finish.value_or(Finish{});
  out["finish_reason"] = finish_name(finish);
  out["stop_reason"] = stop_reason(finish);
  if (style.token_ids) out["token_ids"] = choice.token_ids;
  return out;
}

ordered_json call_json(const ToolCallDelta& call) {
  ordered_json out;
  out["index"] = call.index;
  if (!call.id.empty()) {
    out["id"] = call.id;
    out["type"] = "function";
    out["function"]["name"] = call.name;
  }
  out["function"]["arguments"] = call.arguments;
  return out;
}

}  // namespace

ReasoningField parse_reasoning_field(const std::string& flag) {
  if (flag == "reasoning_content") return ReasoningField::kReasoningContent;
  return flag == "reasoning" ? ReasoningField::kReasoning : ReasoningField::kBoth;
}

std::string openai_body(const ResponseStyle& style, const Fold& fold) {
  const bool chat = style.endpoint == OpenAiEndpoint::kChat;
  ordered_json out = head_json(style, chat ? "chat.completion" : "text_completion");
  ordered_json& choices = out["choices"] = ordered_json::array();
  for (size_t i = 0; i < fold.choices().size(); ++i) {
    choices.push_back(choice_json(style, fold.choices()[i], i));
  }
  out["usage"] = usage_json(fold.usage());
  if (style.token_ids) {
    std::vector<std::vector<int32_t>> ids(static_cast<size_t>(style.num_prompts));
    for (const PromptInfo& info : fold.prompts()) {
      ids.at(static_cast<size_t>(info.prompt_index)) = info.token_ids;
    }
    out["prompt_token_ids"] = ids.size() == 1 ? ordered_json(ids.front()) : ordered_json(ids);
  }
  return dump_json(out);
}

OpenAiStream::OpenAiStream(ResponseStyle style)
    : style_(std::move(style)),
      started_(static_cast<size_t>(style_.num_prompts * style_.n)),
      text_offset_(started_.size()) {}

ordered_json OpenAiStream::head() const {
  return head_json(style_, style_.endpoint == OpenAiEndpoint::kChat ? "chat.completion.chunk"
                                                                    : "text_completion");
}

void OpenAiStream::write(const PromptInfo& info) {
  usage_.prompt_tokens += info.num_prompt_tokens;
  usage_.cached_tokens += info.num_cached_tokens;
  if (style_.token_ids) prompt_token_ids_[info.prompt_index] = info.token_ids;
}

std::string OpenAiStream::chunk(int32_t choice, ordered_json choice_json) {
  ordered_json out = head();
  out["choices"] = ordered_json::array();
  out["choices"].push_back(std::move(choice_json));
  if (style_.include_usage) {
    out["usage"] = nullptr;
    if (style_.continuous_usage) out["usage"] = usage_json(usage_);
  }
  if (const auto ids = prompt_token_ids_.find(choice / style_.n); ids != prompt_token_ids_.end()) {
    out["prompt_token_ids"] = ids->second;
    prompt_token_ids_.erase(ids);
  }
  return dump_json(out);
}

void OpenAiStream::write(const Delta& delta, std::vector<std::string>& payloads) {
  const bool chat = style_.endpoint == OpenAiEndpoint::kChat;
  const auto index = static_cast<size_t>(delta.choice);
  if (chat && !started_.at(index)) {
    ordered_json role;
    role["index"] = delta.choice;
    role["delta"]["role"] = "assistant";
    role["delta"]["content"] = "";
    role["logprobs"] = nullptr;
    role["finish_reason"] = nullptr;
    payloads.push_back(chunk(delta.choice, std::move(role)));
  }
  started_.at(index) = true;
  usage_.completion_tokens += delta.num_tokens;
  usage_.reasoning_tokens += delta.num_reasoning_tokens;

  ordered_json out;
  out["index"] = delta.choice;
  if (chat) {
    ordered_json& members = out["delta"] = ordered_json::object();
    if (delta.kind == DeltaKind::kContent) members["content"] = delta.text;
    if (delta.kind == DeltaKind::kReasoning) {
      put_reasoning(members, delta.text, style_.reasoning_field);
    }
    if (delta.kind == DeltaKind::kToolCall) {
      members["tool_calls"] = ordered_json::array();
      members["tool_calls"].push_back(call_json(delta.tool_call));
    }
  } else {
    out["text"] = delta.text;
  }
  out["logprobs"] = nullptr;
  if (style_.logprobs && !delta.logprobs.empty()) {
    out["logprobs"] = chat ? chat_logprobs(delta.logprobs)
                           : legacy_logprobs(delta.logprobs, text_offset_.at(index));
  }
  out["finish_reason"] = nullptr;
  if (delta.finish.has_value()) {
    out["finish_reason"] = finish_name(*delta.finish);
    out["stop_reason"] = stop_reason(*delta.finish);
  }
  if (style_.token_ids) out["token_ids"] = delta.token_ids;
  payloads.push_back(chunk(delta.choice, std::move(out)));
}

void OpenAiStream::write_end(std::vector<std::string>& payloads) {
  if (!style_.include_usage) return;
  ordered_json out = head();
  out["choices"] = ordered_json::array();
  out["usage"] = usage_json(usage_);
  payloads.push_back(dump_json(out));
}

}  // namespace kvarn
