// GenerateRequest: what a client asks for, in text. Both doors parse into it; validate() knows its
// ranges and defaults. Plain data: an unset optional means the default.
#pragma once

#include <chrono>
#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <variant>
#include <vector>

#include <nlohmann/json_fwd.hpp>

#include "server/param_names.h"

namespace kvarn {

// JSON that reaches the prompt: the client's member order is kept. Null pointer: absent.
using SharedJson = std::shared_ptr<const nlohmann::ordered_json>;

struct ToolCallInput {
  std::string id, name;
  std::string arguments;        // inserted into the prompt verbatim
  SharedJson arguments_object;  // instead, where the client sent an object
};

struct ChatMessage {
  std::string role;
  std::optional<std::string> content;  // text parts already joined with "\n"
  std::optional<std::string> reasoning_content;
  std::vector<ToolCallInput> tool_calls;
  std::optional<std::string> tool_call_id;
};

struct ChatPrompt {
  std::vector<ChatMessage> messages;
  SharedJson tools;                             // array; a later stage
  std::optional<std::string> tool_choice;       // mode; a later stage unless "none"
  std::optional<bool> parallel_tool_calls;      // a later stage unless true
  SharedJson template_kwargs;                   // object
  std::optional<bool> enable_thinking;          // also a member of template_kwargs
  std::optional<std::string> reasoning_effort;  // none ... max
  std::optional<bool> add_generation_prompt;    // a later stage unless true
  std::optional<bool> continue_final_message;   // a later stage unless false
};

using TextPrompt = std::string;            // raw, without template
using TokenPrompt = std::vector<int64_t>;  // ids, checked by validate()
using Prompt = std::variant<TextPrompt, TokenPrompt, ChatPrompt>;

struct SamplingOptions {
  std::optional<double> temperature, top_p, min_p;
  std::optional<int64_t> top_k;
  std::optional<double> repetition_penalty, presence_penalty, frequency_penalty;
  std::vector<std::pair<int64_t, double>> logit_bias;  // (token id, bias), each id once
  std::optional<int64_t> seed;                         // unset: random
  std::optional<int64_t> n;
};

struct StoppingOptions {
  std::optional<int64_t> max_tokens;
  int64_t min_tokens = 0;
  std::vector<std::string> stop;
  bool stop_is_string = false;  // the client sent one string: its path has no index
  std::vector<int64_t> stop_token_ids;
  bool include_stop_str_in_output = false;
  bool ignore_eos = false;
  std::optional<int64_t> thinking_token_budget;  // a later stage unless -1
};

struct ResponseOptions {
  bool text = true;               // false: token ids only, nothing is detokenised
  bool token_ids = false;         // ids of the output in each delta
  bool prompt_token_ids = false;  // in PromptInfo
  bool logprobs = false;
  int64_t top_logprobs = 0;
  bool skip_special_tokens = true;
  bool include_reasoning = true;
  bool echo = false;  // completions: the prompt's text comes first
};

struct CacheOptions {
  std::optional<std::string> salt;
  bool bypass_prefix_cache = false;  // a later stage
};

struct GenerateRequest {
  const ParamNames* names = &kHttpParams;  // for error paths; a static table
  std::string id_prefix = "cmpl-";         // of the response id
  std::string label;                       // X-Request-Id, for logs
  std::string trace_id;                    // of traceparent, for logs; may be empty
  std::string model;                       // empty: the first served name
  std::vector<Prompt> prompts;             // one, or several raw ones (completions)
  SamplingOptions sampling;
  StoppingOptions stopping;
  ResponseOptions response;
  CacheOptions cache;
  int64_t priority = 0;  // a later stage unless 0
  // The answer is sent while it is made: its outbox is bounded by --outbox-bytes. Else the door
  // folds items as they come and there is no reader to be slow.
  bool streamed = true;
  // Of the client (X-Request-Timeout, gRPC deadline); the service applies --max-request-seconds
  // too.
  std::optional<std::chrono::steady_clock::time_point> deadline;
};

}  // namespace kvarn
