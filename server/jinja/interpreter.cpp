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

Interpreter::Depth::Depth(Interpreter& interpreter) : depth(interpreter.depth_) {
  if (++depth <= interpreter.limits_.max_depth) return;
  --depth;
  throw TemplateError(fmt::format("expressions, blocks and macro calls nest deeper than {}",
                                  interpreter.limits_.max_depth));
}

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

}  // namespace kvarn::jinja
