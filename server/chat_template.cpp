#include "server/chat_template.h"

#include <utility>

#include <fmt/format.h>
#include <nlohmann/json.hpp>

#include "server/jinja/error.h"
#include "server/jinja/interpreter.h"
#include "server/jinja/parser.h"

namespace kvarn {
namespace {

using nlohmann::ordered_json;

constexpr size_t kMaxSourceBytes = size_t{4} << 20;  // real templates have a few KiB

jinja::Value to_value(const ordered_json& json, int depth) {
  using jinja::Value;
  if (depth > jinja::kMaxValueDepth) {
    throw jinja::TemplateError(
        fmt::format("the messages or tools are nested deeper than {}", jinja::kMaxValueDepth));
  }
  switch (json.type()) {
    case ordered_json::value_t::boolean:
      return Value::boolean(json.get<bool>());
    case ordered_json::value_t::number_integer:
      return Value::integer(json.get<int64_t>());
    case ordered_json::value_t::number_unsigned:
      return Value::big(json.get<uint64_t>());
    case ordered_json::value_t::number_float:
      return Value::real(json.get<double>());
    case ordered_json::value_t::string:
      return Value::string(json.get_ref<const std::string&>());
    case ordered_json::value_t::array: {
      std::vector<Value> items;
      items.reserve(json.size());
      for (const ordered_json& item : json) items.push_back(to_value(item, depth + 1));
      return Value::list(std::move(items));
    }
    case ordered_json::value_t::object: {
      jinja::Dict dict;
      dict.items.reserve(json.size());
      for (const auto& [key, item] : json.items()) {
        dict.items.emplace_back(key, to_value(item, depth + 1));
      }
      return Value::dict(std::move(dict));
    }
    default:
      return Value();
  }
}

std::string located(const jinja::TemplateError& error) {
  if (error.line() == 0) return fmt::format("chat template: {}", error.what());
  return fmt::format("chat template, line {}: {}", error.line(), error.what());
}

}  // namespace

class ChatTemplate::Impl {
 public:
  std::string source;
  jinja::Block program;
};

ChatTemplate::ChatTemplate(std::unique_ptr<Impl> impl) : impl_(std::move(impl)) {}
ChatTemplate::~ChatTemplate() = default;

Result<std::unique_ptr<ChatTemplate>> ChatTemplate::compile(std::string_view source) {
  if (source.size() > kMaxSourceBytes) {
    return Status::invalid_argument(fmt::format("chat template: {} bytes, at most {} are supported",
                                                source.size(), kMaxSourceBytes));
  }
  try {
    auto impl = std::make_unique<Impl>();
    impl->source = source;
    impl->program = jinja::parse(source);
    return std::unique_ptr<ChatTemplate>(new ChatTemplate(std::move(impl)));
  } catch (const jinja::TemplateError& error) {
    return Status::invalid_argument(located(error));
  }
}

Result<std::string> ChatTemplate::render(const ordered_json& variables) const {
  try {
    const jinja::Value context = to_value(variables, 0);
    if (!context.as_dict()) return Status::internal("template variables must be an object");
    jinja::Interpreter interpreter(impl_->program, *context.as_dict(), jinja::Limits{});
    return interpreter.render();
  } catch (const jinja::TemplateError& error) {
    return Status(StatusCode::kInvalidArgument, "template_error", located(error), "messages");
  }
}

std::string_view ChatTemplate::source() const { return impl_->source; }

}  // namespace kvarn
