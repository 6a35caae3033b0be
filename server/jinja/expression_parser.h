// Tokens of an expression -> syntax tree, by recursive descent with Jinja's precedences.
#pragma once

#include <memory>

#include "server/jinja/ast.h"
#include "server/jinja/token_cursor.h"

namespace kvarn::jinja {

inline constexpr int kMaxExprDepth = 200;  // far above real templates; see Expr::depth

class ExpressionParser {
 public:
  explicit ExpressionParser(TokenCursor& tokens) : tokens_(tokens) {}

  ExprPtr parse_expression(bool with_condition = true);
  // One expression, or several with commas between: a tuple.
  ExprPtr parse_tuple(bool with_condition, bool may_be_empty);
  // Of a filter block or a set block: filters only, the first one's input is the block's text.
  ExprPtr parse_filter_chain(int line);
  bool at_tuple_end() const;

  // Whether these names were read; the parser of a macro resets them.
  bool saw_varargs = false, saw_kwargs = false;

 private:
  ExprPtr parse_condition();
  ExprPtr parse_or();
  ExprPtr parse_and();
  ExprPtr parse_not();
  bool take_compare(CompareOp& op);
  ExprPtr parse_compare();
  ExprPtr parse_sum();
  ExprPtr parse_concat();
  ExprPtr parse_product();
  ExprPtr parse_power();
  ExprPtr parse_unary(bool with_filters);
  ExprPtr parse_primary();
  ExprPtr parse_name(const Token& token);
  ExprPtr parse_list(int line);
  ExprPtr parse_dict(int line);
  ExprPtr parse_postfix(ExprPtr expr);
  ExprPtr parse_member(ExprPtr object, int line);
  ExprPtr parse_subscript(ExprPtr object, int line);
  ExprPtr parse_call(ExprPtr callee, int line);
  std::unique_ptr<Expr::Call> parse_arguments();
  ExprPtr parse_filters(ExprPtr expr);
  ExprPtr parse_filter(ExprPtr input, int line);
  ExprPtr parse_test(ExprPtr input, int line);
  bool at_test_argument() const;

  TokenCursor& tokens_;
};

}  // namespace kvarn::jinja
