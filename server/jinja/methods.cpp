// The methods of str, list, tuple and dict that templates call.
#include <algorithm>
#include <array>

#include <fmt/format.h>

#include "server/jinja/error.h"
#include "server/jinja/interpreter.h"
#include "server/jinja/text.h"

namespace kvarn::jinja {
namespace {

using Bound = std::vector<std::optional<Value>>;

constexpr std::array<std::string_view, 33> kStringMethods = {
    "capitalize",   "center",       "count",   "endswith",   "find",       "format",
    "index",        "isalnum",      "isalpha", "isdigit",    "islower",    "isspace",
    "isupper",      "join",         "ljust",   "lower",      "lstrip",     "partition",
    "removeprefix", "removesuffix", "replace", "rfind",      "rjust",      "rpartition",
    "rsplit",       "rstrip",       "split",   "splitlines", "startswith", "strip",
    "title",        "upper",        "zfill"};
constexpr std::array<std::string_view, 2> kListMethods = {"count", "index"};
constexpr std::array<std::string_view, 5> kDictMethods = {"copy", "get", "items", "keys", "values"};
// They change the value, which the sandbox does not allow.
constexpr std::array<std::string_view, 8> kListMutators = {"append", "clear",  "extend",  "insert",
                                                           "pop",    "remove", "reverse", "sort"};
constexpr std::array<std::string_view, 5> kDictMutators = {"clear", "pop", "popitem", "setdefault",
                                                           "update"};

template <size_t N>
bool is_in(const std::array<std::string_view, N>& names, std::string_view name) {
  return std::find(names.begin(), names.end(), name) != names.end();
}

const std::string& text_argument(std::string_view method, const std::optional<Value>& value) {
  if (!value || !value->as_string()) {
    throw TemplateError(
        fmt::format("{}() needs a string, got {}", method, value ? type_name(*value) : "nothing"));
  }
  return *value->as_string();
}

bool is_absent(const std::optional<Value>& value) { return !value || value->is_none(); }

class StringMethod {
 public:
  StringMethod(Interpreter& interpreter, const std::string& self, std::string_view name,
               const Args& args)
      : interpreter_(interpreter), self_(self), name_(name), args_(args) {}

  Value call() {
    interpreter_.charge(self_.size());
    if (name_ == "startswith" || name_ == "endswith") return affix();
    if (name_ == "strip" || name_ == "lstrip" || name_ == "rstrip") return stripped();
    if (name_ == "split" || name_ == "rsplit") return split_parts();
    if (name_ == "splitlines") {
      const Bound bound = take<1>({"keepends"});
      return strings(split_lines(self_, bound[0] && truthy(*bound[0])));
    }
    if (name_ == "replace") return replaced();
    if (name_ == "find" || name_ == "rfind" || name_ == "index") return found();
    if (name_ == "count") return counted();
    if (name_ == "join") return joined();
    if (name_ == "format") {
      std::string text = format_braces(interpreter_, self_, args_);
      interpreter_.reserve_string(text.size());
      return Value::string(std::move(text));
    }
    if (name_ == "partition" || name_ == "rpartition") return partitioned();
    if (name_ == "removeprefix" || name_ == "removesuffix") return without_affix();
    if (name_ == "ljust" || name_ == "rjust" || name_ == "center") return padded();
    if (name_ == "zfill") return zero_filled();
    take<0>({});
    if (name_ == "upper") return Value::string(to_upper(self_));
    if (name_ == "lower") return Value::string(to_lower(self_));
    if (name_ == "title") return Value::string(to_title(self_));
    if (name_ == "capitalize") return Value::string(to_capitalized(self_));
    return classified();
  }

 private:
  template <size_t N>
  Bound take(const std::array<std::string_view, N>& names) const {
    return bind(name_, args_, std::span<const std::string_view>(names));
  }
  static Value strings(const std::vector<std::string>& texts) {
    std::vector<Value> items;
    for (const std::string& text : texts) items.push_back(Value::string(text));
    return Value::list(std::move(items));
  }
  // The part of the text between the optional bounds of find, count, startswith.
  std::string_view window(const std::optional<Value>& begin, const std::optional<Value>& end,
                          int64_t& offset) {
    offset = 0;
    if (is_absent(begin) && is_absent(end)) return self_;
    const int64_t size = count_chars(self_);
    const auto clip = [size](int64_t bound) {
      return std::clamp<int64_t>(bound < 0 && bound >= -size ? bound + size : bound, 0, size);
    };
    const int64_t first = is_absent(begin) ? 0 : as_integer(*begin, "a bound");
    const int64_t from = clip(first);
    const int64_t to = is_absent(end) ? size : clip(as_integer(*end, "a bound"));
    offset = from;
    outside_ = first > size;
    storage_ = encode(decode(self_).substr(static_cast<size_t>(from),
                                           static_cast<size_t>(std::max<int64_t>(0, to - from))));
    outside_ |= to < from;
    return storage_;
  }

  Value affix() {
    const Bound bound = take<3>({"prefix", "start", "end"});
    int64_t offset = 0;
    const std::string_view text = window(bound[1], bound[2], offset);
    const bool at_start = name_ == "startswith";
    const auto matches = [&](const std::string& part) {
      return !outside_ && (at_start ? text.starts_with(part) : text.ends_with(part));
    };
    const List* list = bound[0] ? bound[0]->as_list() : nullptr;
    if (!list || !list->is_tuple) return Value::boolean(matches(text_argument(name_, bound[0])));
    return Value::boolean(std::any_of(list->items.begin(), list->items.end(), [&](const Value& v) {
      return matches(text_argument(name_, v));
    }));
  }

  Value stripped() const {
    const Bound bound = take<1>({"chars"});
    const Side side = name_ == "strip"    ? Side::kBoth
                      : name_ == "lstrip" ? Side::kLeft
                                          : Side::kRight;
    return Value::string(std::string(is_absent(bound[0])
                                         ? strip(self_, side)
                                         : strip(self_, text_argument(name_, bound[0]), side)));
  }

  Value split_parts() const {
    const Bound bound = take<2>({"sep", "maxsplit"});
    const int64_t limit = bound[1] ? as_integer(*bound[1], "maxsplit") : -1;
    const bool from_right = name_ == "rsplit";
    if (is_absent(bound[0])) return strings(split_space(self_, limit, from_right));
    const std::string& separator = text_argument(name_, bound[0]);
    if (separator.empty())
      throw TemplateError(fmt::format("{}() needs a separator that is not empty", name_));
    return strings(split(self_, separator, limit, from_right));
  }

  Value replaced() const {
    const Bound bound = take<3>({"old", "new", "count"});
    const std::string &from = text_argument(name_, bound[0]), &to = text_argument(name_, bound[1]);
    const int64_t limit = bound[2] ? as_integer(*bound[2], "count") : -1;
    // At most as many as fit, each at most this much longer: refused before it is made.
    const size_t most = from.empty() ? self_.size() + 1 : self_.size() / from.size();
    const size_t grown = to.size() > from.size() ? to.size() - from.size() : 0;
    if (grown > 0 && most > kMaxStringBytes / grown) {
      const auto occurrences =
          static_cast<size_t>(from.empty() ? count_chars(self_) + 1 : occurrences_of(self_, from));
      if (occurrences > kMaxStringBytes / grown) interpreter_.reserve_string(kMaxStringBytes + 1);
    }
    std::string text = replace(self_, from, to, limit);
    interpreter_.reserve_string(text.size());
    return Value::string(std::move(text));
  }

  static int64_t occurrences_of(std::string_view text, std::string_view part) {
    int64_t count = 0;
    for (size_t at = text.find(part); at != text.npos; at = text.find(part, at + part.size()))
      ++count;
    return count;
  }

  Value found() {
    const Bound bound = take<3>({"sub", "start", "end"});
    const std::string& part = text_argument(name_, bound[0]);
    int64_t offset = 0;
    const std::string_view text = window(bound[1], bound[2], offset);
    const size_t at = outside_ ? text.npos : name_ == "rfind" ? text.rfind(part) : text.find(part);
    if (at == text.npos) {
      if (name_ == "index") throw TemplateError("index(): the substring is not found");
      return Value::integer(-1);
    }
    return Value::integer(offset + count_chars(text.substr(0, at)));
  }

  Value counted() {
    const Bound bound = take<3>({"sub", "start", "end"});
    const std::string& part = text_argument(name_, bound[0]);
    int64_t offset = 0;
    const std::string_view text = window(bound[1], bound[2], offset);
    if (outside_) return Value::integer(0);
    return Value::integer(part.empty() ? count_chars(text) + 1 : occurrences_of(text, part));
  }

  Value joined() {
    const Bound bound = take<1>({"iterable"});
    if (!bound[0]) throw TemplateError("join() needs a list");
    std::string out;
    bool is_first = true;
    for (const Value& item : iterate(*bound[0])) {
      const std::string& text = text_argument(name_, item);
      interpreter_.charge(text.size() + self_.size());
      if (out.size() + text.size() + self_.size() > kMaxStringBytes) {
        interpreter_.reserve_string(kMaxStringBytes + 1);
      }
      if (!is_first) out += self_;
      is_first = false;
      out += text;
    }
    return Value::string(std::move(out));
  }

  Value partitioned() const {
    const Bound bound = take<1>({"sep"});
    const std::string& separator = text_argument(name_, bound[0]);
    if (separator.empty())
      throw TemplateError(fmt::format("{}() needs a separator that is not empty", name_));
    const bool from_right = name_ == "rpartition";
    const size_t at = from_right ? self_.rfind(separator) : self_.find(separator);
    std::array<std::string, 3> parts;
    if (at == self_.npos) {
      parts[from_right ? 2 : 0] = self_;
    } else {
      parts = {self_.substr(0, at), separator, self_.substr(at + separator.size())};
    }
    return Value::list({Value::string(parts[0]), Value::string(parts[1]), Value::string(parts[2])},
                       true);
  }

  Value without_affix() const {
    const Bound bound = take<1>({"affix"});
    const std::string& affix_text = text_argument(name_, bound[0]);
    std::string_view text = self_;
    if (name_ == "removeprefix" && text.starts_with(affix_text)) {
      text.remove_prefix(affix_text.size());
    } else if (name_ == "removesuffix" && text.ends_with(affix_text)) {
      text.remove_suffix(affix_text.size());
    }
    return Value::string(std::string(text));
  }

  Value padded() {
    const Bound bound = take<2>({"width", "fillchar"});
    if (!bound[0]) throw TemplateError(fmt::format("{}() needs a width", name_));
    const std::string fill = bound[1] ? text_argument(name_, bound[1]) : " ";
    if (count_chars(fill) != 1)
      throw TemplateError(fmt::format("{}()'s fill must be one character", name_));
    const int64_t width = as_integer(*bound[0], "the width"), size = count_chars(self_);
    const int64_t missing = std::max<int64_t>(0, width - size);
    if (missing > static_cast<int64_t>(kMaxStringBytes))
      interpreter_.reserve_string(kMaxStringBytes + 1);
    interpreter_.reserve_string(static_cast<size_t>(missing) * fill.size() + self_.size());
    int64_t left = name_ == "rjust" ? missing : 0;
    // Python puts the odd one to the left if the width is odd, too.
    if (name_ == "center") left = missing / 2 + (missing & width & 1);
    std::string out;
    for (int64_t i = 0; i < left; ++i) out += fill;
    out += self_;
    for (int64_t i = left; i < missing; ++i) out += fill;
    return Value::string(std::move(out));
  }

  Value zero_filled() {
    const Bound bound = take<1>({"width"});
    if (!bound[0]) throw TemplateError("zfill() needs a width");
    const int64_t missing = as_integer(*bound[0], "the width") - count_chars(self_);
    if (missing <= 0) return Value::string(self_);
    interpreter_.reserve_string(static_cast<size_t>(missing));
    const size_t sign = self_.starts_with('-') || self_.starts_with('+') ? 1 : 0;
    return Value::string(self_.substr(0, sign) + std::string(static_cast<size_t>(missing), '0') +
                         self_.substr(sign));
  }

  Value classified() const {
    const std::u32string chars = decode(self_);
    const auto all = [&chars](auto predicate) {
      return Value::boolean(!chars.empty() && std::all_of(chars.begin(), chars.end(), predicate));
    };
    if (name_ == "isspace") return all(is_space);
    if (name_ == "isdigit") return all(is_digit);
    if (name_ == "isalpha") return all(is_alpha);
    if (name_ == "isalnum") return all([](char32_t c) { return is_alpha(c) || is_digit(c); });
    const bool upper = name_ == "isupper";
    const bool any = std::any_of(chars.begin(), chars.end(), upper ? is_upper : is_lower);
    return Value::boolean(any &&
                          std::none_of(chars.begin(), chars.end(), upper ? is_lower : is_upper));
  }

  Interpreter& interpreter_;
  const std::string& self_;
  std::string_view name_;
  const Args& args_;
  std::string storage_;   // of window()
  bool outside_ = false;  // window() lies behind the text or ends before it begins
};

Value call_dict_method(const Value& self, std::string_view name, const Args& args) {
  const Dict& dict = *self.as_dict();
  if (name == "get") {
    constexpr std::array<std::string_view, 2> kNames = {"key", "default"};
    const Bound bound = bind(name, args, std::span<const std::string_view>(kNames));
    if (!bound[0]) throw TemplateError("get() needs a key");
    require_hashable(*bound[0]);
    const std::string* key = bound[0]->as_string();
    const Value* value = key ? dict.find(*key) : nullptr;
    return value ? *value : bound[1].value_or(Value());
  }
  bind(name, args, std::span<const std::string_view>());
  if (name == "copy") return self;  // values never change
  std::vector<Value> items;
  for (const auto& [key, value] : dict.items) {
    if (name == "keys") items.push_back(Value::string(key));
    if (name == "values") items.push_back(value);
    if (name == "items") items.push_back(Value::list({Value::string(key), value}, true));
  }
  return Value::list(std::move(items));
}

Value call_list_method(const List& list, std::string_view name, const Args& args) {
  constexpr std::array<std::string_view, 1> kNames = {"value"};
  const Bound bound = bind(name, args, std::span<const std::string_view>(kNames));
  if (!bound[0]) throw TemplateError(fmt::format("{}() needs a value", name));
  int64_t count = 0;
  for (size_t i = 0; i < list.items.size(); ++i) {
    if (!equals(list.items[i], *bound[0])) continue;
    if (name == "index") return Value::integer(static_cast<int64_t>(i));
    ++count;
  }
  if (name == "index") throw TemplateError("index(): the value is not in the list");
  return Value::integer(count);
}

}  // namespace

bool is_method(const Value& self, std::string_view name) {
  if (self.as_string()) return is_in(kStringMethods, name);
  if (const List* list = self.as_list()) {
    return is_in(kListMethods, name) || (!list->is_tuple && is_in(kListMutators, name));
  }
  return self.as_dict() && (is_in(kDictMethods, name) || is_in(kDictMutators, name));
}

Value call_method(Interpreter& interpreter, const Value& self, std::string_view name,
                  const Args& args) {
  const bool mutates = (self.as_list() && is_in(kListMutators, name)) ||
                       (self.as_dict() && is_in(kDictMutators, name));
  if (mutates) {
    throw TemplateError(
        fmt::format("{}.{}() is not allowed: it would change the value", type_name(self), name));
  }
  Value result;
  if (const std::string* text = self.as_string()) {
    result = StringMethod(interpreter, *text, name, args).call();
  } else if (const List* list = self.as_list()) {
    interpreter.charge(list->items.size() * sizeof(Value));
    result = call_list_method(*list, name, args);
  } else {
    result = call_dict_method(self, name, args);
  }
  if (const List* list = result.as_list()) interpreter.charge(list->items.size() * sizeof(Value));
  return result;
}

}  // namespace kvarn::jinja
