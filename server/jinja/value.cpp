#include "server/jinja/value.h"

#include <algorithm>
#include <charconv>
#include <cmath>
#include <limits>

#include <fmt/format.h>

#include "engine/tokenizer/utf8.h"
#include "server/jinja/error.h"
#include "server/jinja/text.h"

namespace kvarn::jinja {

const Value* Dict::find(std::string_view key) const {
  for (const auto& [name, value] : items) {
    if (name == key) return &value;
  }
  return nullptr;
}

void Dict::set(std::string key, Value value) {
  for (auto& [name, old] : items) {
    if (name == key) {
      old = std::move(value);
      return;
    }
  }
  items.emplace_back(std::move(key), std::move(value));
}

namespace {

int depth_above(int depth, const Value& item) {
  if (const List* list = item.as_list()) depth = std::max(depth, list->depth + 1);
  if (const Dict* dict = item.as_dict()) depth = std::max(depth, dict->depth + 1);
  if (depth > kMaxValueDepth) {
    throw TemplateError(fmt::format("lists and dicts are nested deeper than {}", kMaxValueDepth));
  }
  return depth;
}

}  // namespace

Value Value::list(std::vector<Value> items, bool is_tuple) {
  int depth = 1;
  for (const Value& item : items) depth = depth_above(depth, item);
  return Value(Variant(std::make_shared<const List>(List{std::move(items), is_tuple, depth})));
}

Value Value::dict(Dict dict) {
  dict.depth = 1;
  for (const auto& item : dict.items) dict.depth = depth_above(dict.depth, item.second);
  return Value(Variant(std::make_shared<const Dict>(std::move(dict))));
}

const std::string* Value::as_string() const {
  const auto* p = get_if<String>();
  return p ? p->get() : nullptr;
}
const List* Value::as_list() const {
  const auto* p = get_if<std::shared_ptr<const List>>();
  return p ? p->get() : nullptr;
}
const Dict* Value::as_dict() const {
  const auto* p = get_if<std::shared_ptr<const Dict>>();
  return p ? p->get() : nullptr;
}
Namespace* Value::as_namespace() const {
  const auto* p = get_if<std::shared_ptr<Namespace>>();
  return p ? p->get() : nullptr;
}
const Callable* Value::as_callable() const {
  const auto* p = get_if<std::shared_ptr<const Callable>>();
  return p ? p->get() : nullptr;
}
LoopState* Value::as_loop() const {
  const auto* p = get_if<std::shared_ptr<LoopState>>();
  return p ? p->get() : nullptr;
}

const char* type_name(const Value& value) {
  if (value.is_undefined()) return "Undefined";
  if (value.is_none()) return "NoneType";
  if (value.is_bool()) return "bool";
  if (value.is_integer()) return "int";
  if (value.is_real()) return "float";
  if (value.as_string()) return "str";
  if (const List* list = value.as_list()) return list->is_tuple ? "tuple" : "list";
  if (value.as_dict()) return "dict";
  if (value.as_namespace()) return "Namespace";
  if (value.as_loop()) return "LoopContext";
  return "function";
}

bool truthy(const Value& value) {
  if (value.is_undefined() || value.is_none()) return false;
  if (const bool* b = value.get_if<bool>()) return *b;
  if (const int64_t* i = value.get_if<int64_t>()) return *i != 0;
  if (const double* d = value.get_if<double>()) return *d != 0;
  if (const std::string* s = value.as_string()) return !s->empty();
  if (const List* list = value.as_list()) return !list->items.empty();
  if (const Dict* dict = value.as_dict()) return !dict->items.empty();
  return true;
}

double as_double(const Value& value, const char* what) {
  if (const bool* b = value.get_if<bool>()) return *b ? 1 : 0;
  if (const int64_t* i = value.get_if<int64_t>()) return static_cast<double>(*i);
  if (const uint64_t* u = value.get_if<uint64_t>()) return static_cast<double>(*u);
  if (const double* d = value.get_if<double>()) return *d;
  throw TemplateError(fmt::format("{} must be a number, got {}", what, type_name(value)));
}

int64_t as_integer(const Value& value, const char* what) {
  if (const bool* b = value.get_if<bool>()) return *b ? 1 : 0;
  if (const int64_t* i = value.get_if<int64_t>()) return *i;
  throw TemplateError(fmt::format("{} must be an integer, got {}", what, type_name(value)));
}

namespace {

int compare_numbers(const Value& a, const Value& b) {
  if (a.is_real() || b.is_real()) {
    const double x = as_double(a, "operand"), y = as_double(b, "operand");
    return x < y ? -1 : x > y ? 1 : x == y ? 0 : 2;  // 2: not a number
  }
  const uint64_t *u = a.get_if<uint64_t>(), *v = b.get_if<uint64_t>();
  if (u || v) {  // above every int64
    if (u && v) return *u < *v ? -1 : *u > *v;
    return u ? 1 : -1;
  }
  const int64_t x = as_integer(a, "operand"), y = as_integer(b, "operand");
  return x < y ? -1 : x > y;
}

}  // namespace

bool equals(const Value& a, const Value& b) {
  if (a.is_number() && b.is_number()) return compare_numbers(a, b) == 0;
  if (a.is_undefined() || a.is_none()) return a.variant().index() == b.variant().index();
  const std::string *s = a.as_string(), *t = b.as_string();
  if (s && t) return *s == *t;
  const List *l = a.as_list(), *m = b.as_list();
  if (l && m) {
    return l->is_tuple == m->is_tuple &&
           std::equal(l->items.begin(), l->items.end(), m->items.begin(), m->items.end(), equals);
  }
  const Dict *d = a.as_dict(), *e = b.as_dict();
  if (d && e) {
    if (d->items.size() != e->items.size()) return false;
    return std::all_of(d->items.begin(), d->items.end(), [e](const auto& item) {
      const Value* other = e->find(item.first);
      return other && equals(item.second, *other);
    });
  }
  if (a.variant().index() != b.variant().index()) return false;
  return (a.as_namespace() && a.as_namespace() == b.as_namespace()) ||
         (a.as_callable() && a.as_callable() == b.as_callable()) ||
         (a.as_loop() && a.as_loop() == b.as_loop());
}

int compare(const Value& a, const Value& b) {
  if (a.is_number() && b.is_number()) return compare_numbers(a, b);
  const std::string *s = a.as_string(), *t = b.as_string();
  if (s && t) return s->compare(*t) < 0 ? -1 : *s != *t;  // UTF-8 sorts as code points do
  const List *l = a.as_list(), *m = b.as_list();
  if (l && m && l->is_tuple == m->is_tuple) {
    for (size_t i = 0; i < std::min(l->items.size(), m->items.size()); ++i) {
      if (!equals(l->items[i], m->items[i])) return compare(l->items[i], m->items[i]);
    }
    return l->items.size() < m->items.size() ? -1 : l->items.size() > m->items.size();
  }
  for (const Value* value : {&a, &b}) {
    if (const auto* undefined = value->get_if<std::shared_ptr<const Undefined>>()) {
      throw TemplateError((*undefined)->what);
    }
  }
  throw TemplateError(fmt::format("'{}' and '{}' cannot be ordered", type_name(a), type_name(b)));
}

// Python prints the shortest digits that read back as the same float, with an exponent below 1e-4
// and from 1e16 on.
std::string float_text(double value) {
  if (std::isnan(value)) return "nan";
  if (std::isinf(value)) return value < 0 ? "-inf" : "inf";
  char buffer[64];
  const auto end =
      std::to_chars(buffer, buffer + sizeof buffer, value, std::chars_format::scientific).ptr;
  const std::string_view text(buffer, static_cast<size_t>(end - buffer));
  const size_t e = text.find('e');
  int exponent = 0;
  const std::string_view shown = text.substr(e + 1);
  const size_t sign = shown.front() == '+' ? 1 : 0;
  std::from_chars(shown.data() + sign, shown.data() + shown.size(), exponent);
  std::string digits;
  for (const char c : text.substr(0, e)) {
    if (c >= '0' && c <= '9') digits.push_back(c);
  }
  std::string out = std::signbit(value) ? "-" : "";
  const auto num_digits = static_cast<int>(digits.size());
  if (exponent < -4 || exponent >= 16) {
    out += digits[0];
    if (num_digits > 1) out += "." + digits.substr(1);
    return out + fmt::format("e{}{:02d}", exponent < 0 ? '-' : '+', std::abs(exponent));
  }
  if (exponent < 0)
    return out + "0." + std::string(static_cast<size_t>(-exponent - 1), '0') + digits;
  if (num_digits <= exponent + 1) {
    return out + digits + std::string(static_cast<size_t>(exponent + 1 - num_digits), '0') + ".0";
  }
  const auto point = static_cast<size_t>(exponent + 1);
  return out + digits.substr(0, point) + "." + digits.substr(point);
}

namespace {

std::string quoted(const std::string& text) {
  const bool use_double = text.find('\'') != text.npos && text.find('"') == text.npos;
  const char32_t quote = use_double ? '"' : '\'';
  std::string out;
  append_utf8(quote, out);
  for (const char32_t c : decode(text)) {
    if (c == quote || c == '\\') {
      out += '\\';
      append_utf8(c, out);
    } else if (c == '\n') {
      out += "\\n";
    } else if (c == '\r') {
      out += "\\r";
    } else if (c == '\t') {
      out += "\\t";
    } else if (is_printable(c)) {
      append_utf8(c, out);
    } else {
      const auto code = static_cast<uint32_t>(c);
      out += code < 0x100     ? fmt::format("\\x{:02x}", code)
             : code < 0x10000 ? fmt::format("\\u{:04x}", code)
                              : fmt::format("\\U{:08x}", code);
    }
  }
  append_utf8(quote, out);
  return out;
}

}  // namespace

std::string to_repr(const Value& value) {
  if (const std::string* s = value.as_string()) return quoted(*s);
  if (value.is_undefined()) return "Undefined";
  return to_text(value);
}

std::string to_text(const Value& value) {
  if (const std::string* s = value.as_string()) return *s;
  if (value.is_undefined()) return "";
  if (value.is_none()) return "None";
  if (const bool* b = value.get_if<bool>()) return *b ? "True" : "False";
  if (const int64_t* i = value.get_if<int64_t>()) return fmt::format("{}", *i);
  if (const uint64_t* u = value.get_if<uint64_t>()) return fmt::format("{}", *u);
  if (const double* d = value.get_if<double>()) return float_text(*d);
  if (const List* list = value.as_list()) {
    std::string out = list->is_tuple ? "(" : "[";
    for (size_t i = 0; i < list->items.size(); ++i) {
      if (i > 0) out += ", ";
      out += to_repr(list->items[i]);
    }
    if (list->is_tuple && list->items.size() == 1) out += ",";
    return out + (list->is_tuple ? ")" : "]");
  }
  if (const Dict* dict = value.as_dict()) {
    std::string out = "{";
    for (size_t i = 0; i < dict->items.size(); ++i) {
      if (i > 0) out += ", ";
      out += quoted(dict->items[i].first) + ": " + to_repr(dict->items[i].second);
    }
    return out + "}";
  }
  throw TemplateError(fmt::format("a {} cannot be printed", type_name(value)));
}

std::vector<Value> iterate(const Value& value) {
  if (value.is_undefined()) return {};
  if (const List* list = value.as_list()) return list->items;
  std::vector<Value> items;
  if (const std::string* s = value.as_string()) {
    std::string_view rest = *s;
    while (!rest.empty()) {
      const Utf8Step step = utf8_step(rest);
      items.push_back(Value::string(std::string(rest.substr(0, step.length))));
      rest.remove_prefix(step.length);
    }
    return items;
  }
  if (const Dict* dict = value.as_dict()) {
    for (const auto& item : dict->items) items.push_back(Value::string(item.first));
    return items;
  }
  throw TemplateError(fmt::format("'{}' object is not iterable", type_name(value)));
}

void require_hashable(const Value& value) {
  const List* list = value.as_list();
  if (value.as_dict() || (list && !list->is_tuple)) {
    throw TemplateError(fmt::format("a {} cannot be a key", type_name(value)));
  }
  if (list) std::for_each(list->items.begin(), list->items.end(), require_hashable);
}

bool contains(const Value& container, const Value& item) {
  if (const std::string* s = container.as_string()) {
    const std::string* part = item.as_string();
    if (!part) {
      throw TemplateError(
          fmt::format("'in <string>' needs a string on its left, got {}", type_name(item)));
    }
    return s->find(*part) != s->npos;
  }
  if (const Dict* dict = container.as_dict()) {
    require_hashable(item);
    return item.as_string() && dict->find(*item.as_string());
  }
  if (const List* list = container.as_list()) {
    return std::any_of(list->items.begin(), list->items.end(),
                       [&item](const Value& other) { return equals(item, other); });
  }
  if (container.is_undefined()) return false;
  throw TemplateError(
      fmt::format("'in' needs a string, list or dict, got {}", type_name(container)));
}

int64_t length_of(const Value& value) {
  if (const std::string* s = value.as_string()) return count_chars(*s);
  if (const List* list = value.as_list()) return static_cast<int64_t>(list->items.size());
  if (const Dict* dict = value.as_dict()) return static_cast<int64_t>(dict->items.size());
  if (value.is_undefined()) return 0;
  throw TemplateError(fmt::format("object of type '{}' has no length", type_name(value)));
}

}  // namespace kvarn::jinja
