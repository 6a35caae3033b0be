// What the filters' files share.
#pragma once

#include <array>
#include <optional>
#include <span>
#include <string_view>
#include <vector>

#include "server/jinja/interpreter.h"

namespace kvarn::jinja {

struct Filter {
  std::string_view name;
  Value (*apply)(Interpreter&, const Value& input, const Args& args);
};
std::span<const Filter> text_filters();
std::span<const Filter> number_filters();
std::span<const Filter> sequence_filters();

using Bound = std::vector<std::optional<Value>>;

template <size_t N>
Bound bind(std::string_view function, const Args& args,
           const std::array<std::string_view, N>& names) {
  return bind(function, args, std::span<const std::string_view>(names));
}
inline void bind_none(std::string_view function, const Args& args) {
  bind(function, args, std::span<const std::string_view>());
}
inline bool flag(const std::optional<Value>& value, bool otherwise) {
  return value ? truthy(*value) : otherwise;
}
inline int64_t integer(const std::optional<Value>& value, const char* what, int64_t otherwise) {
  return value ? as_integer(*value, what) : otherwise;
}
// "a.b.0" or 0, as the filters' `attribute` argument.
Value attribute_of(Interpreter& interpreter, const Value& item, const Value& attribute);

}  // namespace kvarn::jinja
