#include "server/model_files.h"

#include <fstream>
#include <optional>
#include <sstream>
#include <string>

#include <fmt/format.h>
#include <nlohmann/json.hpp>

namespace kvarn {
namespace {

using Json = nlohmann::json;

// Nothing where the file does not exist.
Result<std::optional<std::string>> read_if_there(const std::filesystem::path& path) {
  std::error_code error;
  if (!std::filesystem::exists(path, error)) return std::optional<std::string>();
  std::ifstream file(path, std::ios::binary);
  std::ostringstream text;
  if (!file || !(text << file.rdbuf())) {
    return Status::invalid_argument(fmt::format("{} cannot be read", path.string()));
  }
  return std::optional(text.str());
}

Result<std::unique_ptr<ChatTemplate>> compile(const std::string& source,
                                              const std::filesystem::path& origin) {
  Result<std::unique_ptr<ChatTemplate>> compiled = ChatTemplate::compile(source);
  if (compiled.is_ok()) return compiled;
  return Status::invalid_argument(
      fmt::format("{}: chat template: {}", origin.string(), compiled.status().message()));
}

// The template inside tokenizer_config.json; null JSON where it has none.
Result<Json> template_member(const std::string& text, const std::filesystem::path& path) {
  const Json config = Json::parse(text, nullptr, /*allow_exceptions=*/false);
  if (!config.is_object()) {
    return Status::invalid_argument(fmt::format("{} is not a JSON object", path.string()));
  }
  const Json member = config.value("chat_template", Json());
  if (!member.is_array()) return member;
  for (const Json& entry : member) {
    if (entry.is_object() && entry.value("name", Json()) == "default") {
      return entry.value("template", Json());
    }
  }
  return Status::invalid_argument(fmt::format(
      "{}: none of the templates in chat_template is named \"default\"", path.string()));
}

}  // namespace

Result<std::unique_ptr<ChatTemplate>> load_chat_template(const std::filesystem::path& model_dir) {
  const std::filesystem::path jinja = model_dir / "chat_template.jinja";
  KVARN_ASSIGN_OR_RETURN(const std::optional<std::string> own, read_if_there(jinja));
  if (own) return compile(*own, jinja);
  const std::filesystem::path config = model_dir / "tokenizer_config.json";
  KVARN_ASSIGN_OR_RETURN(const std::optional<std::string> text, read_if_there(config));
  if (!text) return std::unique_ptr<ChatTemplate>();
  KVARN_ASSIGN_OR_RETURN(const Json member, template_member(*text, config));
  if (member.is_null()) return std::unique_ptr<ChatTemplate>();
  if (!member.is_string()) {
    return Status::invalid_argument(fmt::format("{}: chat_template must be a string, got {}",
                                                config.string(), member.type_name()));
  }
  return compile(member.get<std::string>(), config);
}

}  // namespace kvarn
