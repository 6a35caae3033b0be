// /tokenize, /detokenize and /apply-template: JSON in, JSON out, no inference. Thread-safe; runs on
// the caller's thread.
#pragma once

#include <string>
#include <string_view>

#include "kernels/core/status.h"
#include "server/generation_service.h"

namespace kvarn {

Result<std::string> answer_tokenize(const GenerationService& service, std::string_view body);
Result<std::string> answer_detokenize(const GenerationService& service, std::string_view body);
Result<std::string> answer_apply_template(const GenerationService& service, std::string_view body);

}  // namespace kvarn
