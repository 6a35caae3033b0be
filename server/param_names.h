// How each door calls the parameters of a GenerateRequest. validate() is one; the path that it
// blames
// (`error.param`, kvarn-error-param) differs between HTTP and gRPC.
#pragma once

namespace kvarn {

struct ParamNames {
  const char* model = "model";
  const char* prompt = "prompt";      // of text
  const char* token_ids = "prompt";   // of a prompt given as ids
  const char* messages = "messages";  // [i].role and so on are appended
  const char* tools = "tools";
  const char* tool_choice = "tool_choice";
  const char* parallel_tool_calls = "parallel_tool_calls";
  const char* reasoning_effort = "reasoning_effort";
  const char* enable_thinking = "enable_thinking";
  const char* template_kwargs = "chat_template_kwargs";
  const char* add_generation_prompt = "add_generation_prompt";
  const char* continue_final_message = "continue_final_message";
  const char* temperature = "temperature";
  const char* top_p = "top_p";
  const char* top_k = "top_k";
  const char* min_p = "min_p";
  const char* repetition_penalty = "repetition_penalty";
  const char* presence_penalty = "presence_penalty";
  const char* frequency_penalty = "frequency_penalty";
  const char* logit_bias = "logit_bias";
  const char* seed = "seed";
  const char* n = "n";
  const char* max_tokens = "max_tokens";
  const char* min_tokens = "min_tokens";
  const char* stop = "stop";
  const char* stop_token_ids = "stop_token_ids";
  const char* thinking_token_budget = "thinking_token_budget";
  const char* text = "text";
  const char* logprobs = "logprobs";
  const char* top_logprobs = "top_logprobs";
  const char* echo = "echo";
  const char* priority = "priority";
  const char* cache_salt = "cache_salt";
  const char* bypass_prefix_cache = "bypass_prefix_cache";
};

// Chat completions (max_completion_tokens where the client used that name) and completions.
inline constexpr ParamNames kHttpParams{};
inline constexpr ParamNames kHttpChatParams = [] {
  ParamNames names;
  names.max_tokens = "max_completion_tokens";
  return names;
}();
inline constexpr ParamNames kHttpCompletionParams = [] {
  ParamNames names;
  names.top_logprobs = "logprobs";  // there one integer is both
  return names;
}();
inline constexpr ParamNames kGrpcParams = [] {
  ParamNames names;
  names.prompt = "text";
  names.token_ids = "token_ids.ids";
  names.messages = "chat.messages";
  names.tools = "chat.tools_json";
  names.tool_choice = "chat.tool_choice";
  names.parallel_tool_calls = "chat.parallel_tool_calls";
  names.reasoning_effort = "chat.reasoning_effort";
  names.enable_thinking = "chat.template_kwargs_json.enable_thinking";
  names.template_kwargs = "chat.template_kwargs_json";
  names.add_generation_prompt = "chat.add_generation_prompt";
  names.continue_final_message = "chat.continue_final_message";
  names.temperature = "sampling.temperature";
  names.top_p = "sampling.top_p";
  names.top_k = "sampling.top_k";
  names.min_p = "sampling.min_p";
  names.repetition_penalty = "sampling.repetition_penalty";
  names.presence_penalty = "sampling.presence_penalty";
  names.frequency_penalty = "sampling.frequency_penalty";
  names.logit_bias = "sampling.logit_bias";
  names.seed = "sampling.seed";
  names.n = "sampling.n";
  names.max_tokens = "stopping.max_tokens";
  names.min_tokens = "stopping.min_tokens";
  names.stop = "stopping.stop";
  names.stop_token_ids = "stopping.stop_token_ids";
  names.thinking_token_budget = "stopping.thinking_token_budget";
  names.text = "response.text";
  names.logprobs = "response.logprobs";
  names.top_logprobs = "response.top_logprobs";
  names.cache_salt = "cache.salt";
  names.bypass_prefix_cache = "cache.bypass_prefix_cache";
  return names;
}();

}  // namespace kvarn
