// The filters: value | name(arguments).
#include <algorithm>
#include <array>
#include <cmath>
#include <cstdio>
#include <cstdlib>

#include <fmt/format.h>

#include "server/jinja/error.h"
#include "server/jinja/interpreter.h"
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

namespace {

using Bound = std::vector<std::optional<Value>>;

template <size_t N>
Bound bind(std::string_view function, const Args& args,
           const std::array<std::string_view, N>& names) {
  return jinja::bind(function, args, std::span<const std::string_view>(names));
}
void bind_none(std::string_view function, const Args& args) {
  jinja::bind(function, args, std::span<const std::string_view>());
}

bool flag(const std::optional<Value>& value, bool otherwise) {
  return value ? truthy(*value) : otherwise;
}
int64_t integer(const std::optional<Value>& value, const char* what, int64_t otherwise) {
  return value ? as_integer(*value, what) : otherwise;
}

// "a.b.0" or 0, as the filters' `attribute` argument.
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

// What sort, unique, min and max compare: letters without case unless asked.
Value sort_key(Interpreter& interpreter, const Value& item, const std::optional<Value>& attribute,
               bool case_sensitive) {
  const Value value =
      attribute && !attribute->is_none() ? attribute_of(interpreter, item, *attribute) : item;
  const std::string* text = value.as_string();
  return text && !case_sensitive ? Value::string(to_lower(*text)) : value;
}

// ---- text

Value filter_upper(Interpreter&, const Value& input, const Args& args) {
  bind_none("upper", args);
  return Value::string(to_upper(to_text(input)));
}
Value filter_lower(Interpreter&, const Value& input, const Args& args) {
  bind_none("lower", args);
  return Value::string(to_lower(to_text(input)));
}
Value filter_capitalize(Interpreter&, const Value& input, const Args& args) {
  bind_none("capitalize", args);
  return Value::string(to_capitalized(to_text(input)));
}

// Unlike str.title(): only behind white space, a dash or a bracket does a word begin.
Value filter_title(Interpreter&, const Value& input, const Args& args) {
  bind_none("title", args);
  std::string out, word;
  const auto finish_word = [&] {
    out += to_capitalized(word);
    word.clear();
  };
  for (const char32_t c : decode(to_text(input))) {
    const std::string one = encode(std::u32string_view(&c, 1));
    if (is_space(c) || std::u32string_view(U"-({[<").find(c) != std::u32string_view::npos) {
      finish_word();
      out += one;
    } else {
      word += one;
    }
  }
  finish_word();
  return Value::string(std::move(out));
}

Value filter_trim(Interpreter&, const Value& input, const Args& args) {
  const Bound bound = bind("trim", args, std::array<std::string_view, 1>{"chars"});
  const std::string text = to_text(input);
  const bool by_space = !bound[0] || bound[0]->is_none();
  return Value::string(std::string(by_space ? strip(text, Side::kBoth)
                                            : strip(text, to_text(*bound[0]), Side::kBoth)));
}

Value filter_replace(Interpreter& interpreter, const Value& input, const Args& args) {
  const Bound bound = bind("replace", args, std::array<std::string_view, 3>{"old", "new", "count"});
  if (!bound[0] || !bound[1]) throw TemplateError("replace() needs 'old' and 'new'");
  Args positional{{*bound[0], *bound[1]}, {}};
  for (Value& text : positional.positional) text = Value::string(to_text(text));
  if (bound[2] && !bound[2]->is_none()) positional.positional.push_back(*bound[2]);
  return call_method(interpreter, Value::string(to_text(input)), "replace", positional);
}

Value filter_indent(Interpreter& interpreter, const Value& input, const Args& args) {
  const Bound bound =
      bind("indent", args, std::array<std::string_view, 3>{"width", "first", "blank"});
  std::string indent(4, ' ');
  if (bound[0] && bound[0]->as_string()) {
    indent = *bound[0]->as_string();
  } else if (bound[0]) {
    const int64_t width = std::max<int64_t>(0, as_integer(*bound[0], "indent's width"));
    interpreter.reserve_string(static_cast<size_t>(width));
    indent.assign(static_cast<size_t>(width), ' ');
  }
  const bool first = flag(bound[1], false), blank = flag(bound[2], false);
  // As Jinja: one newline is added, so that a text that ends with one keeps an empty last line.
  const std::vector<std::string> lines = split_lines(to_text(input) + "\n", false);
  std::string out;
  for (size_t i = 0; i < lines.size(); ++i) {
    if (i > 0) out += '\n';
    const bool indented = i == 0 ? first : blank || !lines[i].empty();
    interpreter.reserve_string(out.size() + indent.size() + lines[i].size());
    if (indented) out += indent;
    out += lines[i];
  }
  return Value::string(std::move(out));
}

Value filter_escape(Interpreter&, const Value& input, const Args& args) {
  bind_none("escape", args);
  std::string out;
  for (const char c : to_text(input)) {
    switch (c) {
      case '&':
        out += "&amp;";
        break;
      case '<':
        out += "&lt;";
        break;
      case '>':
        out += "&gt;";
        break;
      case '\'':
        out += "&#39;";
        break;
      case '"':
        out += "&#34;";
        break;
      default:
        out += c;
    }
  }
  return Value::string(std::move(out));
}

Value filter_string(Interpreter&, const Value& input, const Args& args) {
  bind_none("string", args);
  return Value::string(to_text(input));
}
Value filter_safe(Interpreter&, const Value& input, const Args& args) {
  bind_none("safe", args);  // nothing is escaped anyway
  return Value::string(to_text(input));
}

Value filter_format(Interpreter& interpreter, const Value& input, const Args& args) {
  if (!args.positional.empty() && !args.keyword.empty()) {
    throw TemplateError("format() takes arguments with names or without, not both");
  }
  Dict named;
  for (const auto& [name, value] : args.keyword) named.set(name, value);
  std::string text = format_percent(to_text(input), args.positional,
                                    args.keyword.empty() ? nullptr : &named, !args.keyword.empty());
  interpreter.reserve_string(text.size());
  return Value::string(std::move(text));
}

Value filter_join(Interpreter& interpreter, const Value& input, const Args& args) {
  const Bound bound = bind("join", args, std::array<std::string_view, 2>{"d", "attribute"});
  const std::string between = bound[0] ? to_text(*bound[0]) : "";
  std::string out;
  bool is_first = true;
  for (const Value& item : iterate(input)) {
    const std::string text = to_text(
        bound[1] && !bound[1]->is_none() ? attribute_of(interpreter, item, *bound[1]) : item);
    interpreter.reserve_string(between.size() + text.size());
    if (out.size() + between.size() + text.size() > kMaxStringBytes) {
      interpreter.reserve_string(kMaxStringBytes + 1);
    }
    if (!is_first) out += between;
    is_first = false;
    out += text;
  }
  return Value::string(std::move(out));
}

Value filter_tojson(Interpreter& interpreter, const Value& input, const Args& args) {
  const Bound bound =
      bind("tojson", args,
           std::array<std::string_view, 4>{"ensure_ascii", "indent", "separators", "sort_keys"});
  JsonStyle style;
  style.ensure_ascii = flag(bound[0], false);
  style.sort_keys = flag(bound[3], false);
  if (bound[1] && !bound[1]->is_none()) {
    style.pretty = true;
    style.item_separator.pop_back();  // ", " to ","
    constexpr int64_t kMaxIndent = 64;
    if (const std::string* text = bound[1]->as_string()) {
      style.indent = *text;
    } else {
      style.indent.assign(static_cast<size_t>(std::clamp<int64_t>(as_integer(*bound[1], "indent"),
                                                                  0, kMaxIndent + 1)),
                          ' ');
    }
    if (style.indent.size() > kMaxIndent) {
      throw TemplateError(fmt::format("tojson's indent must be at most {}", kMaxIndent));
    }
  }
  if (bound[2] && !bound[2]->is_none()) {
    const std::vector<Value> separators = iterate(*bound[2]);
    if (separators.size() != 2 || !separators[0].as_string() || !separators[1].as_string()) {
      throw TemplateError("tojson's separators must be two strings");
    }
    style.item_separator = *separators[0].as_string();
    style.key_separator = *separators[1].as_string();
  }
  std::string text = to_json(input, style);
  interpreter.reserve_string(text.size());
  return Value::string(std::move(text));
}

// ---- numbers

Value filter_abs(Interpreter& interpreter, const Value& input, const Args& args) {
  bind_none("abs", args);
  if (input.is_real()) return Value::real(std::abs(as_double(input, "abs()'s input")));
  const int64_t value = as_integer(input, "abs()'s input");
  return value < 0 ? arithmetic(interpreter, BinaryOp::kSub, Value::integer(0), input)
                   : Value::integer(value);
}

// A whole number in text, as int() reads it: white space around, a sign, underscores between
// digits.
std::optional<int64_t> parse_integer(std::string_view text, int64_t base) {
  text = strip(text, Side::kBoth);
  std::string digits;
  bool negative = false, after_digit = false;
  if (!text.empty() && (text.front() == '-' || text.front() == '+')) {
    negative = text.front() == '-';
    text.remove_prefix(1);
  }
  if ((base == 16 || base == 8 || base == 2) && text.size() > 2 && text.front() == '0') {
    const char mark = static_cast<char>(text[1] | 0x20);
    if (mark == (base == 16 ? 'x' : base == 8 ? 'o' : 'b')) text.remove_prefix(2);
  }
  for (const char c : text) {
    if (c == '_' && after_digit) {
      after_digit = false;
      continue;
    }
    if (std::isalnum(static_cast<unsigned char>(c)) == 0) return std::nullopt;
    digits += c;
    after_digit = true;
  }
  if (digits.empty() || !after_digit) return std::nullopt;
  errno = 0;
  char* end = nullptr;
  if (negative) digits.insert(digits.begin(), '-');
  const long long value = std::strtoll(digits.c_str(), &end, static_cast<int>(base));
  if (*end != '\0') return std::nullopt;
  if (errno == ERANGE) throw TemplateError("int() gives a number that does not fit into 64 bits");
  return value;
}

std::optional<double> parse_double(std::string_view text) {
  const std::string trimmed(strip(text, Side::kBoth));
  if (trimmed.empty()) return std::nullopt;
  const bool is_hex = trimmed.find_first_of("xX") != trimmed.npos;
  const bool is_nan_with_payload = trimmed.find('(') != trimmed.npos;
  if (is_hex || is_nan_with_payload) return std::nullopt;
  char* end = nullptr;
  const double value = std::strtod(trimmed.c_str(), &end);
  if (end != trimmed.c_str() + trimmed.size()) return std::nullopt;
  return value;
}

std::optional<int64_t> truncated(double value) {
  if (!std::isfinite(value)) return std::nullopt;
  if (std::abs(value) >= 0x1p63)
    throw TemplateError("int() gives a number that does not fit into 64 bits");
  return static_cast<int64_t>(value);
}

void refuse_undefined(const Value& value) {
  if (const auto* undefined = value.get_if<std::shared_ptr<const Undefined>>()) {
    throw TemplateError((*undefined)->what);
  }
}

Value filter_int(Interpreter&, const Value& input, const Args& args) {
  const Bound bound = bind("int", args, std::array<std::string_view, 2>{"default", "base"});
  refuse_undefined(input);
  const Value otherwise = bound[0].value_or(Value::integer(0));
  const int64_t base = integer(bound[1], "int()'s base", 10);
  if (base < 2 || base > 36) throw TemplateError("int()'s base must be from 2 to 36");
  if (input.is_integer()) return input;
  if (input.is_bool()) return Value::integer(as_integer(input, "int()'s input"));
  std::optional<int64_t> value;
  if (input.is_real()) {
    value = truncated(as_double(input, "int()'s input"));
  } else if (const std::string* text = input.as_string()) {
    value = parse_integer(*text, base);
    if (!value) {
      if (const std::optional<double> real = parse_double(*text)) value = truncated(*real);
    }
  }
  return value ? Value::integer(*value) : otherwise;
}

Value filter_float(Interpreter&, const Value& input, const Args& args) {
  const Bound bound = bind("float", args, std::array<std::string_view, 1>{"default"});
  refuse_undefined(input);
  if (input.is_number()) return Value::real(as_double(input, "float()'s input"));
  if (const std::string* text = input.as_string()) {
    if (const std::optional<double> value = parse_double(*text)) return Value::real(*value);
  }
  return bound[0].value_or(Value::real(0));
}

Value filter_round(Interpreter&, const Value& input, const Args& args) {
  const Bound bound = bind("round", args, std::array<std::string_view, 2>{"precision", "method"});
  const int64_t precision = integer(bound[0], "round()'s precision", 0);
  const std::string method = bound[1] ? to_text(*bound[1]) : "common";
  if (method != "common" && method != "ceil" && method != "floor") {
    throw TemplateError("round()'s method must be common, ceil or floor");
  }
  if (precision < -300 || precision > 300) {
    throw TemplateError("round()'s precision must be from -300 to 300");
  }
  const double value = as_double(input, "round()'s input");
  const double power = std::pow(10.0, static_cast<double>(precision));
  if (method != "common") {
    const double scaled = value * power;
    return Value::real((method == "ceil" ? std::ceil(scaled) : std::floor(scaled)) / power);
  }
  if (!input.is_real() && precision >= 0)
    return Value::integer(as_integer(input, "round()'s input"));
  if (precision < 0) {  // half to even, as Python
    const double rounded = std::nearbyint(value / std::pow(10.0, static_cast<double>(-precision))) *
                           std::pow(10.0, static_cast<double>(-precision));
    return input.is_real() ? Value::real(rounded) : Value::integer(static_cast<int64_t>(rounded));
  }
  if (!std::isfinite(value)) return input;
  // printf rounds the exact binary value, which is what Python's round() does.
  return Value::real(std::strtod(fmt::format("{:.{}f}", value, precision).c_str(), nullptr));
}

// ---- sequences

Value filter_length(Interpreter&, const Value& input, const Args& args) {
  bind_none("length", args);
  return Value::integer(length_of(input));
}

Value filter_default(Interpreter&, const Value& input, const Args& args) {
  const Bound bound =
      bind("default", args, std::array<std::string_view, 2>{"default_value", "boolean"});
  const bool replaced = input.is_undefined() || (flag(bound[1], false) && !truthy(input));
  return replaced ? bound[0].value_or(Value::string("")) : input;
}

Value filter_first(Interpreter&, const Value& input, const Args& args) {
  bind_none("first", args);
  const std::vector<Value> items = iterate(input);
  return items.empty() ? Value::undefined("there is no first item: the sequence is empty")
                       : items.front();
}
Value filter_last(Interpreter&, const Value& input, const Args& args) {
  bind_none("last", args);
  const std::vector<Value> items = iterate(input);
  return items.empty() ? Value::undefined("there is no last item: the sequence is empty")
                       : items.back();
}
Value filter_list(Interpreter&, const Value& input, const Args& args) {
  bind_none("list", args);
  return Value::list(iterate(input));
}

Value pairs_of(const Dict& dict) {
  std::vector<Value> items;
  for (const auto& [key, value] : dict.items) {
    items.push_back(Value::list({Value::string(key), value}, true));
  }
  return Value::list(std::move(items));
}

Value filter_items(Interpreter&, const Value& input, const Args& args) {
  bind_none("items", args);
  if (input.is_undefined()) return Value::list({});
  const Dict* dict = input.as_dict();
  if (!dict) throw TemplateError(fmt::format("items needs a dict, got {}", type_name(input)));
  return pairs_of(*dict);
}

Value filter_reverse(Interpreter&, const Value& input, const Args& args) {
  bind_none("reverse", args);
  if (const std::string* text = input.as_string()) {
    std::u32string chars = decode(*text);
    std::reverse(chars.begin(), chars.end());
    return Value::string(encode(chars));
  }
  std::vector<Value> items = iterate(input);
  std::reverse(items.begin(), items.end());
  return Value::list(std::move(items));
}

// Sorts by keys; the order of equal ones stays.
std::vector<Value> sorted(Interpreter& interpreter, std::vector<Value> items,
                          const std::vector<Value>& keys, bool reverse) {
  std::vector<size_t> order(items.size());
  for (size_t i = 0; i < order.size(); ++i) order[i] = i;
  // The comparison may throw, and must be an order even for floats that are not numbers.
  for (const Value& key : keys) {
    interpreter.charge(64);
    for (const Value& part : key.as_list() ? key.as_list()->items : std::vector<Value>{key}) {
      if (part.is_real() && std::isnan(as_double(part, "key"))) {
        throw TemplateError("nan cannot be sorted");
      }
    }
  }
  std::stable_sort(order.begin(), order.end(), [&](size_t a, size_t b) {
    return reverse ? compare(keys[b], keys[a]) < 0 : compare(keys[a], keys[b]) < 0;
  });
  std::vector<Value> out;
  for (const size_t i : order) out.push_back(items[i]);
  return out;
}

Value filter_sort(Interpreter& interpreter, const Value& input, const Args& args) {
  const Bound bound =
      bind("sort", args, std::array<std::string_view, 3>{"reverse", "case_sensitive", "attribute"});
  std::vector<Value> items = iterate(input);
  std::vector<Value> keys;
  // "a,b" sorts by a, then by b.
  std::vector<std::string> attributes;
  if (bound[2] && bound[2]->as_string()) attributes = split(*bound[2]->as_string(), ",", -1, false);
  for (const Value& item : items) {
    // A list even for one key, as in Jinja: lists of equal items need not have an order.
    std::vector<Value> parts;
    if (attributes.empty())
      parts.push_back(sort_key(interpreter, item, bound[2], flag(bound[1], false)));
    for (const std::string& attribute : attributes) {
      parts.push_back(sort_key(interpreter, item, Value::string(attribute), flag(bound[1], false)));
    }
    keys.push_back(Value::list(std::move(parts)));
  }
  return Value::list(sorted(interpreter, std::move(items), keys, flag(bound[0], false)));
}

Value filter_dictsort(Interpreter& interpreter, const Value& input, const Args& args) {
  const Bound bound =
      bind("dictsort", args, std::array<std::string_view, 3>{"case_sensitive", "by", "reverse"});
  const Dict* dict = input.as_dict();
  if (!dict) throw TemplateError(fmt::format("dictsort needs a dict, got {}", type_name(input)));
  const std::string by = bound[1] ? to_text(*bound[1]) : "key";
  if (by != "key" && by != "value") throw TemplateError("dictsort's by must be key or value");
  std::vector<Value> keys;
  for (const auto& [key, value] : dict->items) {
    keys.push_back(sort_key(interpreter, by == "key" ? Value::string(key) : value, std::nullopt,
                            flag(bound[0], false)));
  }
  return Value::list(
      sorted(interpreter, pairs_of(*dict).as_list()->items, keys, flag(bound[2], false)));
}

Value filter_unique(Interpreter& interpreter, const Value& input, const Args& args) {
  const Bound bound =
      bind("unique", args, std::array<std::string_view, 2>{"case_sensitive", "attribute"});
  std::vector<Value> kept, seen;
  for (const Value& item : iterate(input)) {
    const Value key = sort_key(interpreter, item, bound[1], flag(bound[0], false));
    require_hashable(key);
    interpreter.charge(seen.size() * sizeof(Value));
    if (std::any_of(seen.begin(), seen.end(), [&key](const Value& v) { return equals(v, key); })) {
      continue;
    }
    seen.push_back(key);
    kept.push_back(item);
  }
  return Value::list(std::move(kept));
}

Value extreme(Interpreter& interpreter, std::string_view name, const Value& input, const Args& args,
              int sign) {
  const Bound bound =
      bind(name, args, std::array<std::string_view, 2>{"case_sensitive", "attribute"});
  std::optional<Value> best, best_key;
  for (const Value& item : iterate(input)) {
    Value key = sort_key(interpreter, item, bound[1], flag(bound[0], false));
    if (best_key && compare(key, *best_key) * sign <= 0) continue;
    best = item;
    best_key = std::move(key);
  }
  return best.value_or(Value::undefined("there is no item: the sequence is empty"));
}
Value filter_max(Interpreter& interpreter, const Value& input, const Args& args) {
  return extreme(interpreter, "max", input, args, 1);
}
Value filter_min(Interpreter& interpreter, const Value& input, const Args& args) {
  return extreme(interpreter, "min", input, args, -1);
}

Value filter_sum(Interpreter& interpreter, const Value& input, const Args& args) {
  const Bound bound = bind("sum", args, std::array<std::string_view, 2>{"attribute", "start"});
  Value total = bound[1].value_or(Value::integer(0));
  for (const Value& item : iterate(input)) {
    const bool by_attribute = bound[0] && !bound[0]->is_none();
    total = arithmetic(interpreter, BinaryOp::kAdd, total,
                       by_attribute ? attribute_of(interpreter, item, *bound[0]) : item);
  }
  return total;
}

Value filter_batch(Interpreter& interpreter, const Value& input, const Args& args) {
  const Bound bound =
      bind("batch", args, std::array<std::string_view, 2>{"linecount", "fill_with"});
  const int64_t size = integer(bound[0], "batch()'s line count", 0);
  if (size < 1) throw TemplateError("batch()'s line count must be at least 1");
  std::vector<Value> rows, row;
  for (const Value& item : iterate(input)) {
    row.push_back(item);
    if (static_cast<int64_t>(row.size()) == size)
      rows.push_back(Value::list(std::exchange(row, {})));
  }
  if (!row.empty()) {
    while (bound[1] && !bound[1]->is_none() && static_cast<int64_t>(row.size()) < size) {
      interpreter.charge(sizeof(Value));
      row.push_back(*bound[1]);
    }
    rows.push_back(Value::list(std::move(row)));
  }
  return Value::list(std::move(rows));
}

Value filter_attr(Interpreter& interpreter, const Value& input, const Args& args) {
  const Bound bound = bind("attr", args, std::array<std::string_view, 1>{"name"});
  if (!bound[0]) throw TemplateError("attr() needs a name");
  // Attributes only, never members.
  if (input.as_dict() && !is_method(input, to_text(*bound[0]))) {
    return Value::undefined(fmt::format("'dict object' has no attribute '{}'", to_text(*bound[0])));
  }
  return interpreter.get_attribute(input, to_text(*bound[0]));
}

// ---- filters over filters and tests

std::pair<std::string, Args> named_function(std::string_view filter, const Args& args,
                                            size_t skip) {
  if (args.positional.size() <= skip || !args.positional[skip].as_string()) {
    throw TemplateError(fmt::format("{}() needs the name of a filter or test", filter));
  }
  Args rest{{args.positional.begin() + static_cast<ptrdiff_t>(skip) + 1, args.positional.end()},
            args.keyword};
  return {*args.positional[skip].as_string(), std::move(rest)};
}

// map, select and reject take anything false for an empty list.
Value filter_map(Interpreter& interpreter, const Value& input, const Args& args) {
  if (!truthy(input)) return Value::list({});
  std::vector<Value> out;
  if (args.positional.empty() && !args.keyword.empty()) {
    const Bound bound = bind("map", args, std::array<std::string_view, 2>{"attribute", "default"});
    if (!bound[0]) throw TemplateError("map() needs the name of a filter or attribute=");
    for (const Value& item : iterate(input)) {
      interpreter.charge(sizeof(Value));
      Value value = attribute_of(interpreter, item, *bound[0]);
      if (value.is_undefined() && bound[1]) value = *bound[1];
      out.push_back(std::move(value));
    }
    return Value::list(std::move(out));
  }
  const auto [name, rest] = named_function("map", args, 0);
  if (!is_filter(name)) throw TemplateError(fmt::format("filter '{}' is not supported", name));
  for (const Value& item : iterate(input)) {
    interpreter.charge(sizeof(Value));
    out.push_back(apply_filter(interpreter, name, item, rest));
  }
  return Value::list(std::move(out));
}

Value select(Interpreter& interpreter, std::string_view filter, const Value& input,
             const Args& args, bool by_attribute, bool wanted) {
  if (!truthy(input)) return Value::list({});
  const size_t skip = by_attribute ? 1 : 0;
  if (by_attribute && args.positional.empty()) {
    throw TemplateError(fmt::format("{}() needs an attribute's name", filter));
  }
  const bool has_test = args.positional.size() > skip;
  std::pair<std::string, Args> test;
  if (has_test) {
    test = named_function(filter, args, skip);
    if (!is_test(test.first)) {
      throw TemplateError(fmt::format("test '{}' is not supported", test.first));
    }
  }
  std::vector<Value> out;
  for (const Value& item : iterate(input)) {
    interpreter.charge(sizeof(Value));
    const Value value = by_attribute ? attribute_of(interpreter, item, args.positional[0]) : item;
    const bool holds =
        has_test ? apply_test(interpreter, test.first, value, test.second) : truthy(value);
    if (holds == wanted) out.push_back(item);
  }
  return Value::list(std::move(out));
}
Value filter_select(Interpreter& interpreter, const Value& input, const Args& args) {
  return select(interpreter, "select", input, args, false, true);
}
Value filter_reject(Interpreter& interpreter, const Value& input, const Args& args) {
  return select(interpreter, "reject", input, args, false, false);
}
Value filter_selectattr(Interpreter& interpreter, const Value& input, const Args& args) {
  return select(interpreter, "selectattr", input, args, true, true);
}
Value filter_rejectattr(Interpreter& interpreter, const Value& input, const Args& args) {
  return select(interpreter, "rejectattr", input, args, true, false);
}

struct Filter {
  std::string_view name;
  Value (*apply)(Interpreter&, const Value&, const Args&);
};

constexpr Filter kFilters[] = {
    {"abs", filter_abs},         {"attr", filter_attr},
    {"batch", filter_batch},     {"capitalize", filter_capitalize},
    {"count", filter_length},    {"d", filter_default},
    {"default", filter_default}, {"dictsort", filter_dictsort},
    {"e", filter_escape},        {"escape", filter_escape},
    {"first", filter_first},     {"float", filter_float},
    {"format", filter_format},   {"indent", filter_indent},
    {"int", filter_int},         {"items", filter_items},
    {"join", filter_join},       {"last", filter_last},
    {"length", filter_length},   {"list", filter_list},
    {"lower", filter_lower},     {"map", filter_map},
    {"max", filter_max},         {"min", filter_min},
    {"reject", filter_reject},   {"rejectattr", filter_rejectattr},
    {"replace", filter_replace}, {"reverse", filter_reverse},
    {"round", filter_round},     {"safe", filter_safe},
    {"select", filter_select},   {"selectattr", filter_selectattr},
    {"sort", filter_sort},       {"string", filter_string},
    {"sum", filter_sum},         {"title", filter_title},
    {"tojson", filter_tojson},   {"trim", filter_trim},
    {"unique", filter_unique},   {"upper", filter_upper},
};

const Filter* find_filter(std::string_view name) {
  const auto* it = std::find_if(std::begin(kFilters), std::end(kFilters),
                                [name](const Filter& filter) { return filter.name == name; });
  return it == std::end(kFilters) ? nullptr : it;
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
