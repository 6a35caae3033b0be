// value | name(arguments): the filters by name, and how arguments are taken.
#include <algorithm>

#include <fmt/format.h>

#include "server/jinja/error.h"
#include "server/jinja/filter_support.h"
#include "server/jinja/text.h"

namespace kvarn::jinja {

std::vector<std::optional<Value>> bind(std::string_view function, const Args& args,
                                       std::span<const std::string_view> names) {
  std::vector<std::optional<Value>> bound(names.size());
  if (args.positional.size() > names.size()) {
    throw TemplateError(fmt::format("{}() takes at most {} arguments, got {}", function,
                                    names.size(), args.positional.size()));
  }
  for (size_t i = 0; i < args.positional.size(); ++i) bound[i] = args.positional[i];
  for (const auto& [name, value] : args.keyword) {
    const auto it = std::find(names.begin(), names.end(), name);
    if (it == names.end()) {
      throw TemplateError(fmt::format("{}() has no argument '{}'", function, name));
    }
    auto& slot = bound[static_cast<size_t>(it - names.begin())];
    if (slot) throw TemplateError(fmt::format("{}() got argument '{}' twice", function, name));
    slot = value;
  }
  return bound;
}

Value attribute_of(Interpreter& interpreter, const Value& item, const Value& attribute) {
  const std::string* path = attribute.as_string();
  if (!path) return interpreter.get_item(item, attribute);
  Value value = item;
  for (const std::string& part : split(*path, ".", -1, false)) {
    const bool is_index =
        !part.empty() && part.size() < 10 && part.find_first_not_of("0123456789") == part.npos;
    value = interpreter.get_item(value,
                                 is_index ? Value::integer(std::stoll(part)) : Value::string(part));
  }
  return value;
}

namespace {

const Filter* find_filter(std::string_view name) {
  for (const std::span<const Filter> filters :
       {text_filters(), number_filters(), sequence_filters()}) {
    const auto it = std::find_if(filters.begin(), filters.end(),
                                 [name](const Filter& filter) { return filter.name == name; });
    if (it != filters.end()) return &*it;
  }
  return nullptr;
}

}  // namespace

bool is_filter(std::string_view name) { return find_filter(name) != nullptr; }

Value apply_filter(Interpreter& interpreter, std::string_view name, const Value& input,
                   const Args& args) {
  const Filter* filter = find_filter(name);
  if (!filter) throw TemplateError(fmt::format("filter '{}' is not supported", name));
  return filter->apply(interpreter, input, args);
}

}  // namespace kvarn::jinja
