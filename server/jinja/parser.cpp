#include "server/jinja/parser.h"

#include <algorithm>
#include <array>
#include <charconv>
#include <initializer_list>
#include <utility>

#include <fmt/format.h>

#include "server/jinja/builtins.h"
#include "server/jinja/error.h"
#include "server/jinja/lexer.h"

namespace kvarn::jinja {
namespace {

using Kind = Token::Kind;

constexpr int kMaxExprDepth = 200;  // far above real templates; see Expr::depth
constexpr int kMaxBlockDepth = 60;
constexpr std::array<std::string_view, 7> kReserved = {"and", "or", "not", "in",
                                                       "is",  "if", "else"};

std::string described(const Token& token) {
  switch (token.kind) {
    case Kind::kText:
      return "text";
    case Kind::kVariableBegin:
      return "'{{'";
    case Kind::kVariableEnd:
      return "'}}'";
    case Kind::kBlockBegin:
      return "'{%'";
    case Kind::kBlockEnd:
      return "'%}'";
    case Kind::kEnd:
      return "the end of the template";
    case Kind::kString:
      return "a string";
    default:
      return fmt::format("'{}'", token.text);
  }
}

class Parser {
 public:
  explicit Parser(std::string_view source) : tokens_(tokenize(source)) {}

  Block run() { return parse_block({}, 1); }

 private:
  // ---- tokens
  const Token& peek(size_t ahead = 0) const {
    return tokens_[std::min(index_ + ahead, tokens_.size() - 1)];
  }
  Token next() {
    Token token = peek();
    if (index_ + 1 < tokens_.size()) ++index_;
    return token;
  }
  [[noreturn]] void fail(const std::string& message) const {
    throw TemplateError(message, peek().line);
  }
  bool at_operator(std::string_view op) const {
    return peek().kind == Kind::kOperator && peek().text == op;
  }
  bool at_name(std::string_view name) const {
    return peek().kind == Kind::kName && peek().text == name;
  }
  bool skip_operator(std::string_view op) {
    if (!at_operator(op)) return false;
    next();
    return true;
  }
  bool skip_name(std::string_view name) {
    if (!at_name(name)) return false;
    next();
    return true;
  }
  void expect_operator(std::string_view op) {
    if (!skip_operator(op)) fail(fmt::format("expected '{}', got {}", op, described(peek())));
  }
  std::string expect_name(std::string_view what) {
    if (peek().kind != Kind::kName || is_reserved(peek().text)) {
      fail(fmt::format("expected {}, got {}", what, described(peek())));
    }
    return next().text;
  }
  void expect(Kind kind, std::string_view what) {
    if (peek().kind != kind) fail(fmt::format("expected {}, got {}", what, described(peek())));
    next();
  }
  static bool is_reserved(std::string_view name) {
    return std::find(kReserved.begin(), kReserved.end(), name) != kReserved.end();
  }

  // ---- expressions
  // Takes the depth from the children.
  ExprPtr finish(ExprPtr expr) const {
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
  ExprPtr make(Expr::Kind kind, int line) const {
    auto expr = std::make_unique<Expr>();
    expr->kind = kind;
    expr->line = line;
    return expr;
  }
  template <typename... Args>
  ExprPtr make(Expr::Kind kind, int line, ExprPtr first, Args... rest) const {
    ExprPtr expr = make(kind, line);
    expr->args.push_back(std::move(first));
    (expr->args.push_back(std::move(rest)), ...);
    return finish(std::move(expr));
  }
  ExprPtr constant(Value value, int line) const {
    ExprPtr expr = make(Expr::Kind::kConst, line);
    expr->constant = std::move(value);
    return expr;
  }

  // Counts nesting while it lives, so that "((((" cannot exhaust the stack.
  struct Nesting {
    explicit Nesting(Parser& parser, int limit) : depth(parser.depth_) {
      if (++depth > limit) {
        --depth;
        parser.fail(fmt::format("nested deeper than {}", limit));
      }
    }
    ~Nesting() { --depth; }
    Nesting(const Nesting&) = delete;
    Nesting& operator=(const Nesting&) = delete;
    int& depth;
  };

  ExprPtr parse_expression(bool with_condition = true) {
    const Nesting nesting(*this, kMaxExprDepth);
    return with_condition ? parse_condition() : parse_or();
  }

  ExprPtr parse_condition() {
    ExprPtr expr = parse_or();
    while (at_name("if")) {
      const int line = next().line;
      ExprPtr condition = parse_or();
      ExprPtr otherwise = skip_name("else") ? parse_expression() : nullptr;
      expr = make(Expr::Kind::kCondition, line, std::move(expr), std::move(condition),
                  std::move(otherwise));
    }
    return expr;
  }

  ExprPtr parse_or() {
    ExprPtr left = parse_and();
    while (at_name("or")) {
      const int line = next().line;
      left = make(Expr::Kind::kOr, line, std::move(left), parse_and());
    }
    return left;
  }

  ExprPtr parse_and() {
    ExprPtr left = parse_not();
    while (at_name("and")) {
      const int line = next().line;
      left = make(Expr::Kind::kAnd, line, std::move(left), parse_not());
    }
    return left;
  }

  ExprPtr parse_not() {
    if (!at_name("not")) return parse_compare();
    const Nesting nesting(*this, kMaxExprDepth);
    const int line = next().line;
    return make(Expr::Kind::kNot, line, parse_not());
  }

  bool take_compare(CompareOp& op) {
    static constexpr std::pair<std::string_view, CompareOp> kOps[] = {
        {"==", CompareOp::kEq}, {"!=", CompareOp::kNe}, {"<", CompareOp::kLt},
        {"<=", CompareOp::kLe}, {">", CompareOp::kGt},  {">=", CompareOp::kGe},
    };
    for (const auto& [text, value] : kOps) {
      if (skip_operator(text)) {
        op = value;
        return true;
      }
    }
    if (skip_name("in")) {
      op = CompareOp::kIn;
      return true;
    }
    if (at_name("not") && peek(1).kind == Kind::kName && peek(1).text == "in") {
      next();
      next();
      op = CompareOp::kNotIn;
      return true;
    }
    return false;
  }

  ExprPtr parse_compare() {
    const int line = peek().line;
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

  ExprPtr binary(BinaryOp op, int line, ExprPtr left, ExprPtr right) const {
    ExprPtr expr = make(Expr::Kind::kBinary, line, std::move(left), std::move(right));
    expr->binary = op;
    return expr;
  }

  ExprPtr parse_sum() {
    ExprPtr left = parse_concat();
    while (at_operator("+") || at_operator("-")) {
      const Token op = next();
      left = binary(op.text == "+" ? BinaryOp::kAdd : BinaryOp::kSub, op.line, std::move(left),
                    parse_concat());
    }
    return left;
  }

  ExprPtr parse_concat() {
    const int line = peek().line;
    ExprPtr first = parse_product();
    if (!at_operator("~")) return first;
    ExprPtr expr = make(Expr::Kind::kConcat, line);
    expr->args.push_back(std::move(first));
    while (skip_operator("~")) expr->args.push_back(parse_product());
    return finish(std::move(expr));
  }

  ExprPtr parse_product() {
    static constexpr std::pair<std::string_view, BinaryOp> kOps[] = {{"*", BinaryOp::kMul},
                                                                     {"/", BinaryOp::kDiv},
                                                                     {"//", BinaryOp::kFloorDiv},
                                                                     {"%", BinaryOp::kMod}};
    ExprPtr left = parse_power();
    while (true) {
      const auto* op = std::find_if(std::begin(kOps), std::end(kOps),
                                    [this](const auto& o) { return at_operator(o.first); });
      if (op == std::end(kOps)) return left;
      const int line = next().line;
      left = binary(op->second, line, std::move(left), parse_power());
    }
  }

  ExprPtr parse_power() {  // left-associative, and a sign binds closer, as in Jinja
    ExprPtr left = parse_unary(true);
    while (at_operator("**")) {
      const int line = next().line;
      left = binary(BinaryOp::kPow, line, std::move(left), parse_unary(true));
    }
    return left;
  }

  ExprPtr parse_unary(bool with_filters) {
    const Nesting nesting(*this, kMaxExprDepth);
    const int line = peek().line;
    ExprPtr expr;
    if (skip_operator("-")) {
      expr = make(Expr::Kind::kNegate, line, parse_unary(false));
    } else if (skip_operator("+")) {
      expr = make(Expr::Kind::kPositive, line, parse_unary(false));
    } else {
      expr = parse_primary();
    }
    expr = parse_postfix(std::move(expr));
    return with_filters ? parse_filters(std::move(expr)) : std::move(expr);
  }

  ExprPtr parse_primary() {
    const Token token = next();
    switch (token.kind) {
      case Kind::kName:
        return parse_name(token);
      case Kind::kString: {
        std::string text = token.text;
        while (peek().kind == Kind::kString) text += next().text;  // "a" "b"
        return constant(Value::string(std::move(text)), token.line);
      }
      case Kind::kInteger:
        return constant(integer(token), token.line);
      case Kind::kFloat:
        return constant(Value::real(std::stod(token.text)), token.line);
      case Kind::kOperator:
        if (token.text == "(") {
          ExprPtr expr = parse_tuple(true, true);
          expect_operator(")");
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

  static Value integer(const Token& token) {
    int64_t value = 0;
    const char* end = token.text.data() + token.text.size();
    if (std::from_chars(token.text.data(), end, value).ec != std::errc{}) {
      throw TemplateError(fmt::format("integer {} does not fit into 64 bits", token.text),
                          token.line);
    }
    return Value::integer(value);
  }

  ExprPtr parse_name(const Token& token) {
    const std::string& name = token.text;
    if (name == "true" || name == "True") return constant(Value::boolean(true), token.line);
    if (name == "false" || name == "False") return constant(Value::boolean(false), token.line);
    if (name == "none" || name == "None") return constant(Value(), token.line);
    if (is_reserved(name)) {
      throw TemplateError(fmt::format("expected an expression, got '{}'", name), token.line);
    }
    saw_varargs_ |= name == "varargs";
    saw_kwargs_ |= name == "kwargs";
    ExprPtr expr = make(Expr::Kind::kName, token.line);
    expr->name = name;
    return expr;
  }

  bool at_tuple_end() const {
    return peek().kind == Kind::kVariableEnd || peek().kind == Kind::kBlockEnd || at_operator(")");
  }

  // One expression, or several with commas between: a tuple.
  ExprPtr parse_tuple(bool with_condition, bool may_be_empty) {
    const int line = peek().line;
    std::vector<ExprPtr> items;
    bool is_tuple = false;
    while (!at_tuple_end()) {
      items.push_back(parse_expression(with_condition));
      if (!skip_operator(",")) break;
      is_tuple = true;
    }
    if (!is_tuple && items.size() == 1) return std::move(items.front());
    if (!is_tuple && !may_be_empty) fail("expected an expression, got " + described(peek()));
    ExprPtr expr = make(Expr::Kind::kTuple, line);
    expr->args = std::move(items);
    return finish(std::move(expr));
  }

  ExprPtr parse_list(int line) {
    ExprPtr expr = make(Expr::Kind::kList, line);
    while (!at_operator("]")) {
      if (!expr->args.empty()) expect_operator(",");
      if (at_operator("]")) break;
      expr->args.push_back(parse_expression());
    }
    next();
    return finish(std::move(expr));
  }

  ExprPtr parse_dict(int line) {
    ExprPtr expr = make(Expr::Kind::kDict, line);
    while (!at_operator("}")) {
      if (!expr->args.empty()) expect_operator(",");
      if (at_operator("}")) break;
      expr->args.push_back(parse_expression());
      expect_operator(":");
      expr->args.push_back(parse_expression());
    }
    next();
    return finish(std::move(expr));
  }

  ExprPtr parse_postfix(ExprPtr expr) {
    while (true) {
      const int line = peek().line;
      if (skip_operator(".")) {
        expr = parse_member(std::move(expr), line);
      } else if (skip_operator("[")) {
        expr = parse_subscript(std::move(expr), line);
      } else if (at_operator("(")) {
        expr = parse_call(std::move(expr), line);
      } else {
        return expr;
      }
    }
  }

  ExprPtr parse_member(ExprPtr object, int line) {
    const Token token = next();
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

  ExprPtr parse_subscript(ExprPtr object, int line) {
    std::array<ExprPtr, 3> bounds;
    size_t colons = 0;
    const auto at_bound_end = [this] { return at_operator(":") || at_operator("]"); };
    if (!at_bound_end()) bounds[0] = parse_expression();
    while (colons < 2 && skip_operator(":")) {
      ++colons;
      if (!at_bound_end()) bounds[colons] = parse_expression();
    }
    if (at_operator(",")) fail("an index of several parts is not supported");
    expect_operator("]");
    if (colons > 0) {
      return make(Expr::Kind::kSlice, line, std::move(object), std::move(bounds[0]),
                  std::move(bounds[1]), std::move(bounds[2]));
    }
    if (!bounds[0]) fail("expected an index between '[' and ']'");
    return make(Expr::Kind::kItem, line, std::move(object), std::move(bounds[0]));
  }

  ExprPtr parse_call(ExprPtr callee, int line) {
    ExprPtr expr = make(Expr::Kind::kCall, line);
    expr->args.push_back(std::move(callee));
    expr->call = parse_arguments();
    return finish(std::move(expr));
  }

  std::unique_ptr<Expr::Call> parse_arguments() {
    auto call = std::make_unique<Expr::Call>();
    expect_operator("(");
    bool is_first = true;
    while (!at_operator(")")) {
      if (!is_first) expect_operator(",");
      is_first = false;
      if (at_operator(")")) break;
      if (skip_operator("**")) {
        call->double_star = parse_expression();
      } else if (skip_operator("*")) {
        call->star = parse_expression();
      } else if (peek().kind == Kind::kName && peek(1).kind == Kind::kOperator &&
                 peek(1).text == "=") {
        std::string name = next().text;
        next();
        call->keyword.emplace_back(std::move(name), parse_expression());
      } else {
        if (!call->keyword.empty() || call->double_star) {
          fail("an argument without a name must not follow one with a name");
        }
        call->positional.push_back(parse_expression());
      }
    }
    next();
    return call;
  }

  ExprPtr parse_filters(ExprPtr expr) {
    while (true) {
      const int line = peek().line;
      if (skip_operator("|")) {
        expr = parse_filter(std::move(expr), line);
      } else if (skip_name("is")) {
        expr = parse_test(std::move(expr), line);
      } else if (at_operator("(")) {
        expr = parse_call(std::move(expr), line);
      } else {
        return expr;
      }
    }
  }

  ExprPtr parse_filter(ExprPtr input, int line) {
    ExprPtr expr = make(Expr::Kind::kFilter, line);
    expr->args.push_back(std::move(input));
    expr->name = expect_name("a filter's name");
    if (!is_filter(expr->name)) {
      throw TemplateError(fmt::format("filter '{}' is not supported", expr->name), line);
    }
    expr->call = at_operator("(") ? parse_arguments() : std::make_unique<Expr::Call>();
    return finish(std::move(expr));
  }

  // Of a filter block or a set block: filters only, the first one's input is the block's text.
  ExprPtr parse_filter_chain(int line) {
    ExprPtr expr = parse_filter(nullptr, line);
    while (skip_operator("|")) expr = parse_filter(std::move(expr), line);
    return expr;
  }

  ExprPtr parse_test(ExprPtr input, int line) {
    const bool negated = skip_name("not");
    ExprPtr expr = make(Expr::Kind::kTest, line);
    expr->args.push_back(std::move(input));
    if (peek().kind != Kind::kName) fail("expected a test's name, got " + described(peek()));
    expr->name = next().text;
    if (!is_test(expr->name)) {
      throw TemplateError(fmt::format("test '{}' is not supported", expr->name), line);
    }
    expr->call = std::make_unique<Expr::Call>();
    if (at_operator("(")) {
      expr->call = parse_arguments();
    } else if (at_test_argument()) {
      expr->call->positional.push_back(parse_postfix(parse_primary()));
    }
    expr = finish(std::move(expr));
    return negated ? make(Expr::Kind::kNot, line, std::move(expr)) : std::move(expr);
  }

  bool at_test_argument() const {
    switch (peek().kind) {
      case Kind::kName:
        if (at_name("is")) fail("tests cannot be chained with 'is'");
        return !is_reserved(peek().text);
      case Kind::kString:
      case Kind::kInteger:
      case Kind::kFloat:
        return true;
      default:
        return at_operator("[") || at_operator("{");
    }
  }

  // ---- statements
  static bool is_one_of(std::string_view name, std::initializer_list<std::string_view> names) {
    return std::find(names.begin(), names.end(), name) != names.end();
  }

  // Statements up to a block whose name is in `ends` (which stays unread, behind its {%), or to the
  // end of the template if `ends` is empty. `begin_line` is the block's, for the error.
  Block parse_block(std::initializer_list<std::string_view> ends, int begin_line) {
    Block block;
    if (++block_depth_ > kMaxBlockDepth)
      fail(fmt::format("blocks nest deeper than {}", kMaxBlockDepth));
    while (true) {
      const Token token = next();
      if (token.kind == Kind::kText) {
        auto stmt = make_stmt(Stmt::Kind::kText, token.line);
        stmt->text = token.text;
        block.push_back(std::move(stmt));
      } else if (token.kind == Kind::kVariableBegin) {
        auto stmt = make_stmt(Stmt::Kind::kPrint, token.line);
        stmt->expr = parse_tuple(true, false);
        expect(Kind::kVariableEnd, "'}}'");
        block.push_back(std::move(stmt));
      } else if (token.kind == Kind::kBlockBegin) {
        if (peek().kind != Kind::kName) fail("expected a block's name, got " + described(peek()));
        if (is_one_of(peek().text, ends)) break;
        block.push_back(parse_statement());
      } else if (ends.size() == 0) {
        break;
      } else {
        throw TemplateError(
            fmt::format("the block is not closed: expected {{% {} %}} before the end",
                        *(ends.end() - 1)),
            begin_line);
      }
    }
    --block_depth_;
    return block;
  }

  // The body of a block that ends with `end`, its opening tag's closing first.
  Block parse_body(std::string_view end, int begin_line) {
    expect(Kind::kBlockEnd, "'%}'");
    Block body = parse_block({end}, begin_line);
    next();
    expect(Kind::kBlockEnd, "'%}'");
    return body;
  }

  static std::unique_ptr<Stmt> make_stmt(Stmt::Kind kind, int line) {
    auto stmt = std::make_unique<Stmt>();
    stmt->kind = kind;
    stmt->line = line;
    return stmt;
  }

  std::unique_ptr<Stmt> parse_statement() {
    const Token token = next();
    const std::string& name = token.text;
    if (name == "set") return parse_set(token.line);
    if (name == "if") return parse_if(token.line);
    if (name == "for") return parse_for(token.line);
    if (name == "macro") return parse_macro(token.line);
    if (name == "with") return parse_with(token.line);
    if (name == "filter") return parse_filter_block(token.line);
    if (name == "generation") {  // marks text for training; it changes nothing here
      auto stmt = make_stmt(Stmt::Kind::kScope, token.line);
      stmt->body = parse_body("endgeneration", token.line);
      return stmt;
    }
    if (name == "break" || name == "continue") {
      if (loop_depth_ == 0) {
        throw TemplateError(fmt::format("{{% {} %}} is outside of a loop", name), token.line);
      }
      expect(Kind::kBlockEnd, "'%}'");
      return make_stmt(name == "break" ? Stmt::Kind::kBreak : Stmt::Kind::kContinue, token.line);
    }
    if (is_one_of(name, {"endif", "endfor", "endset", "endmacro", "elif", "else", "endwith",
                         "endfilter", "endgeneration", "endraw"})) {
      throw TemplateError(fmt::format("{{% {} %}} closes nothing", name), token.line);
    }
    throw TemplateError(
        fmt::format(
            "{{% {} %}} is not supported; supported: set, if, for, macro, with, filter, raw, "
            "generation, break, continue",
            name),
        token.line);
  }

  Target parse_target(bool with_member) {
    if (with_member && peek().kind == Kind::kName && peek(1).kind == Kind::kOperator &&
        peek(1).text == ".") {
      Target target{Target::Kind::kMember, expect_name("a namespace"), "", {}};
      next();
      target.member = expect_name("a member's name");
      return target;
    }
    const Nesting nesting(*this, kMaxExprDepth);
    std::vector<Target> parts;
    bool is_tuple = false;
    while (true) {
      if (skip_operator("(")) {
        parts.push_back(parse_target(with_member));
        expect_operator(")");
      } else {
        const std::string name = expect_name("a name to assign to");
        if (is_one_of(name, {"true", "false", "none", "True", "False", "None"})) {
          fail(fmt::format("cannot assign to {}", name));
        }
        parts.push_back({Target::Kind::kName, name, "", {}});
      }
      if (!skip_operator(",")) break;
      is_tuple = true;
      if (at_operator("=") || at_operator(")") || at_name("in") || at_tuple_end()) break;
    }
    if (!is_tuple) return std::move(parts.front());
    return {Target::Kind::kTuple, "", "", std::move(parts)};
  }

  std::unique_ptr<Stmt> parse_set(int line) {
    Target target = parse_target(true);
    if (skip_operator("=")) {
      auto stmt = make_stmt(Stmt::Kind::kSet, line);
      stmt->target = std::move(target);
      stmt->expr = parse_tuple(true, false);
      expect(Kind::kBlockEnd, "'%}'");
      return stmt;
    }
    auto stmt = make_stmt(Stmt::Kind::kSetBlock, line);
    stmt->target = std::move(target);
    if (skip_operator("|")) stmt->expr = parse_filter_chain(line);
    stmt->body = parse_body("endset", line);
    return stmt;
  }

  std::unique_ptr<Stmt> parse_if(int line) {
    auto stmt = make_stmt(Stmt::Kind::kIf, line);
    while (true) {
      Stmt::Branch branch;
      branch.condition = parse_tuple(false, false);
      expect(Kind::kBlockEnd, "'%}'");
      branch.body = parse_block({"elif", "else", "endif"}, line);
      stmt->branches.push_back(std::move(branch));
      const Token end = next();
      if (end.text == "elif") continue;
      if (end.text == "else") {
        stmt->body = parse_body("endif", line);
      } else {
        expect(Kind::kBlockEnd, "'%}'");
      }
      return stmt;
    }
  }

  std::unique_ptr<Stmt> parse_for(int line) {
    auto stmt = make_stmt(Stmt::Kind::kFor, line);
    stmt->target = parse_target(false);
    if (!skip_name("in")) fail("expected 'in', got " + described(peek()));
    stmt->expr = parse_tuple(false, false);
    if (skip_name("if")) stmt->condition = parse_expression();
    if (at_name("recursive")) fail("a recursive loop is not supported");
    expect(Kind::kBlockEnd, "'%}'");
    ++loop_depth_;
    stmt->body = parse_block({"else", "endfor"}, line);
    --loop_depth_;
    if (next().text == "else") {
      stmt->orelse = parse_body("endfor", line);
    } else {
      expect(Kind::kBlockEnd, "'%}'");
    }
    return stmt;
  }

  std::unique_ptr<Stmt> parse_macro(int line) {
    auto stmt = make_stmt(Stmt::Kind::kMacro, line);
    stmt->name = expect_name("the macro's name");
    expect_operator("(");
    while (!at_operator(")")) {
      if (!stmt->params.empty()) expect_operator(",");
      Stmt::Param param;
      param.name = expect_name("a parameter's name");
      if (skip_operator("=")) {
        param.default_value = parse_expression();
      } else if (!stmt->params.empty() && stmt->params.back().default_value) {
        fail("a parameter without a default must not follow one with a default");
      }
      stmt->params.push_back(std::move(param));
    }
    next();
    const bool outer_varargs = std::exchange(saw_varargs_, false);
    const bool outer_kwargs = std::exchange(saw_kwargs_, false);
    const int outer_loops = std::exchange(loop_depth_, 0);
    stmt->body = parse_body("endmacro", line);
    loop_depth_ = outer_loops;
    stmt->uses_varargs = std::exchange(saw_varargs_, outer_varargs);
    stmt->uses_kwargs = std::exchange(saw_kwargs_, outer_kwargs);
    return stmt;
  }

  std::unique_ptr<Stmt> parse_with(int line) {
    auto stmt = make_stmt(Stmt::Kind::kScope, line);
    while (peek().kind != Kind::kBlockEnd) {
      if (!stmt->params.empty()) expect_operator(",");
      Stmt::Param param;
      param.name = expect_name("a name to assign to");
      expect_operator("=");
      param.default_value = parse_expression();
      stmt->params.push_back(std::move(param));
    }
    stmt->body = parse_body("endwith", line);
    return stmt;
  }

  std::unique_ptr<Stmt> parse_filter_block(int line) {
    auto stmt = make_stmt(Stmt::Kind::kFilter, line);
    stmt->expr = parse_filter_chain(line);
    stmt->body = parse_body("endfilter", line);
    return stmt;
  }

  std::vector<Token> tokens_;
  size_t index_ = 0;
  int depth_ = 0, block_depth_ = 0, loop_depth_ = 0;
  bool saw_varargs_ = false, saw_kwargs_ = false;
};

}  // namespace

Block parse(std::string_view source) { return Parser(source).run(); }

}  // namespace kvarn::jinja
