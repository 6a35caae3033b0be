#include "server/jinja/interpreter.h"

#include <algorithm>
#include <utility>

#include <fmt/format.h>

#include "server/jinja/error.h"
#include "server/jinja/text.h"

namespace kvarn::jinja {

Scope::~Scope() {
  for (const std::shared_ptr<Scope*>& macro_scope : macro_scopes) *macro_scope = nullptr;
}

const Value* Scope::find(std::string_view name) const {
  for (const Scope* scope = this; scope; scope = scope->parent) {
    for (const auto& [key, value] : scope->values) {
      if (key == name) return &value;
    }
  }
  return nullptr;
}

void Scope::set(std::string_view name, Value value) {
  for (auto& [key, old] : values) {
    if (key == name) {
      old = std::move(value);
      return;
    }
  }
  values.emplace_back(std::string(name), std::move(value));
}

// Bounds the recursion of evaluate and execute.
struct Interpreter::Depth {
  explicit Depth(Interpreter& interpreter) : depth(interpreter.depth_) {
    if (++depth > interpreter.limits_.max_depth) {
      --depth;
      throw TemplateError(fmt::format("expressions, blocks and macro calls nest deeper than {}",
                                      interpreter.limits_.max_depth));
    }
  }
  ~Depth() { --depth; }
  Depth(const Depth&) = delete;
  Depth& operator=(const Depth&) = delete;
  int& depth;
};

Interpreter::~Interpreter() {
  for (const std::shared_ptr<Namespace>& members : namespaces_) members->members.items.clear();
}

std::string Interpreter::render() {
  Scope context(nullptr);
  context.values = variables_.items;
  Scope root(&context);
  execute(program_, root);
  return std::move(out_);
}

void Interpreter::step(int64_t count) {
  steps_ += count;
  if (steps_ > limits_.max_steps) {
    throw TemplateError(fmt::format("rendering takes more than {} steps", limits_.max_steps));
  }
}

void Interpreter::reserve_string(size_t bytes) {
  if (bytes > kMaxStringBytes) {
    throw TemplateError(fmt::format("a string would be longer than {} bytes", kMaxStringBytes));
  }
  charge(bytes);
}

Value Interpreter::make_namespace(Dict members) {
  auto made = std::make_shared<Namespace>(Namespace{std::move(members)});
  namespaces_.push_back(made);
  return Value(Value::Variant(std::move(made)));
}

void Interpreter::emit(std::string_view text) {
  if (out_.size() + text.size() > limits_.max_output_bytes) {
    throw TemplateError(
        fmt::format("the rendered text is longer than {} bytes", limits_.max_output_bytes));
  }
  charge(text.size());
  out_ += text;
}

// ---- statements

Interpreter::Flow Interpreter::execute(const Block& block, Scope& scope) {
  for (const std::unique_ptr<Stmt>& stmt : block) {
    try {
      const Flow flow = execute(*stmt, scope);
      if (flow != Flow::kNormal) return flow;
    } catch (const TemplateError& e) {
      if (e.line() != 0) throw;
      throw TemplateError(e.what(), stmt->line);
    }
  }
  return Flow::kNormal;
}

Interpreter::Flow Interpreter::execute(const Stmt& stmt, Scope& scope) {
  const Depth depth(*this);
  step(1);
  switch (stmt.kind) {
    case Stmt::Kind::kText:
      emit(stmt.text);
      break;
    case Stmt::Kind::kPrint:
      emit(to_text(evaluate(*stmt.expr, scope)));
      break;
    case Stmt::Kind::kSet:
      assign(stmt.target, evaluate(*stmt.expr, scope), scope);
      break;
    case Stmt::Kind::kSetBlock: {
      Value text = Value::string(capture(stmt.body, scope));
      if (stmt.expr) text = evaluate_filter(*stmt.expr, text, scope);
      assign(stmt.target, text, scope);
      break;
    }
    case Stmt::Kind::kIf:
      return execute_if(stmt, scope);
    case Stmt::Kind::kFor:
      return execute_for(stmt, scope);
    case Stmt::Kind::kMacro:
      execute_macro(stmt, scope);
      break;
    case Stmt::Kind::kScope: {
      Scope inner(&scope);
      for (const Stmt::Param& param : stmt.params) {
        inner.set(param.name, evaluate(*param.default_value, scope));
      }
      return execute(stmt.body, inner);
    }
    case Stmt::Kind::kFilter: {
      const Value text = Value::string(capture(stmt.body, scope));
      emit(to_text(evaluate_filter(*stmt.expr, text, scope)));
      break;
    }
    case Stmt::Kind::kBreak:
      return Flow::kBreak;
    case Stmt::Kind::kContinue:
      return Flow::kContinue;
  }
  return Flow::kNormal;
}

Interpreter::Flow Interpreter::execute_if(const Stmt& stmt, Scope& scope) {
  for (const Stmt::Branch& branch : stmt.branches) {
    if (truthy(evaluate(*branch.condition, scope))) return execute(branch.body, scope);
  }
  return execute(stmt.body, scope);
}

Interpreter::Flow Interpreter::execute_for(const Stmt& stmt, Scope& scope) {
  auto loop = std::make_shared<LoopState>();
  loop->items = iterate(evaluate(*stmt.expr, scope));
  charge(loop->items.size() * sizeof(Value));
  if (stmt.condition) {
    std::vector<Value> kept;
    for (const Value& item : loop->items) {
      Scope inner(&scope);
      assign(stmt.target, item, inner);
      if (truthy(evaluate(*stmt.condition, inner))) kept.push_back(item);
    }
    loop->items = std::move(kept);
  }
  if (loop->items.empty()) return execute(stmt.orelse, scope);
  for (size_t i = 0; i < loop->items.size(); ++i) {
    step(1);
    loop->index = i;
    Scope inner(&scope);
    inner.set("loop", Value(Value::Variant(loop)));
    assign(stmt.target, loop->items[i], inner);
    if (execute(stmt.body, inner) == Flow::kBreak) break;
  }
  return Flow::kNormal;
}

void Interpreter::execute_macro(const Stmt& stmt, Scope& scope) {
  auto defined_in = std::make_shared<Scope*>(&scope);
  scope.macro_scopes.push_back(defined_in);
  auto macro = std::make_shared<const Callable>(
      Callable{Callable::Kind::kMacro, stmt.name, Value(), &stmt, std::move(defined_in)});
  scope.set(stmt.name, Value(Value::Variant(std::move(macro))));
}

std::string Interpreter::capture(const Block& block, Scope& scope) {
  std::string outer = std::exchange(out_, {});
  Scope inner(&scope);
  execute(block, inner);
  return std::exchange(out_, std::move(outer));
}

void Interpreter::assign(const Target& target, const Value& value, Scope& scope) {
  switch (target.kind) {
    case Target::Kind::kName:
      scope.set(target.name, value);
      return;
    case Target::Kind::kMember: {
      const Value* object = scope.find(target.name);
      Namespace* members = object ? object->as_namespace() : nullptr;
      if (!members) {
        throw TemplateError(fmt::format("cannot assign to '{}.{}': '{}' is no namespace",
                                        target.name, target.member, target.name));
      }
      members->members.set(target.member, value);
      return;
    }
    case Target::Kind::kTuple: {
      const std::vector<Value> items = iterate(value);
      if (items.size() != target.parts.size()) {
        throw TemplateError(fmt::format("cannot unpack {} values into {} names", items.size(),
                                        target.parts.size()));
      }
      for (size_t i = 0; i < items.size(); ++i) assign(target.parts[i], items[i], scope);
      return;
    }
  }
}

// ---- expressions

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

// ---- members

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

// ---- calls

Args Interpreter::evaluate_arguments(const Expr::Call& call, Scope& scope) {
  Args args;
  for (const ExprPtr& arg : call.positional) args.positional.push_back(evaluate(*arg, scope));
  if (call.star) {
    for (Value& value : iterate(evaluate(*call.star, scope))) {
      args.positional.push_back(std::move(value));
    }
  }
  const auto add = [&args](const std::string& name, Value value) {
    for (const auto& [other, unused] : args.keyword) {
      if (other == name) throw TemplateError(fmt::format("argument '{}' is given twice", name));
    }
    args.keyword.emplace_back(name, std::move(value));
  };
  for (const auto& [name, arg] : call.keyword) add(name, evaluate(*arg, scope));
  if (call.double_star) {
    const Value value = evaluate(*call.double_star, scope);
    const Dict* dict = value.as_dict();
    if (!dict) throw TemplateError(fmt::format("** needs a dict, got {}", type_name(value)));
    for (const auto& [name, item] : dict->items) add(name, item);
  }
  return args;
}

Value Interpreter::evaluate_call(const Expr& expr, Scope& scope) {
  const Value callee = evaluate(*expr.args[0], scope);
  return call(callee, evaluate_arguments(*expr.call, scope));
}

Value Interpreter::call(const Value& callee, const Args& args) {
  const Callable* function = callee.as_callable();
  if (!function) {
    if (const auto* undefined = callee.get_if<std::shared_ptr<const Undefined>>()) {
      throw TemplateError((*undefined)->what);
    }
    throw TemplateError(fmt::format("'{}' object is not callable", type_name(callee)));
  }
  switch (function->kind) {
    case Callable::Kind::kGlobal:
      return call_global(*this, function->name, args);
    case Callable::Kind::kMethod:
      return call_method(*this, function->self, function->name, args);
    case Callable::Kind::kMacro:
      return call_macro(*function, args);
    case Callable::Kind::kLoopMethod:
      return call_loop(*function, args);
  }
  return Value();
}

Value Interpreter::call_macro(const Callable& macro, const Args& args) {
  const Stmt& stmt = *macro.macro;
  if (!*macro.scope) {
    throw TemplateError(
        fmt::format("macro '{}' is called outside of the block that defines it", macro.name));
  }
  Scope inner(*macro.scope);
  const size_t num_params = stmt.params.size();
  std::vector<Value> extra;
  for (size_t i = num_params; i < args.positional.size(); ++i) extra.push_back(args.positional[i]);
  if (!extra.empty() && !stmt.uses_varargs) {
    throw TemplateError(fmt::format("macro '{}' takes at most {} arguments, got {}", macro.name,
                                    num_params, args.positional.size()));
  }
  Dict named;
  for (const auto& [name, value] : args.keyword) named.items.emplace_back(name, value);
  for (size_t i = 0; i < num_params; ++i) {
    const Stmt::Param& param = stmt.params[i];
    const auto it = std::find_if(named.items.begin(), named.items.end(),
                                 [&param](const auto& item) { return item.first == param.name; });
    if (i < args.positional.size()) {
      if (it != named.items.end()) {
        throw TemplateError(
            fmt::format("macro '{}' got argument '{}' twice", macro.name, param.name));
      }
      inner.set(param.name, args.positional[i]);
    } else if (it != named.items.end()) {
      inner.set(param.name, it->second);
      named.items.erase(it);
    } else if (param.default_value) {
      inner.set(param.name, evaluate(*param.default_value, inner));
    } else {
      inner.set(param.name,
                Value::undefined(fmt::format("parameter '{}' was not provided", param.name)));
    }
  }
  if (!named.items.empty() && !stmt.uses_kwargs) {
    throw TemplateError(
        fmt::format("macro '{}' has no parameter '{}'", macro.name, named.items.front().first));
  }
  if (stmt.uses_varargs) inner.set("varargs", Value::list(std::move(extra), true));
  if (stmt.uses_kwargs) inner.set("kwargs", Value::dict(std::move(named)));
  std::string text = capture(stmt.body, inner);
  charge(text.size());
  return Value::string(std::move(text));
}

Value Interpreter::call_loop(const Callable& method, const Args& args) {
  LoopState& loop = *method.self.as_loop();
  if (method.name == "cycle") {
    if (args.positional.empty()) throw TemplateError("loop.cycle() needs an argument");
    return args.positional[loop.index % args.positional.size()];
  }
  const bool same =
      loop.has_changed_values && std::equal(loop.changed_values.begin(), loop.changed_values.end(),
                                            args.positional.begin(), args.positional.end(), equals);
  loop.changed_values = args.positional;
  loop.has_changed_values = true;
  return Value::boolean(!same);
}

// In the chain of a filter block the innermost filter's input is the block's text.
Value Interpreter::evaluate_filter(const Expr& expr, const Value& block_text, Scope& scope) {
  Value input;
  if (!expr.args[0]) {
    input = block_text;
  } else if (expr.args[0]->kind == Expr::Kind::kFilter) {
    input = evaluate_filter(*expr.args[0], block_text, scope);
  } else {
    input = evaluate(*expr.args[0], scope);
  }
  Value result = apply_filter(*this, expr.name, input, evaluate_arguments(*expr.call, scope));
  if (const std::string* text = result.as_string()) charge(text->size());
  if (const List* list = result.as_list()) charge(list->items.size() * sizeof(Value));
  return result;
}

}  // namespace kvarn::jinja
