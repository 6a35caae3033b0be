// The model's own chat template: a Jinja subset, compiled once, rendered per request. Pure;
// thread-safe after load. Subset and semantics: what Hugging Face chat templates use, with
// trim_blocks and lstrip_blocks. An unsupported construct is an error at load that names the line
// and the construct.
#pragma once

#include <memory>
#include <string>
#include <string_view>

#include <nlohmann/json_fwd.hpp>

#include "kernels/core/status.h"

namespace kvarn {

class ChatTemplate {
 public:
  static Result<std::unique_ptr<ChatTemplate>> compile(std::string_view source);
  ~ChatTemplate();

  // `variables` is an object: messages, tools, add_generation_prompt, enable_thinking, ... Member
  // order is kept (it reaches the prompt through tojson). An error (raise_exception, undefined
  // operation, step limit) is kInvalidArgument "template_error" with param "messages", naming line
  // and construct.
  Result<std::string> render(const nlohmann::ordered_json& variables) const;
  std::string_view source() const;

 private:
  class Impl;
  explicit ChatTemplate(std::unique_ptr<Impl> impl);
  std::unique_ptr<Impl> impl_;
};

}  // namespace kvarn
