// Ranges and cross-field rules of a GenerateRequest, and the defaults that an unset field takes.
// The one place for both doors; the first failure in the order of the docs' table answers. Pure.
#pragma once

#include <optional>
#include <string>

#include "engine/request.h"
#include "kernels/core/status.h"
#include "server/generate_request.h"
#include "server/model_info.h"
#include "server/server_config.h"

namespace kvarn {

// Everything but the model's name and what needs the prompt's length.
Status validate(const GenerateRequest& request, const ModelInfo& model, const ServerConfig& config);
// The chat part alone: what /tokenize and /apply-template need of it. There add_generation_prompt
// may be false.
Status validate_chat(const ChatPrompt& chat, const ParamNames& names);
// model_not_found, naming what is served; empty is the default model.
Status validate_model(const std::string& name, const ModelInfo& model, const ParamNames& names);

// enable_thinking as given, in chat_template_kwargs, or implied by reasoning_effort; unset: the
// template decides. Call on a validated chat.
std::optional<bool> resolve_enable_thinking(const ChatPrompt& chat);
// Explicit values, else the model's defaults. `seed` is drawn where the client gave none.
SamplingParams resolve_sampling(const GenerateRequest& request, const ModelInfo& model);

// The output limit of a prompt of `prompt_tokens`, or context_length_exceeded at `path`. Also
// checks min_tokens against it.
Result<int32_t> resolve_max_tokens(const GenerateRequest& request, int64_t prompt_tokens,
                                   bool is_chat, const std::string& path, const ModelInfo& model,
                                   const ServerConfig& config);

}  // namespace kvarn
