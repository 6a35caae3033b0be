#include "server/text_api.h"

#include <fmt/format.h>
#include <nlohmann/json.hpp>

#include "engine/tokenizer/detokenizer.h"
#include "server/json_in.h"
#include "server/json_out.h"
#include "server/openai_api.h"
#include "server/param_error.h"

namespace kvarn {
namespace {

using nlohmann::ordered_json;

Status check_body_model(const GenerationService& service, FieldReader& fields) {
  const std::string model = fields.string("model").value_or("");
  KVARN_RETURN_IF_ERROR(fields.status());
  return service.check_model(model, kHttpParams);
}

Result<RenderedPrompt> render(const GenerationService& service, const ordered_json& body) {
  KVARN_ASSIGN_OR_RETURN(const ChatPrompt chat, parse_chat_prompt(body));
  return service.render_chat(chat, kHttpParams);
}

}  // namespace

Result<std::string> answer_tokenize(const GenerationService& service, std::string_view body) {
  KVARN_ASSIGN_OR_RETURN(const ordered_json json,
                         parse_body(body, service.config().max_json_depth));
  FieldReader fields(json, "");
  std::optional<std::string> prompt = fields.string("prompt");
  const std::optional<std::string> content = fields.string("content");
  const bool has_messages = fields.find("messages") != nullptr;
  const bool with_strings = fields.boolean("return_token_strs").value_or(false);
  KVARN_RETURN_IF_ERROR(fields.status());
  if (prompt.has_value() && content.has_value() && *prompt != *content) {
    return conflict_error("prompt", "content");
  }
  if (!prompt.has_value()) prompt = content;
  if (prompt.has_value() && has_messages) return conflict_error("messages", "prompt");
  if (!prompt.has_value() && !has_messages) return missing_error("prompt");
  KVARN_RETURN_IF_ERROR(check_body_model(service, fields));
  std::vector<int32_t> ids;
  if (prompt.has_value()) {
    ids = service.tokenizer().encode(*prompt);
  } else {
    KVARN_ASSIGN_OR_RETURN(RenderedPrompt rendered, render(service, json));
    ids = std::move(rendered.token_ids);
  }
  ordered_json out;
  out["count"] = ids.size();
  out["max_model_len"] = service.model().max_model_len;
  out["tokens"] = ids;
  out["token_strs"] = nullptr;
  if (with_strings) {
    ordered_json& strings = out["token_strs"] = ordered_json::array();
    for (const int32_t id : ids) {
      strings.push_back(sanitize_utf8(service.tokenizer().token_bytes(id)));
    }
  }
  return dump_json(out);
}

Result<std::string> answer_detokenize(const GenerationService& service, std::string_view body) {
  KVARN_ASSIGN_OR_RETURN(const ordered_json json,
                         parse_body(body, service.config().max_json_depth));
  FieldReader fields(json, "");
  const bool has_tokens = fields.array("tokens") != nullptr;
  const std::vector<int64_t> tokens = fields.integers("tokens");
  const bool skip_special = fields.boolean("skip_special_tokens").value_or(false);
  KVARN_RETURN_IF_ERROR(fields.status());
  if (!has_tokens) return missing_error("tokens");
  const int32_t vocab_size = service.model().vocab_size;
  std::vector<int32_t> ids;
  for (size_t i = 0; i < tokens.size(); ++i) {
    if (tokens[i] < 0 || tokens[i] >= vocab_size) {
      return range_error(fmt::format("tokens[{}]", i),
                         fmt::format("a token id in 0..{}", vocab_size - 1),
                         shown_value(tokens[i]));
    }
    ids.push_back(static_cast<int32_t>(tokens[i]));
  }
  KVARN_RETURN_IF_ERROR(check_body_model(service, fields));
  const std::string text = sanitize_utf8(service.tokenizer().decode(ids, skip_special));
  ordered_json out;
  out["prompt"] = text;
  out["content"] = text;
  return dump_json(out);
}

Result<std::string> answer_apply_template(const GenerationService& service, std::string_view body) {
  KVARN_ASSIGN_OR_RETURN(const ordered_json json,
                         parse_body(body, service.config().max_json_depth));
  FieldReader fields(json, "");
  const bool with_ids = fields.boolean("return_token_ids").value_or(false);
  KVARN_RETURN_IF_ERROR(fields.status());
  KVARN_ASSIGN_OR_RETURN(const RenderedPrompt rendered, render(service, json));
  KVARN_RETURN_IF_ERROR(check_body_model(service, fields));
  ordered_json out;
  out["prompt"] = rendered.text;
  out["count"] = rendered.token_ids.size();
  if (with_ids) out["token_ids"] = rendered.token_ids;
  return dump_json(out);
}

}  // namespace kvarn
