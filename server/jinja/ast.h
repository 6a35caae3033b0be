// The syntax tree of a template. Built by the parser, immutable after.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "server/jinja/value.h"

namespace kvarn::jinja {

struct Expr;
using ExprPtr = std::unique_ptr<Expr>;

enum class BinaryOp : uint8_t { kAdd, kSub, kMul, kDiv, kFloorDiv, kMod, kPow };
enum class CompareOp : uint8_t { kEq, kNe, kLt, kLe, kGt, kGe, kIn, kNotIn };

struct Expr {
  enum class Kind : uint8_t {
    kConst,      // constant
    kName,       // name
    kTuple,      // args
    kList,       // args
    kDict,       // args: key, value, key, value, ...
    kAttribute,  // args[0] . name
    kItem,       // args[0] [ args[1] ]
    kSlice,      // args[0] [ args[1] : args[2] : args[3] ], null: left out
    kCall,       // args[0] ( call )
    kFilter,     // args[0] | name ( call ); args[0] null: the text of a filter block
    kTest,       // args[0] is name ( call )
    kNot,        // args[0]
    kNegate,
    kPositive,
    kAnd,  // args[0], args[1]
    kOr,
    kConcat,     // args, as text
    kBinary,     // binary: args[0], args[1]
    kCompare,    // args[0] compares[0] args[1] compares[1] args[2] ...
    kCondition,  // args[0] if args[1] else args[2] (null: left out)
  };

  Kind kind;
  int line;
  int depth = 1;  // of the tree below, bounded by the parser: evaluating and freeing recurse
  Value constant;
  std::string name;
  std::vector<ExprPtr> args;
  BinaryOp binary{};
  std::vector<CompareOp> compares;
  struct Call {
    std::vector<ExprPtr> positional;
    std::vector<std::pair<std::string, ExprPtr>> keyword;
    ExprPtr star, double_star;  // *args, **kwargs
  };
  std::unique_ptr<Call> call;
};

// What `set` and `for` assign to.
struct Target {
  enum class Kind : uint8_t { kName, kMember, kTuple };
  Kind kind;
  std::string name;    // kName, kMember: of the namespace
  std::string member;  // kMember
  std::vector<Target> parts;
};

struct Stmt;
using Block = std::vector<std::unique_ptr<Stmt>>;

struct Stmt {
  enum class Kind : uint8_t {
    kText,      // text
    kPrint,     // expr
    kSet,       // target = expr
    kSetBlock,  // target = the text of body, through expr if it is a chain of filters
    kIf,        // branches; body is the else
    kFor,       // for target in expr if condition: body, or orelse if nothing was walked
    kMacro,     // name(params): body
    kScope,     // body in a scope of its own ({% generation %}); `with` assigns params first
    kFilter,    // the text of body through expr
    kBreak,
    kContinue,
  };
  struct Branch {
    ExprPtr condition;
    Block body;
  };
  struct Param {
    std::string name;
    ExprPtr default_value;  // null: none
  };

  Kind kind;
  int line;
  std::string text;
  std::string name;
  ExprPtr expr, condition;
  Target target{};
  std::vector<Branch> branches;
  std::vector<Param> params;
  bool uses_varargs = false, uses_kwargs = false;  // of a macro: it takes any arguments
  Block body, orelse;
};

}  // namespace kvarn::jinja
