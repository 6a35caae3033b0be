#include "server/jinja/parser.h"

#include <algorithm>
#include <initializer_list>
#include <utility>

#include <fmt/format.h>

#include "server/jinja/error.h"
#include "server/jinja/expression_parser.h"
#include "server/jinja/lexer.h"

namespace kvarn::jinja {
namespace {

using Kind = Token::Kind;

constexpr int kMaxBlockDepth = 60;

class Parser {
 public:
  explicit Parser(std::string_view source) : tokens_(tokenize(source)) {}

  Block run() { return parse_block({}, 1); }

 private:
  static bool is_one_of(std::string_view name, std::initializer_list<std::string_view> names) {
    return std::find(names.begin(), names.end(), name) != names.end();
  }

  // Statements up to a block whose name is in `ends` (which stays unread, behind its {%), or to the
  // end of the template if `ends` is empty. `begin_line` is the block's, for the error.
  Block parse_block(std::initializer_list<std::string_view> ends, int begin_line) {
    Block block;
    if (++block_depth_ > kMaxBlockDepth)
      tokens_.fail(fmt::format("blocks nest deeper than {}", kMaxBlockDepth));
    while (true) {
      const Token token = tokens_.next();
      if (token.kind == Kind::kText) {
        auto stmt = make_stmt(Stmt::Kind::kText, token.line);
        stmt->text = token.text;
        block.push_back(std::move(stmt));
      } else if (token.kind == Kind::kVariableBegin) {
        auto stmt = make_stmt(Stmt::Kind::kPrint, token.line);
        stmt->expr = expressions_.parse_tuple(true, false);
        tokens_.expect(Kind::kVariableEnd, "'}}'");
        block.push_back(std::move(stmt));
      } else if (token.kind == Kind::kBlockBegin) {
        if (tokens_.peek().kind != Kind::kName)
          tokens_.fail("expected a block's name, got " + described(tokens_.peek()));
        if (is_one_of(tokens_.peek().text, ends)) break;
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
    tokens_.expect(Kind::kBlockEnd, "'%}'");
    Block body = parse_block({end}, begin_line);
    tokens_.next();
    tokens_.expect(Kind::kBlockEnd, "'%}'");
    return body;
  }

  static std::unique_ptr<Stmt> make_stmt(Stmt::Kind kind, int line) {
    auto stmt = std::make_unique<Stmt>();
    stmt->kind = kind;
    stmt->line = line;
    return stmt;
  }

  std::unique_ptr<Stmt> parse_statement() {
    const Token token = tokens_.next();
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
      tokens_.expect(Kind::kBlockEnd, "'%}'");
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
    if (with_member && tokens_.peek().kind == Kind::kName &&
        tokens_.peek(1).kind == Kind::kOperator && tokens_.peek(1).text == ".") {
      Target target{Target::Kind::kMember, tokens_.expect_name("a namespace"), "", {}};
      tokens_.next();
      target.member = tokens_.expect_name("a member's name");
      return target;
    }
    const TokenCursor::Nesting nesting(tokens_, kMaxExprDepth);
    std::vector<Target> parts;
    bool is_tuple = false;
    while (true) {
      if (tokens_.skip_operator("(")) {
        parts.push_back(parse_target(with_member));
        tokens_.expect_operator(")");
      } else {
        const std::string name = tokens_.expect_name("a name to assign to");
        if (is_one_of(name, {"true", "false", "none", "True", "False", "None"})) {
          tokens_.fail(fmt::format("cannot assign to {}", name));
        }
        parts.push_back({Target::Kind::kName, name, "", {}});
      }
      if (!tokens_.skip_operator(",")) break;
      is_tuple = true;
      if (tokens_.at_operator("=") || tokens_.at_operator(")") || tokens_.at_name("in") ||
          expressions_.at_tuple_end())
        break;
    }
    if (!is_tuple) return std::move(parts.front());
    return {Target::Kind::kTuple, "", "", std::move(parts)};
  }

  std::unique_ptr<Stmt> parse_set(int line) {
    Target target = parse_target(true);
    if (tokens_.skip_operator("=")) {
      auto stmt = make_stmt(Stmt::Kind::kSet, line);
      stmt->target = std::move(target);
      stmt->expr = expressions_.parse_tuple(true, false);
      tokens_.expect(Kind::kBlockEnd, "'%}'");
      return stmt;
    }
    auto stmt = make_stmt(Stmt::Kind::kSetBlock, line);
    stmt->target = std::move(target);
    if (tokens_.skip_operator("|")) stmt->expr = expressions_.parse_filter_chain(line);
    stmt->body = parse_body("endset", line);
    return stmt;
  }

  std::unique_ptr<Stmt> parse_if(int line) {
    auto stmt = make_stmt(Stmt::Kind::kIf, line);
    while (true) {
      Stmt::Branch branch;
      branch.condition = expressions_.parse_tuple(false, false);
      tokens_.expect(Kind::kBlockEnd, "'%}'");
      branch.body = parse_block({"elif", "else", "endif"}, line);
      stmt->branches.push_back(std::move(branch));
      const Token end = tokens_.next();
      if (end.text == "elif") continue;
      if (end.text == "else") {
        stmt->body = parse_body("endif", line);
      } else {
        tokens_.expect(Kind::kBlockEnd, "'%}'");
      }
      return stmt;
    }
  }

  std::unique_ptr<Stmt> parse_for(int line) {
    auto stmt = make_stmt(Stmt::Kind::kFor, line);
    stmt->target = parse_target(false);
    if (!tokens_.skip_name("in")) tokens_.fail("expected 'in', got " + described(tokens_.peek()));
    stmt->expr = expressions_.parse_tuple(false, false);
    if (tokens_.skip_name("if")) stmt->condition = expressions_.parse_expression();
    if (tokens_.at_name("recursive")) tokens_.fail("a recursive loop is not supported");
    tokens_.expect(Kind::kBlockEnd, "'%}'");
    ++loop_depth_;
    stmt->body = parse_block({"else", "endfor"}, line);
    --loop_depth_;
    if (tokens_.next().text == "else") {
      stmt->orelse = parse_body("endfor", line);
    } else {
      tokens_.expect(Kind::kBlockEnd, "'%}'");
    }
    return stmt;
  }

  std::unique_ptr<Stmt> parse_macro(int line) {
    auto stmt = make_stmt(Stmt::Kind::kMacro, line);
    stmt->name = tokens_.expect_name("the macro's name");
    tokens_.expect_operator("(");
    while (!tokens_.at_operator(")")) {
      if (!stmt->params.empty()) tokens_.expect_operator(",");
      Stmt::Param param;
      param.name = tokens_.expect_name("a parameter's name");
      if (tokens_.skip_operator("=")) {
        param.default_value = expressions_.parse_expression();
      } else if (!stmt->params.empty() && stmt->params.back().default_value) {
        tokens_.fail("a parameter without a default must not follow one with a default");
      }
      stmt->params.push_back(std::move(param));
    }
    tokens_.next();
    const bool outer_varargs = std::exchange(expressions_.saw_varargs, false);
    const bool outer_kwargs = std::exchange(expressions_.saw_kwargs, false);
    const int outer_loops = std::exchange(loop_depth_, 0);
    stmt->body = parse_body("endmacro", line);
    loop_depth_ = outer_loops;
    stmt->uses_varargs = std::exchange(expressions_.saw_varargs, outer_varargs);
    stmt->uses_kwargs = std::exchange(expressions_.saw_kwargs, outer_kwargs);
    return stmt;
  }

  std::unique_ptr<Stmt> parse_with(int line) {
    auto stmt = make_stmt(Stmt::Kind::kScope, line);
    while (tokens_.peek().kind != Kind::kBlockEnd) {
      if (!stmt->params.empty()) tokens_.expect_operator(",");
      Stmt::Param param;
      param.name = tokens_.expect_name("a name to assign to");
      tokens_.expect_operator("=");
      param.default_value = expressions_.parse_expression();
      stmt->params.push_back(std::move(param));
    }
    stmt->body = parse_body("endwith", line);
    return stmt;
  }

  std::unique_ptr<Stmt> parse_filter_block(int line) {
    auto stmt = make_stmt(Stmt::Kind::kFilter, line);
    stmt->expr = expressions_.parse_filter_chain(line);
    stmt->body = parse_body("endfilter", line);
    return stmt;
  }

  TokenCursor tokens_;
  ExpressionParser expressions_{tokens_};
  int block_depth_ = 0, loop_depth_ = 0;
};

}  // namespace

Block parse(std::string_view source) { return Parser(source).run(); }

}  // namespace kvarn::jinja
