// Calls: arguments, macros, methods of loop, filters.
#include <algorithm>
#include <utility>

#include <fmt/format.h>

#include "server/jinja/error.h"
#include "server/jinja/interpreter.h"

namespace kvarn::jinja {

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
