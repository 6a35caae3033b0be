// A place in the tokens of a template, with the questions a parser asks there.
#pragma once

#include <algorithm>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "server/jinja/lexer.h"

namespace kvarn::jinja {

class TokenCursor {
 public:
  explicit TokenCursor(std::vector<Token> tokens) : tokens_(std::move(tokens)) {}

  const Token& peek(size_t ahead = 0) const {
    return tokens_[std::min(index_ + ahead, tokens_.size() - 1)];
  }
  Token next();
  [[noreturn]] void fail(const std::string& message) const;  // at the next token's line
  bool at_operator(std::string_view op) const {
    return peek().kind == Token::Kind::kOperator && peek().text == op;
  }
  bool at_name(std::string_view name) const {
    return peek().kind == Token::Kind::kName && peek().text == name;
  }
  bool skip_operator(std::string_view op);
  bool skip_name(std::string_view name);
  void expect_operator(std::string_view op);
  std::string expect_name(std::string_view what);
  void expect(Token::Kind kind, std::string_view what);

  // Counts nesting while it lives, so that "((((" cannot exhaust the stack.
  struct Nesting {
    Nesting(TokenCursor& cursor, int limit);
    ~Nesting() { --depth; }
    Nesting(const Nesting&) = delete;
    Nesting& operator=(const Nesting&) = delete;
    int& depth;
  };

 private:
  std::vector<Token> tokens_;  // the last one is kEnd
  size_t index_ = 0;
  int depth_ = 0;
};

bool is_reserved(std::string_view name);    // and, or, not, in, is, if, else
std::string described(const Token& token);  // for messages

}  // namespace kvarn::jinja
