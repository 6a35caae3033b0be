// Template source -> tokens, with the white space control of trim_blocks and lstrip_blocks.
// Comments and raw blocks are resolved here.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

namespace kvarn::jinja {

struct Token {
  enum class Kind : uint8_t {
    kText,           // between tags
    kVariableBegin,  // {{
    kVariableEnd,
    kBlockBegin,  // {%
    kBlockEnd,
    kName,
    kString,  // unescaped
    kInteger,
    kFloat,
    kOperator,
    kEnd,
  };
  Kind kind;
  std::string text;
  int line;
  friend bool operator==(const Token&, const Token&) = default;
};

// Throws TemplateError. The last token is kEnd.
std::vector<Token> tokenize(std::string_view source);

}  // namespace kvarn::jinja
