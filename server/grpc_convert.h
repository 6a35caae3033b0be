// kvarn.v1 messages <-> the server's own types. Knows names and types only; ranges, defaults and
// cross-field rules are validate()'s (generation_service). Pure, thread-safe.
#pragma once

#include "inference.pb.h"
#include "kernels/core/status.h"
#include "server/fold.h"
#include "server/generate_output.h"
#include "server/generate_request.h"
#include "server/model_info.h"
#include "server/server_config.h"

namespace kvarn::grpc_convert {

// Errors carry the proto path in param(): a *_json field that is no JSON, a prompt that is missing,
// a number that is not finite, a field of a later stage. Label, trace and deadline are the
// caller's.
Result<GenerateRequest> to_request(const v1::GenerateRequest& proto, int max_json_depth);
Result<ChatPrompt> to_chat(const v1::ChatPrompt& proto, int max_json_depth);

v1::PromptInfo to_proto(const PromptInfo& info);
v1::Usage to_proto(const Usage& usage);
// `num_output_tokens`: of this choice so far, this delta included; goes out with the finish.
v1::SequenceOutput to_proto(const Delta& delta, int64_t num_output_tokens);
v1::SequenceOutput to_proto(int32_t index, const FoldedChoice& choice);

v1::GetModelInfoResponse to_model_info(const ModelInfo& model);

}  // namespace kvarn::grpc_convert
