#include "server/jinja/token_cursor.h"

#include <array>

#include <fmt/format.h>

#include "server/jinja/error.h"

namespace kvarn::jinja {

std::string described(const Token& token) {
  using Kind = Token::Kind;
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

bool is_reserved(std::string_view name) {
  constexpr std::array<std::string_view, 7> kReserved = {"and", "or", "not", "in",
                                                         "is",  "if", "else"};
  return std::find(kReserved.begin(), kReserved.end(), name) != kReserved.end();
}

TokenCursor::Nesting::Nesting(TokenCursor& cursor, int limit) : depth(cursor.depth_) {
  if (++depth <= limit) return;
  --depth;
  cursor.fail(fmt::format("nested deeper than {}", limit));
}

Token TokenCursor::next() {
  Token token = peek();
  if (index_ + 1 < tokens_.size()) ++index_;
  return token;
}

void TokenCursor::fail(const std::string& message) const {
  throw TemplateError(message, peek().line);
}

bool TokenCursor::skip_operator(std::string_view op) {
  if (!at_operator(op)) return false;
  next();
  return true;
}

bool TokenCursor::skip_name(std::string_view name) {
  if (!at_name(name)) return false;
  next();
  return true;
}

void TokenCursor::expect_operator(std::string_view op) {
  if (!skip_operator(op)) fail(fmt::format("expected '{}', got {}", op, described(peek())));
}

std::string TokenCursor::expect_name(std::string_view what) {
  if (peek().kind != Token::Kind::kName || is_reserved(peek().text)) {
    fail(fmt::format("expected {}, got {}", what, described(peek())));
  }
  return next().text;
}

void TokenCursor::expect(Token::Kind kind, std::string_view what) {
  if (peek().kind != kind) fail(fmt::format("expected {}, got {}", what, described(peek())));
  next();
}

}  // namespace kvarn::jinja
