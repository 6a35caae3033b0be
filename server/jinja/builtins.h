// Filters, tests, methods and global functions of the template language.
#pragma once

#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "server/jinja/value.h"

namespace kvarn::jinja {

class Interpreter;

struct Args {
  std::vector<Value> positional;
  std::vector<std::pair<std::string, Value>> keyword;
};

// Arguments by parameter name, in the order of `names`; throws naming `function` if there are too
// many, or one twice, or a name that is not among them.
std::vector<std::optional<Value>> bind(std::string_view function, const Args& args,
                                       std::span<const std::string_view> names);

bool is_filter(std::string_view name);
bool is_test(std::string_view name);
Value apply_filter(Interpreter& interpreter, std::string_view name, const Value& input,
                   const Args& args);
bool apply_test(Interpreter& interpreter, std::string_view name, const Value& input,
                const Args& args);

// Methods of str, list, tuple and dict. Those that would change a value are refused when called.
bool is_method(const Value& self, std::string_view name);
Value call_method(Interpreter& interpreter, const Value& self, std::string_view name,
                  const Args& args);

bool is_global(std::string_view name);
Value call_global(Interpreter& interpreter, std::string_view name, const Args& args);

// "%s is %d" % values, also the filter `format`. With `takes_fewer` values may be left over.
std::string format_percent(const std::string& format, const std::vector<Value>& values,
                           const Dict* named, bool takes_fewer);
// "{} is {name}".format(...)
std::string format_braces(Interpreter& interpreter, const std::string& format, const Args& args);

}  // namespace kvarn::jinja
