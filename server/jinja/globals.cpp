// The global functions: range, namespace, dict, raise_exception, strftime_now.
#include <algorithm>
#include <array>
#include <ctime>

#include <fmt/format.h>

#include "server/jinja/error.h"
#include "server/jinja/interpreter.h"

namespace kvarn::jinja {
namespace {

constexpr int64_t kMaxRange = 100'000;  // as Jinja's sandbox

Value make_range(Interpreter& interpreter, const Args& args) {
  const size_t count = args.positional.size();
  if (count < 1 || count > 3 || !args.keyword.empty()) {
    throw TemplateError("range() takes one to three numbers");
  }
  const auto number = [&](size_t i) {
    return as_integer(args.positional[i], "range()'s argument");
  };
  const int64_t begin = count == 1 ? 0 : number(0), end = number(count == 1 ? 0 : 1);
  const int64_t by = count == 3 ? number(2) : 1;
  if (by == 0) throw TemplateError("range()'s step must not be 0");
  std::vector<Value> items;
  for (int64_t i = begin; by > 0 ? i < end : i > end;) {
    if (static_cast<int64_t>(items.size()) == kMaxRange) {
      throw TemplateError(fmt::format("range() is longer than {}", kMaxRange));
    }
    items.push_back(Value::integer(i));
    if (__builtin_add_overflow(i, by, &i)) break;
  }
  interpreter.charge(items.size() * sizeof(Value));
  return Value::list(std::move(items));
}

Dict collect(std::string_view function, const Args& args) {
  Dict members;
  for (const Value& argument : args.positional) {
    const Dict* dict = argument.as_dict();
    if (!dict) {
      throw TemplateError(
          fmt::format("{}() takes name=value or a dict, got {}", function, type_name(argument)));
    }
    for (const auto& [name, value] : dict->items) members.set(name, value);
  }
  for (const auto& [name, value] : args.keyword) members.set(name, value);
  return members;
}

Value make_namespace(Interpreter& interpreter, const Args& args) {
  return interpreter.make_namespace(collect("namespace", args));
}
Value make_dict(Interpreter&, const Args& args) { return Value::dict(collect("dict", args)); }

Value raise_exception(Interpreter&, const Args& args) {
  const auto bound = bind("raise_exception", args, std::array<std::string_view, 1>{"message"});
  throw TemplateError("the template refuses the messages: " + (bound[0] ? to_text(*bound[0]) : ""));
}

Value strftime_now(Interpreter&, const Args& args) {
  const auto bound = bind("strftime_now", args, std::array<std::string_view, 1>{"format"});
  if (!bound[0] || !bound[0]->as_string()) throw TemplateError("strftime_now() needs a format");
  const std::string format = *bound[0]->as_string();
  if (format.empty()) return Value::string("");
  const std::time_t now = std::time(nullptr);
  std::tm local{};
  localtime_r(&now, &local);
  std::array<char, 1024> buffer{};
  // One character more, so that an empty result is not taken for one that is too long.
  const size_t size = std::strftime(buffer.data(), buffer.size(), (format + "|").c_str(), &local);
  if (size == 0) throw TemplateError("strftime_now()'s result is longer than 1023 bytes");
  return Value::string(std::string(buffer.data(), size - 1));
}

struct Global {
  std::string_view name;
  Value (*call)(Interpreter&, const Args&);
};

constexpr Global kGlobals[] = {
    {"dict", make_dict},   {"namespace", make_namespace},  {"raise_exception", raise_exception},
    {"range", make_range}, {"strftime_now", strftime_now},
};

const Global* find_global(std::string_view name) {
  const auto* it = std::find_if(std::begin(kGlobals), std::end(kGlobals),
                                [name](const Global& global) { return global.name == name; });
  return it == std::end(kGlobals) ? nullptr : it;
}

}  // namespace

bool is_global(std::string_view name) { return find_global(name) != nullptr; }

Value call_global(Interpreter& interpreter, std::string_view name, const Args& args) {
  return find_global(name)->call(interpreter, args);
}

}  // namespace kvarn::jinja
