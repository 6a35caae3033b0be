// Filters over lists and dicts.
#include <algorithm>
#include <array>
#include <cmath>

#include <fmt/format.h>

#include "server/jinja/error.h"
#include "server/jinja/filter_support.h"
#include "server/jinja/text.h"

namespace kvarn::jinja {
namespace {

// What sort, unique, min and max compare: letters without case unless asked.
Value sort_key(Interpreter& interpreter, const Value& item, const std::optional<Value>& attribute,
               bool case_sensitive) {
  const Value value =
      attribute && !attribute->is_none() ? attribute_of(interpreter, item, *attribute) : item;
  const std::string* text = value.as_string();
  return text && !case_sensitive ? Value::string(to_lower(*text)) : value;
}

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

constexpr Filter kFilters[] = {
    {"attr", filter_attr},
    {"batch", filter_batch},
    {"count", filter_length},
    {"d", filter_default},
    {"default", filter_default},
    {"dictsort", filter_dictsort},
    {"first", filter_first},
    {"items", filter_items},
    {"last", filter_last},
    {"length", filter_length},
    {"list", filter_list},
    {"map", filter_map},
    {"max", filter_max},
    {"min", filter_min},
    {"reject", filter_reject},
    {"rejectattr", filter_rejectattr},
    {"reverse", filter_reverse},
    {"select", filter_select},
    {"selectattr", filter_selectattr},
    {"sort", filter_sort},
    {"sum", filter_sum},
    {"unique", filter_unique},
};

}  // namespace

std::span<const Filter> sequence_filters() { return kFilters; }

}  // namespace kvarn::jinja
