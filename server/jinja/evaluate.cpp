// Expressions: operators, names, members, slices.
#include <algorithm>
#include <utility>

#include <fmt/format.h>

#include "server/jinja/error.h"
#include "server/jinja/interpreter.h"
#include "server/jinja/text.h"

namespace kvarn::jinja {

Value Interpreter::evaluate(const Expr& expr, Scope& scope) {
  const Depth depth(*this);
  step(1);
  try {
    return evaluate_checked(expr, scope);
  } catch (const TemplateError& e) {
    if (e.line() != 0) throw;
    throw TemplateError(e.what(), expr.line);
  }
}

Value Interpreter::evaluate_checked(const Expr& expr, Scope& scope) {
  const auto arg = [&](size_t i) { return evaluate(*expr.args[i], scope); };
  switch (expr.kind) {
    case Expr::Kind::kConst:
      return expr.constant;
    case Expr::Kind::kName:
      return evaluate_name(expr.name, scope);
    case Expr::Kind::kTuple:
    case Expr::Kind::kList: {
      std::vector<Value> items;
      for (size_t i = 0; i < expr.args.size(); ++i) items.push_back(arg(i));
      return Value::list(std::move(items), expr.kind == Expr::Kind::kTuple);
    }
    case Expr::Kind::kDict:
      return evaluate_dict(expr, scope);
    case Expr::Kind::kAttribute:
      return get_attribute(arg(0), expr.name);
    case Expr::Kind::kItem: {
      const Value object = arg(0);
      return get_item(object, arg(1));
    }
    case Expr::Kind::kSlice:
      return evaluate_slice(expr, scope);
    case Expr::Kind::kCall:
      return evaluate_call(expr, scope);
    case Expr::Kind::kFilter:
      return evaluate_filter(expr, Value(), scope);
    case Expr::Kind::kTest: {
      const Value input = arg(0);
      return Value::boolean(
          apply_test(*this, expr.name, input, evaluate_arguments(*expr.call, scope)));
    }
    case Expr::Kind::kNot:
      return Value::boolean(!truthy(arg(0)));
    case Expr::Kind::kNegate: {
      const Value value = arg(0);
      if (value.is_real()) return Value::real(-as_double(value, "operand"));
      return arithmetic(*this, BinaryOp::kSub, Value::integer(0), value);
    }
    case Expr::Kind::kPositive:
      return arithmetic(*this, BinaryOp::kAdd, Value::integer(0), arg(0));
    case Expr::Kind::kAnd: {
      Value left = arg(0);
      return truthy(left) ? arg(1) : left;
    }
    case Expr::Kind::kOr: {
      Value left = arg(0);
      return truthy(left) ? left : arg(1);
    }
    case Expr::Kind::kConcat:
      return evaluate_concat(expr, scope);
    case Expr::Kind::kBinary: {
      const Value left = arg(0);
      return arithmetic(*this, expr.binary, left, arg(1));
    }
    case Expr::Kind::kCompare:
      return Value::boolean(evaluate_compare(expr, scope));
    case Expr::Kind::kCondition:
      if (truthy(arg(1))) return arg(0);
      return expr.args[2] ? arg(2)
                          : Value::undefined(
                                "the inline if-expression has no else and its "
                                "condition is false");
  }
  return Value();
}

Value Interpreter::evaluate_name(const std::string& name, const Scope& scope) {
  if (const Value* value = scope.find(name)) return *value;
  if (is_global(name)) {
    return Value(Value::Variant(std::make_shared<const Callable>(
        Callable{Callable::Kind::kGlobal, name, Value(), nullptr, nullptr})));
  }
  return Value::undefined(fmt::format("'{}' is undefined", name));
}

Value Interpreter::evaluate_dict(const Expr& expr, Scope& scope) {
  Dict dict;
  for (size_t i = 0; i + 1 < expr.args.size(); i += 2) {
    const Value key = evaluate(*expr.args[i], scope);
    const std::string* name = key.as_string();
    if (!name) {
      throw TemplateError(fmt::format("a dict's key must be a string, got {}", type_name(key)));
    }
    dict.set(*name, evaluate(*expr.args[i + 1], scope));
  }
  return Value::dict(std::move(dict));
}

// Python's slice: bounds are clipped, negative ones count from the end.
Value Interpreter::evaluate_slice(const Expr& expr, Scope& scope) {
  const Value object = evaluate(*expr.args[0], scope);
  int64_t bounds[3] = {0, 0, 1};
  bool given[3] = {};
  for (size_t i = 0; i < 3; ++i) {
    if (!expr.args[i + 1]) continue;
    const Value bound = evaluate(*expr.args[i + 1], scope);
    if (bound.is_none()) continue;
    bounds[i] = as_integer(bound, "a slice's bound");
    given[i] = true;
  }
  const int64_t step_by = bounds[2];
  if (step_by == 0) throw TemplateError("a slice's step must not be 0");
  const std::string* text = object.as_string();
  if (!text && !object.as_list()) {
    if (const auto* undefined = object.get_if<std::shared_ptr<const Undefined>>()) {
      throw TemplateError((*undefined)->what);
    }
    throw TemplateError(fmt::format("'{}' object cannot be sliced", type_name(object)));
  }
  charge(text ? text->size() : object.as_list()->items.size() * sizeof(Value));
  const std::u32string chars = text ? decode(*text) : std::u32string();
  const auto size = static_cast<int64_t>(text ? chars.size() : object.as_list()->items.size());
  const auto clip = [&](int64_t bound, int64_t low, int64_t high) {
    if (bound < 0) bound = bound < -size ? -1 : bound + size;
    return std::clamp(bound, low, high);
  };
  const bool forward = step_by > 0;
  const int64_t low = forward ? 0 : -1, high = forward ? size : size - 1;
  const int64_t begin = given[0] ? clip(bounds[0], low, high) : forward ? 0 : size - 1;
  const int64_t end = given[1] ? clip(bounds[1], low, high) : forward ? size : -1;

  std::u32string part;
  std::vector<Value> items;
  // Distance, not index + step: a huge step must not overflow.
  for (int64_t i = begin; forward ? i < end : i > end;) {
    if (text) {
      part.push_back(chars[static_cast<size_t>(i)]);
    } else {
      items.push_back(object.as_list()->items[static_cast<size_t>(i)]);
    }
    if (forward ? step_by >= end - i : step_by <= end - i) break;
    i += step_by;
  }
  if (text) return Value::string(encode(part));
  return Value::list(std::move(items), object.as_list()->is_tuple);
}

Value Interpreter::evaluate_concat(const Expr& expr, Scope& scope) {
  std::string text;
  for (const ExprPtr& part : expr.args) {
    const std::string piece = to_text(evaluate(*part, scope));
    reserve_string(text.size() + piece.size());
    text += piece;
  }
  return Value::string(std::move(text));
}

bool Interpreter::evaluate_compare(const Expr& expr, Scope& scope) {
  Value left = evaluate(*expr.args[0], scope);
  for (size_t i = 0; i < expr.compares.size(); ++i) {
    Value right = evaluate(*expr.args[i + 1], scope);
    const auto ordered = [&](auto predicate) {
      const int order = compare(left, right);
      return order != 2 && predicate(order);  // 2: not a number
    };
    bool holds = false;
    switch (expr.compares[i]) {
      case CompareOp::kEq:
        holds = equals(left, right);
        break;
      case CompareOp::kNe:
        holds = !equals(left, right);
        break;
      case CompareOp::kLt:
        holds = ordered([](int o) { return o < 0; });
        break;
      case CompareOp::kLe:
        holds = ordered([](int o) { return o <= 0; });
        break;
      case CompareOp::kGt:
        holds = ordered([](int o) { return o > 0; });
        break;
      case CompareOp::kGe:
        holds = ordered([](int o) { return o >= 0; });
        break;
      case CompareOp::kIn:
        holds = contains(right, left);
        break;
      case CompareOp::kNotIn:
        holds = !contains(right, left);
        break;
    }
    if (const List* list = right.as_list()) charge(list->items.size() * sizeof(Value));
    if (const std::string* text = right.as_string()) charge(text->size());
    if (!holds) return false;
    left = std::move(right);
  }
  return true;
}

Value Interpreter::get_attribute(const Value& object, std::string_view name) {
  if (const auto* undefined = object.get_if<std::shared_ptr<const Undefined>>()) {
    throw TemplateError((*undefined)->what);
  }
  if (const LoopState* loop = object.as_loop()) return loop_attribute(*loop, object, name);
  if (const Namespace* members = object.as_namespace()) {
    if (const Value* value = members->members.find(name)) return *value;
  }
  if (is_method(object, name)) {  // before members, as Jinja looks for attributes first
    return Value(Value::Variant(std::make_shared<const Callable>(
        Callable{Callable::Kind::kMethod, std::string(name), object, nullptr, nullptr})));
  }
  if (const Dict* dict = object.as_dict()) {
    if (const Value* value = dict->find(name)) return *value;
  }
  return Value::undefined(
      fmt::format("'{} object' has no attribute '{}'", type_name(object), name));
}

Value Interpreter::get_item(const Value& object, const Value& key) {
  if (const auto* undefined = object.get_if<std::shared_ptr<const Undefined>>()) {
    throw TemplateError((*undefined)->what);
  }
  const std::string* name = key.as_string();
  if (const Dict* dict = object.as_dict(); dict && name) {
    if (const Value* value = dict->find(*name)) return *value;
  }
  if (name) return get_attribute(object, *name);
  const List* list = object.as_list();
  const std::string* text = object.as_string();
  const bool is_index = key.is_bool() || key.get_if<int64_t>();
  if (is_index && (list || text)) {
    int64_t index = as_integer(key, "an index");
    const int64_t size = length_of(object);
    if (index < 0) index += size;
    if (index >= 0 && index < size) {
      if (list) return list->items[static_cast<size_t>(index)];
      charge(text->size());
      return Value::string(encode(decode(*text).substr(static_cast<size_t>(index), 1)));
    }
  }
  return Value::undefined(fmt::format(
      "'{} object' has no element {}", type_name(object),
      key.as_callable() || key.as_loop() || key.as_namespace() ? type_name(key) : to_repr(key)));
}

Value Interpreter::loop_attribute(const LoopState& loop, const Value& self, std::string_view name) {
  const auto index = static_cast<int64_t>(loop.index);
  const auto length = static_cast<int64_t>(loop.items.size());
  if (name == "index") return Value::integer(index + 1);
  if (name == "index0") return Value::integer(index);
  if (name == "revindex") return Value::integer(length - index);
  if (name == "revindex0") return Value::integer(length - index - 1);
  if (name == "first") return Value::boolean(index == 0);
  if (name == "last") return Value::boolean(index + 1 == length);
  if (name == "length") return Value::integer(length);
  if (name == "depth") return Value::integer(1);
  if (name == "depth0") return Value::integer(0);
  if (name == "previtem") {
    return index > 0 ? loop.items[loop.index - 1] : Value::undefined("there is no previous item");
  }
  if (name == "nextitem") {
    return index + 1 < length ? loop.items[loop.index + 1]
                              : Value::undefined("there is no next item");
  }
  if (name == "cycle" || name == "changed") {
    return Value(Value::Variant(std::make_shared<const Callable>(
        Callable{Callable::Kind::kLoopMethod, std::string(name), self, nullptr, nullptr})));
  }
  return Value::undefined(fmt::format("'loop' has no attribute '{}'", name));
}

}  // namespace kvarn::jinja
