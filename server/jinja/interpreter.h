// Runs a syntax tree. One interpreter renders once, on one thread; the tree is shared. The work is
// bounded: steps (expressions evaluated, items walked, 64 bytes of text made), output and depth.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "server/jinja/ast.h"
#include "server/jinja/builtins.h"
#include "server/jinja/value.h"

namespace kvarn::jinja {

struct Limits {
  int64_t max_steps =
      20'000'000;  // seconds; 4096 messages with Qwen3's template take under a million
  size_t max_output_bytes = size_t{64} << 20;
  int max_depth = 1000;  // of evaluation, macros included; as deep as Python goes
};

// Names visible in a region of the template. A macro remembers the scope it was defined in.
struct Scope {
  explicit Scope(Scope* outer) : parent(outer) {}
  ~Scope();
  Scope(const Scope&) = delete;
  Scope& operator=(const Scope&) = delete;
  const Value* find(std::string_view name) const;
  void set(std::string_view name, Value value);

  Scope* parent;
  std::vector<std::pair<std::string, Value>> values;
  std::vector<std::shared_ptr<Scope*>> macro_scopes;  // set to null when this scope ends
};

struct Callable {
  enum class Kind : uint8_t { kGlobal, kMethod, kMacro, kLoopMethod };
  Kind kind;
  std::string name;
  Value self;                               // kMethod, kLoopMethod
  const Stmt* macro = nullptr;              // kMacro
  std::shared_ptr<Scope*> scope = nullptr;  // kMacro: where it was defined, null once that is left
};

struct LoopState {
  std::vector<Value> items;
  size_t index = 0;
  std::vector<Value> changed_values;  // what loop.changed() saw last
  bool has_changed_values = false;
};

class Interpreter {
 public:
  Interpreter(const Block& program, const Dict& variables, const Limits& limits)
      : program_(program), variables_(variables), limits_(limits) {}
  ~Interpreter();

  // Throws TemplateError with a line.
  std::string render();

  // For builtins.
  Value get_item(const Value& object, const Value& key);  // object[key]
  Value get_attribute(const Value& object, std::string_view name);
  void charge(size_t bytes) { step(static_cast<int64_t>(bytes / 64) + 1); }
  // Before a string of this size is made.
  void reserve_string(size_t bytes);
  Value make_namespace(Dict members);

 private:
  enum class Flow : uint8_t { kNormal, kBreak, kContinue };

  // Bounds the recursion of evaluate and execute.
  struct Depth {
    explicit Depth(Interpreter& interpreter);
    ~Depth() { --depth; }
    Depth(const Depth&) = delete;
    Depth& operator=(const Depth&) = delete;
    int& depth;
  };

  void step(int64_t count);
  void emit(std::string_view text);

  Flow execute(const Block& block, Scope& scope);
  Flow execute(const Stmt& stmt, Scope& scope);
  Flow execute_for(const Stmt& stmt, Scope& scope);
  Flow execute_if(const Stmt& stmt, Scope& scope);
  void execute_macro(const Stmt& stmt, Scope& scope);
  std::string capture(const Block& block, Scope& scope);  // the text of a block
  void assign(const Target& target, const Value& value, Scope& scope);

  Value evaluate(const Expr& expr, Scope& scope);
  Value evaluate_checked(const Expr& expr, Scope& scope);
  Value evaluate_name(const std::string& name, const Scope& scope);
  Value evaluate_dict(const Expr& expr, Scope& scope);
  Value evaluate_slice(const Expr& expr, Scope& scope);
  Value evaluate_concat(const Expr& expr, Scope& scope);
  bool evaluate_compare(const Expr& expr, Scope& scope);
  Value evaluate_call(const Expr& expr, Scope& scope);
  Value evaluate_filter(const Expr& expr, const Value& block_text, Scope& scope);
  Args evaluate_arguments(const Expr::Call& call, Scope& scope);
  Value call(const Value& callee, const Args& args);
  Value call_macro(const Callable& macro, const Args& args);
  Value call_loop(const Callable& method, const Args& args);
  Value loop_attribute(const LoopState& loop, const Value& self, std::string_view name);

  const Block& program_;
  const Dict& variables_;
  Limits limits_;
  int64_t steps_ = 0;
  int depth_ = 0;
  std::string out_;
  std::vector<std::shared_ptr<Namespace>> namespaces_;  // cleared at the end, so cycles are freed
};

// Arithmetic of two values; throws where Python's types do not allow it.
Value arithmetic(Interpreter& interpreter, BinaryOp op, const Value& a, const Value& b);

}  // namespace kvarn::jinja
