#include "server/jinja/expression_parser.h"

#include <algorithm>
#include <array>
#include <charconv>
#include <utility>

#include <fmt/format.h>

#include "server/jinja/builtins.h"
#include "server/jinja/error.h"

namespace kvarn::jinja {
namespace {

using Kind = Token::Kind;

// Takes the depth from the children.
ExprPtr finish(ExprPtr expr) {
  const auto above = [&expr](const ExprPtr& child) {
    if (child) expr->depth = std::max(expr->depth, child->depth + 1);
  };
  for (const ExprPtr& arg : expr->args) above(arg);
  if (expr->call) {
    for (const ExprPtr& arg : expr->call->positional) above(arg);
    for (const auto& [name, arg] : expr->call->keyword) above(arg);
    above(expr->call->star);
    above(expr->call->double_star);
  }
  if (expr->depth > kMaxExprDepth) {
    throw TemplateError(fmt::format("expression is nested deeper than {}", kMaxExprDepth),
                        expr->line);
  }
  return expr;
}
ExprPtr make(Expr::Kind kind, int line) {
  auto expr = std::make_unique<Expr>();
  expr->kind = kind;
  expr->line = line;
  return expr;
}
template <typename... Args>
ExprPtr make(Expr::Kind kind, int line, ExprPtr first, Args... rest) {
  ExprPtr expr = make(kind, line);
  expr->args.push_back(std::move(first));
  (expr->args.push_back(std::move(rest)), ...);
  return finish(std::move(expr));
}
ExprPtr constant(Value value, int line) {
  ExprPtr expr = make(Expr::Kind::kConst, line);
  expr->constant = std::move(value);
  return expr;
}

ExprPtr binary(BinaryOp op, int line, ExprPtr left, ExprPtr right) {
  ExprPtr expr = make(Expr::Kind::kBinary, line, std::move(left), std::move(right));
  expr->binary = op;
  return expr;
}

Value integer(const Token& token) {
  int64_t value = 0;
  const char* end = token.text.data() + token.text.size();
  if (std::from_chars(token.text.data(), end, value).ec != std::errc{}) {
    throw TemplateError(fmt::format("integer {} does not fit into 64 bits", token.text),
                        token.line);
  }
  return Value::integer(value);
}

}  // namespace

ExprPtr ExpressionParser::parse_expression(bool with_condition) {
  const TokenCursor::Nesting nesting(tokens_, kMaxExprDepth);
  return with_condition ? parse_condition() : parse_or();
}

ExprPtr ExpressionParser::parse_condition() {
  ExprPtr expr = parse_or();
  while (tokens_.at_name("if")) {
    const int line = tokens_.next().line;
    ExprPtr condition = parse_or();
    ExprPtr otherwise = tokens_.skip_name("else") ? parse_expression() : nullptr;
    expr = make(Expr::Kind::kCondition, line, std::move(expr), std::move(condition),
                std::move(otherwise));
  }
  return expr;
}

ExprPtr ExpressionParser::parse_or() {
  ExprPtr left = parse_and();
  while (tokens_.at_name("or")) {
    const int line = tokens_.next().line;
    left = make(Expr::Kind::kOr, line, std::move(left), parse_and());
  }
  return left;
}

ExprPtr ExpressionParser::parse_and() {
  ExprPtr left = parse_not();
  while (tokens_.at_name("and")) {
    const int line = tokens_.next().line;
    left = make(Expr::Kind::kAnd, line, std::move(left), parse_not());
  }
  return left;
}

ExprPtr ExpressionParser::parse_not() {
  if (!tokens_.at_name("not")) return parse_compare();
  const TokenCursor::Nesting nesting(tokens_, kMaxExprDepth);
  const int line = tokens_.next().line;
  return make(Expr::Kind::kNot, line, parse_not());
}

bool ExpressionParser::take_compare(CompareOp& op) {
  static constexpr std::pair<std::string_view, CompareOp> kOps[] = {
      {"==", CompareOp::kEq}, {"!=", CompareOp::kNe}, {"<", CompareOp::kLt},
      {"<=", CompareOp::kLe}, {">", CompareOp::kGt},  {">=", CompareOp::kGe},
  };
  for (const auto& [text, value] : kOps) {
    if (tokens_.skip_operator(text)) {
      op = value;
      return true;
    }
  }
  if (tokens_.skip_name("in")) {
    op = CompareOp::kIn;
    return true;
  }
  if (tokens_.at_name("not") && tokens_.peek(1).kind == Kind::kName &&
      tokens_.peek(1).text == "in") {
    tokens_.next();
    tokens_.next();
    op = CompareOp::kNotIn;
    return true;
  }
  return false;
}

ExprPtr ExpressionParser::parse_compare() {
  const int line = tokens_.peek().line;
  ExprPtr first = parse_sum();
  CompareOp op{};
  if (!take_compare(op)) return first;
  ExprPtr expr = make(Expr::Kind::kCompare, line);
  expr->args.push_back(std::move(first));
  do {
    expr->compares.push_back(op);
    expr->args.push_back(parse_sum());
  } while (take_compare(op));
  return finish(std::move(expr));
}

ExprPtr ExpressionParser::parse_sum() {
  ExprPtr left = parse_concat();
  while (tokens_.at_operator("+") || tokens_.at_operator("-")) {
    const Token op = tokens_.next();
    left = binary(op.text == "+" ? BinaryOp::kAdd : BinaryOp::kSub, op.line, std::move(left),
                  parse_concat());
  }
  return left;
}

ExprPtr ExpressionParser::parse_concat() {
  const int line = tokens_.peek().line;
  ExprPtr first = parse_product();
  if (!tokens_.at_operator("~")) return first;
  ExprPtr expr = make(Expr::Kind::kConcat, line);
  expr->args.push_back(std::move(first));
  while (tokens_.skip_operator("~")) expr->args.push_back(parse_product());
  return finish(std::move(expr));
}

ExprPtr ExpressionParser::parse_product() {
  static constexpr std::pair<std::string_view, BinaryOp> kOps[] = {{"*", BinaryOp::kMul},
                                                                   {"/", BinaryOp::kDiv},
                                                                   {"//", BinaryOp::kFloorDiv},
                                                                   {"%", BinaryOp::kMod}};
  ExprPtr left = parse_power();
  while (true) {
    const auto* op = std::find_if(std::begin(kOps), std::end(kOps),
                                  [this](const auto& o) { return tokens_.at_operator(o.first); });
    if (op == std::end(kOps)) return left;
    const int line = tokens_.next().line;
    left = binary(op->second, line, std::move(left), parse_power());
  }
}

ExprPtr ExpressionParser::parse_power() {  // left-associative, and a sign binds closer, as in Jinja
  ExprPtr left = parse_unary(true);
  while (tokens_.at_operator("**")) {
    const int line = tokens_.next().line;
    left = binary(BinaryOp::kPow, line, std::move(left), parse_unary(true));
  }
  return left;
}

ExprPtr ExpressionParser::parse_unary(bool with_filters) {
  const TokenCursor::Nesting nesting(tokens_, kMaxExprDepth);
  const int line = tokens_.peek().line;
  ExprPtr expr;
  if (tokens_.skip_operator("-")) {
    expr = make(Expr::Kind::kNegate, line, parse_unary(false));
  } else if (tokens_.skip_operator("+")) {
    expr = make(Expr::Kind::kPositive, line, parse_unary(false));
  } else {
    expr = parse_primary();
  }
  expr = parse_postfix(std::move(expr));
  return with_filters ? parse_filters(std::move(expr)) : std::move(expr);
}

ExprPtr ExpressionParser::parse_primary() {
  const Token token = tokens_.next();
  switch (token.kind) {
    case Kind::kName:
      return parse_name(token);
    case Kind::kString: {
      std::string text = token.text;
      while (tokens_.peek().kind == Kind::kString) text += tokens_.next().text;  // "a" "b"
      return constant(Value::string(std::move(text)), token.line);
    }
    case Kind::kInteger:
      return constant(integer(token), token.line);
    case Kind::kFloat:
      return constant(Value::real(std::stod(token.text)), token.line);
    case Kind::kOperator:
      if (token.text == "(") {
        ExprPtr expr = parse_tuple(true, true);
        tokens_.expect_operator(")");
        return expr;
      }
      if (token.text == "[") return parse_list(token.line);
      if (token.text == "{") return parse_dict(token.line);
      break;
    default:
      break;
  }
  throw TemplateError("expected an expression, got " + described(token), token.line);
}

ExprPtr ExpressionParser::parse_name(const Token& token) {
  const std::string& name = token.text;
  if (name == "true" || name == "True") return constant(Value::boolean(true), token.line);
  if (name == "false" || name == "False") return constant(Value::boolean(false), token.line);
  if (name == "none" || name == "None") return constant(Value(), token.line);
  if (is_reserved(name)) {
    throw TemplateError(fmt::format("expected an expression, got '{}'", name), token.line);
  }
  saw_varargs |= name == "varargs";
  saw_kwargs |= name == "kwargs";
  ExprPtr expr = make(Expr::Kind::kName, token.line);
  expr->name = name;
  return expr;
}

bool ExpressionParser::at_tuple_end() const {
  return tokens_.peek().kind == Kind::kVariableEnd || tokens_.peek().kind == Kind::kBlockEnd ||
         tokens_.at_operator(")");
}

ExprPtr ExpressionParser::parse_tuple(bool with_condition, bool may_be_empty) {
  const int line = tokens_.peek().line;
  std::vector<ExprPtr> items;
  bool is_tuple = false;
  while (!at_tuple_end()) {
    items.push_back(parse_expression(with_condition));
    if (!tokens_.skip_operator(",")) break;
    is_tuple = true;
  }
  if (!is_tuple && items.size() == 1) return std::move(items.front());
  if (!is_tuple && !may_be_empty)
    tokens_.fail("expected an expression, got " + described(tokens_.peek()));
  ExprPtr expr = make(Expr::Kind::kTuple, line);
  expr->args = std::move(items);
  return finish(std::move(expr));
}

ExprPtr ExpressionParser::parse_list(int line) {
  ExprPtr expr = make(Expr::Kind::kList, line);
  while (!tokens_.at_operator("]")) {
    if (!expr->args.empty()) tokens_.expect_operator(",");
    if (tokens_.at_operator("]")) break;
    expr->args.push_back(parse_expression());
  }
  tokens_.next();
  return finish(std::move(expr));
}

ExprPtr ExpressionParser::parse_dict(int line) {
  ExprPtr expr = make(Expr::Kind::kDict, line);
  while (!tokens_.at_operator("}")) {
    if (!expr->args.empty()) tokens_.expect_operator(",");
    if (tokens_.at_operator("}")) break;
    expr->args.push_back(parse_expression());
    tokens_.expect_operator(":");
    expr->args.push_back(parse_expression());
  }
  tokens_.next();
  return finish(std::move(expr));
}

ExprPtr ExpressionParser::parse_postfix(ExprPtr expr) {
  while (true) {
    const int line = tokens_.peek().line;
    if (tokens_.skip_operator(".")) {
      expr = parse_member(std::move(expr), line);
    } else if (tokens_.skip_operator("[")) {
      expr = parse_subscript(std::move(expr), line);
    } else if (tokens_.at_operator("(")) {
      expr = parse_call(std::move(expr), line);
    } else {
      return expr;
    }
  }
}

ExprPtr ExpressionParser::parse_member(ExprPtr object, int line) {
  const Token token = tokens_.next();
  if (token.kind == Kind::kName) {
    ExprPtr expr = make(Expr::Kind::kAttribute, line, std::move(object));
    expr->name = token.text;
    return expr;
  }
  if (token.kind != Kind::kInteger) {
    throw TemplateError("expected a name or number behind '.', got " + described(token), line);
  }
  return make(Expr::Kind::kItem, line, std::move(object), constant(integer(token), line));
}

ExprPtr ExpressionParser::parse_subscript(ExprPtr object, int line) {
  std::array<ExprPtr, 3> bounds;
  size_t colons = 0;
  const auto at_bound_end = [this] { return tokens_.at_operator(":") || tokens_.at_operator("]"); };
  if (!at_bound_end()) bounds[0] = parse_expression();
  while (colons < 2 && tokens_.skip_operator(":")) {
    ++colons;
    if (!at_bound_end()) bounds[colons] = parse_expression();
  }
  if (tokens_.at_operator(",")) tokens_.fail("an index of several parts is not supported");
  tokens_.expect_operator("]");
  if (colons > 0) {
    return make(Expr::Kind::kSlice, line, std::move(object), std::move(bounds[0]),
                std::move(bounds[1]), std::move(bounds[2]));
  }
  if (!bounds[0]) tokens_.fail("expected an index between '[' and ']'");
  return make(Expr::Kind::kItem, line, std::move(object), std::move(bounds[0]));
}

ExprPtr ExpressionParser::parse_call(ExprPtr callee, int line) {
  ExprPtr expr = make(Expr::Kind::kCall, line);
  expr->args.push_back(std::move(callee));
  expr->call = parse_arguments();
  return finish(std::move(expr));
}

std::unique_ptr<Expr::Call> ExpressionParser::parse_arguments() {
  auto call = std::make_unique<Expr::Call>();
  tokens_.expect_operator("(");
  bool is_first = true;
  while (!tokens_.at_operator(")")) {
    if (!is_first) tokens_.expect_operator(",");
    is_first = false;
    if (tokens_.at_operator(")")) break;
    if (tokens_.skip_operator("**")) {
      call->double_star = parse_expression();
    } else if (tokens_.skip_operator("*")) {
      call->star = parse_expression();
    } else if (tokens_.peek().kind == Kind::kName && tokens_.peek(1).kind == Kind::kOperator &&
               tokens_.peek(1).text == "=") {
      std::string name = tokens_.next().text;
      tokens_.next();
      call->keyword.emplace_back(std::move(name), parse_expression());
    } else {
      if (!call->keyword.empty() || call->double_star) {
        tokens_.fail("an argument without a name must not follow one with a name");
      }
      call->positional.push_back(parse_expression());
    }
  }
  tokens_.next();
  return call;
}

ExprPtr ExpressionParser::parse_filters(ExprPtr expr) {
  while (true) {
    const int line = tokens_.peek().line;
    if (tokens_.skip_operator("|")) {
      expr = parse_filter(std::move(expr), line);
    } else if (tokens_.skip_name("is")) {
      expr = parse_test(std::move(expr), line);
    } else if (tokens_.at_operator("(")) {
      expr = parse_call(std::move(expr), line);
    } else {
      return expr;
    }
  }
}

ExprPtr ExpressionParser::parse_filter(ExprPtr input, int line) {
  ExprPtr expr = make(Expr::Kind::kFilter, line);
  expr->args.push_back(std::move(input));
  expr->name = tokens_.expect_name("a filter's name");
  if (!is_filter(expr->name)) {
    throw TemplateError(fmt::format("filter '{}' is not supported", expr->name), line);
  }
  expr->call = tokens_.at_operator("(") ? parse_arguments() : std::make_unique<Expr::Call>();
  return finish(std::move(expr));
}

ExprPtr ExpressionParser::parse_filter_chain(int line) {
  ExprPtr expr = parse_filter(nullptr, line);
  while (tokens_.skip_operator("|")) expr = parse_filter(std::move(expr), line);
  return expr;
}

ExprPtr ExpressionParser::parse_test(ExprPtr input, int line) {
  const bool negated = tokens_.skip_name("not");
  ExprPtr expr = make(Expr::Kind::kTest, line);
  expr->args.push_back(std::move(input));
  if (tokens_.peek().kind != Kind::kName)
    tokens_.fail("expected a test's name, got " + described(tokens_.peek()));
  expr->name = tokens_.next().text;
  if (!is_test(expr->name)) {
    throw TemplateError(fmt::format("test '{}' is not supported", expr->name), line);
  }
  expr->call = std::make_unique<Expr::Call>();
  if (tokens_.at_operator("(")) {
    expr->call = parse_arguments();
  } else if (at_test_argument()) {
    expr->call->positional.push_back(parse_postfix(parse_primary()));
  }
  expr = finish(std::move(expr));
  return negated ? make(Expr::Kind::kNot, line, std::move(expr)) : std::move(expr);
}

bool ExpressionParser::at_test_argument() const {
  switch (tokens_.peek().kind) {
    case Kind::kName:
      if (tokens_.at_name("is")) tokens_.fail("tests cannot be chained with 'is'");
      return !is_reserved(tokens_.peek().text);
    case Kind::kString:
    case Kind::kInteger:
    case Kind::kFloat:
      return true;
    default:
      return tokens_.at_operator("[") || tokens_.at_operator("{");
  }
}

}  // namespace kvarn::jinja
