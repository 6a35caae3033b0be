// Chat messages and template fields (docs/api.md 3.2): roles' members, content parts, tool calls.
#include <fmt/format.h>
#include <nlohmann/json.hpp>

#include "server/json_in.h"
#include "server/openai_api.h"
#include "server/param_error.h"

namespace kvarn {
namespace {

using nlohmann::ordered_json;

// One element of a content array -> its text.
Result<std::string> part_text(const ordered_json& part, const std::string& path, bool assistant) {
  if (!part.is_object()) return type_error(path, "an object", json_type(part));
  FieldReader fields(part, path + ".");
  const std::optional<std::string> type = fields.string("type");
  KVARN_RETURN_IF_ERROR(fields.status());
  if (!type.has_value()) return missing_error(fields.path("type"));
  const bool refusal = assistant && *type == "refusal";
  if (*type == "image_url" || *type == "input_audio" || *type == "file") {
    return unsupported_error(fields.path("type"), shown_value(std::string_view(*type)),
                             "this server reads text parts only");
  }
  if (*type != "text" && !refusal) {
    return range_error(fields.path("type"), assistant ? "'text' or 'refusal'" : "'text'",
                       shown_value(std::string_view(*type)));
  }
  const char* member = refusal ? "refusal" : "text";
  std::optional<std::string> text = fields.string(member);
  KVARN_RETURN_IF_ERROR(fields.status());
  if (!text.has_value()) return missing_error(fields.path(member));
  return *std::move(text);
}

Result<std::string> content_text(const ordered_json& content, const std::string& path,
                                 bool assistant) {
  if (content.is_string()) return content.get<std::string>();
  if (!content.is_array()) {
    return type_error(path, "a string or an array of text parts", json_type(content));
  }
  std::string joined;
  for (size_t i = 0; i < content.size(); ++i) {
    KVARN_ASSIGN_OR_RETURN(const std::string text,
                           part_text(content[i], fmt::format("{}[{}]", path, i), assistant));
    if (i > 0) joined += '\n';
    joined += text;
  }
  return joined;
}

Result<ToolCallInput> tool_call(const ordered_json& call, const std::string& path) {
  if (!call.is_object()) return type_error(path, "an object", json_type(call));
  FieldReader fields(call, path + ".");
  ToolCallInput out;
  out.id = fields.string("id").value_or("");
  const std::optional<std::string> type = fields.string("type");
  if (type.has_value() && *type != "function") {
    fields.fail(
        range_error(fields.path("type"), "'function'", shown_value(std::string_view(*type))));
  }
  const ordered_json* function = fields.object("function");
  KVARN_RETURN_IF_ERROR(fields.status());
  if (function == nullptr) return missing_error(fields.path("function"));
  FieldReader inner(*function, path + ".function.");
  const std::optional<std::string> name = inner.string("name");
  KVARN_RETURN_IF_ERROR(inner.status());
  if (!name.has_value()) return missing_error(inner.path("name"));
  out.name = *name;
  const ordered_json* arguments = inner.find("arguments");
  if (arguments == nullptr) return missing_error(inner.path("arguments"));
  if (arguments->is_object()) {
    out.arguments_object = std::make_shared<const ordered_json>(*arguments);
  } else if (arguments->is_string()) {
    out.arguments = arguments->get<std::string>();
  } else {
    return type_error(inner.path("arguments"), "a string or an object", json_type(*arguments));
  }
  return out;
}

Result<ChatMessage> message(const ordered_json& json, const std::string& path) {
  if (!json.is_object()) return type_error(path, "an object", json_type(json));
  FieldReader fields(json, path + ".");
  const std::optional<std::string> role = fields.string("role");
  KVARN_RETURN_IF_ERROR(fields.status());
  if (!role.has_value()) return missing_error(fields.path("role"));
  ChatMessage out;
  out.role = *role;
  const bool assistant = *role == "assistant";
  if (const ordered_json* content = fields.find("content")) {
    KVARN_ASSIGN_OR_RETURN(out.content, content_text(*content, fields.path("content"), assistant));
  }
  if (assistant) {
    // Read both, so that a wrong type of either is told; the first wins.
    out.reasoning_content = fields.string("reasoning_content");
    std::optional<std::string> alias = fields.string("reasoning");
    if (!out.reasoning_content.has_value()) out.reasoning_content = std::move(alias);
    if (const ordered_json* calls = fields.array("tool_calls")) {
      for (size_t i = 0; i < calls->size(); ++i) {
        KVARN_ASSIGN_OR_RETURN(
            ToolCallInput call,
            tool_call((*calls)[i], fmt::format("{}[{}]", fields.path("tool_calls"), i)));
        out.tool_calls.push_back(std::move(call));
      }
    }
  }
  if (*role == "tool") out.tool_call_id = fields.string("tool_call_id");
  KVARN_RETURN_IF_ERROR(fields.status());
  return out;
}

// A string, or an object that names a mode or a function: only the mode matters here.
std::optional<std::string> tool_choice(FieldReader& fields) {
  const ordered_json* choice = fields.find("tool_choice");
  if (choice == nullptr) return std::nullopt;
  if (choice->is_string()) return choice->get<std::string>();
  if (choice->is_object()) return "a named function";
  fields.fail(type_error(fields.path("tool_choice"), "a string or an object", json_type(*choice)));
  return std::nullopt;
}

SharedJson shared(const ordered_json* value) {
  return value == nullptr ? nullptr : std::make_shared<const ordered_json>(*value);
}

}  // namespace

Result<ChatPrompt> parse_chat_prompt(const ordered_json& body) {
  FieldReader fields(body, "");
  ChatPrompt chat;
  const ordered_json* messages = fields.array("messages");
  KVARN_RETURN_IF_ERROR(fields.status());
  if (messages == nullptr) return missing_error("messages");
  for (size_t i = 0; i < messages->size(); ++i) {
    KVARN_ASSIGN_OR_RETURN(ChatMessage parsed,
                           message((*messages)[i], fmt::format("messages[{}]", i)));
    chat.messages.push_back(std::move(parsed));
  }
  chat.tools = shared(fields.array("tools"));
  chat.tool_choice = tool_choice(fields);
  chat.parallel_tool_calls = fields.boolean("parallel_tool_calls");
  chat.template_kwargs = shared(fields.object("chat_template_kwargs"));
  chat.enable_thinking = fields.boolean("enable_thinking");
  chat.reasoning_effort = fields.string("reasoning_effort");
  chat.add_generation_prompt = fields.boolean("add_generation_prompt");
  chat.continue_final_message = fields.boolean("continue_final_message");
  KVARN_RETURN_IF_ERROR(fields.status());
  return chat;
}

}  // namespace kvarn
