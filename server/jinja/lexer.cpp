#include "server/jinja/lexer.h"

#include <algorithm>
#include <array>

#include <fmt/format.h>

#include "engine/tokenizer/utf8.h"
#include "server/jinja/error.h"
#include "server/jinja/text.h"

namespace kvarn::jinja {
namespace {

using Kind = Token::Kind;

bool is_name_start(char c) {
  return (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z') || c == '_' ||
         static_cast<uint8_t>(c) >= 0x80;
}
bool is_decimal(char c) { return c >= '0' && c <= '9'; }
bool is_ascii_space(char c) { return c == ' ' || (c >= '\t' && c <= '\r'); }

// Longest first.
constexpr std::array<std::string_view, 25> kOperators = {
    "//", "**", "==", "!=", ">=", "<=", "+", "-", "*", "/", "%", "~", "[",
    "]",  "(",  ")",  "{",  "}",  ">",  "<", "=", ".", ":", "|", ",",
};

// "\r\n" and "\r" become "\n"; one line end at the very end is dropped.
std::string normalized_lines(std::string_view source) {
  std::string out;
  out.reserve(source.size());
  for (size_t i = 0; i < source.size(); ++i) {
    if (source[i] != '\r') {
      out += source[i];
      continue;
    }
    out += '\n';
    if (i + 1 < source.size() && source[i + 1] == '\n') ++i;
  }
  if (out.ends_with('\n')) out.pop_back();
  return out;
}

class Lexer {
 public:
  explicit Lexer(std::string_view source) : source_(normalized_lines(source)) {}

  std::vector<Token> run() {
    while (position_ < source_.size()) {
      const size_t tag = find_tag();
      const std::string_view text = view().substr(position_, tag - position_);
      if (tag == source_.size()) {
        add_text(text);
        position_ = tag;
        break;
      }
      lex_tag(text, tag);
    }
    add(Kind::kEnd, "");
    return std::move(tokens_);
  }

 private:
  std::string_view view() const { return source_; }
  char at(size_t i) const { return i < source_.size() ? source_[i] : '\0'; }
  [[noreturn]] void fail(const std::string& message) const { throw TemplateError(message, line_); }

  size_t find_tag() const {
    for (size_t i = position_; i + 1 < source_.size(); ++i) {
      if (source_[i] == '{' &&
          (source_[i + 1] == '{' || source_[i + 1] == '%' || source_[i + 1] == '#')) {
        return i;
      }
    }
    return source_.size();
  }

  void add(Kind kind, std::string text) { tokens_.push_back({kind, std::move(text), line_}); }
  void add_text(std::string_view text) {
    if (!text.empty()) add(Kind::kText, std::string(text));
  }
  // Moves on to `end`, counting lines.
  void advance(size_t end) {
    line_ += static_cast<int>(std::count(source_.begin() + static_cast<ptrdiff_t>(position_),
                                         source_.begin() + static_cast<ptrdiff_t>(end), '\n'));
    position_ = end;
  }

  // The text before a tag, by the sign behind the tag's opening and lstrip_blocks.
  std::string_view text_before(std::string_view text, char sign, bool is_variable) const {
    if (sign == '-') return strip(text, Side::kRight);
    if (sign == '+' || is_variable) return text;
    const size_t newline = text.rfind('\n');
    const size_t line_begin = newline == text.npos ? 0 : newline + 1;
    if (line_begin == 0 && !line_starting_) return text;
    const std::string_view indent = text.substr(line_begin);
    return strip(indent, Side::kBoth).empty() ? text.substr(0, line_begin) : text;
  }

  // Behind a tag's closing: "-" takes all white space, trim_blocks one line end.
  void skip_after(bool minus, bool trim_line) {
    size_t end = position_;
    if (minus) {
      const std::string_view rest = view().substr(position_);
      end += rest.size() - strip(rest, Side::kLeft).size();
    } else if (trim_line && at(position_) == '\n') {
      ++end;
    }
    advance(end);
    line_starting_ = position_ > 0 && source_[position_ - 1] == '\n';
  }

  void lex_tag(std::string_view text, size_t tag) {
    const char type = source_[tag + 1];
    const char sign = at(tag + 2);
    const bool has_sign = sign == '-' || (sign == '+' && type != '{');
    add_text(text_before(text, has_sign ? sign : ' ', type == '{'));
    advance(tag);
    const size_t body = tag + 2 + (has_sign ? 1 : 0);
    if (type == '#') return lex_comment(body);
    if (type == '%' && lex_raw(body)) return;
    add(type == '{' ? Kind::kVariableBegin : Kind::kBlockBegin, "");
    advance(body);
    lex_expression(type == '{');
  }

  void lex_comment(size_t body) {
    const size_t end = view().find("#}", body);
    if (end == source_.npos) fail("comment {# is not closed");
    const bool minus = end > body && source_[end - 1] == '-';
    const bool plus = end > body && source_[end - 1] == '+';
    advance(end + 2);
    skip_after(minus, !plus);
  }

  size_t skip_space(size_t i) const {
    while (i < source_.size() && is_ascii_space(source_[i])) ++i;
    return i;
  }

  // {% raw %} ... {% endraw %}. False if the block at `body` is another one.
  bool lex_raw(size_t body) {
    size_t i = skip_space(body);
    if (!view().substr(i).starts_with("raw")) return false;
    i = skip_space(i + 3);
    const bool minus = at(i) == '-';
    if (minus) ++i;
    if (!view().substr(i).starts_with("%}")) return false;
    const int begin_line = line_;
    advance(i + 2);
    skip_after(minus, false);
    for (size_t tag = view().find("{%", position_); tag != source_.npos;
         tag = view().find("{%", tag + 2)) {
      const char sign = at(tag + 2);
      const bool has_sign = sign == '-' || sign == '+';
      size_t end = skip_space(tag + 2 + (has_sign ? 1 : 0));
      if (!view().substr(end).starts_with("endraw")) continue;
      end = skip_space(end + 6);
      const char close = at(end);
      if (close == '-' || close == '+') ++end;
      if (!view().substr(end).starts_with("%}")) continue;
      add_text(
          text_before(view().substr(position_, tag - position_), has_sign ? sign : ' ', false));
      advance(end + 2);
      skip_after(close == '-', close != '+');
      return true;
    }
    throw TemplateError("{% raw %} is not closed by {% endraw %}", begin_line);
  }

  // Up to the closing of the tag; inside brackets "}}" and "%}" do not close it.
  void lex_expression(bool is_variable) {
    const int begin_line = line_;
    const std::string_view close = is_variable ? "}}" : "%}";
    std::string brackets;
    while (true) {
      advance(skip_space(position_));
      if (position_ >= source_.size()) {
        throw TemplateError(
            fmt::format("tag {} is not closed by {}", is_variable ? "{{" : "{%", close),
            begin_line);
      }
      if (brackets.empty()) {
        const bool signed_close =
            (at(position_) == '-' || (at(position_) == '+' && !is_variable)) &&
            view().substr(position_ + 1).starts_with(close);
        if (signed_close || view().substr(position_).starts_with(close)) {
          const bool minus = signed_close && at(position_) == '-';
          add(is_variable ? Kind::kVariableEnd : Kind::kBlockEnd, "");
          advance(position_ + (signed_close ? 3 : 2));
          skip_after(minus, !is_variable && !signed_close);
          return;
        }
      }
      lex_token(brackets);
    }
  }

  void lex_token(std::string& brackets) {
    const char c = source_[position_];
    if (is_name_start(c)) {
      size_t end = position_ + 1;
      while (is_name_start(at(end)) || is_decimal(at(end))) ++end;
      add(Kind::kName, source_.substr(position_, end - position_));
      return advance(end);
    }
    if (is_decimal(c)) return lex_number();
    if (c == '"' || c == '\'') return lex_string(c);
    const auto* op = std::find_if(kOperators.begin(), kOperators.end(), [this](std::string_view o) {
      return view().substr(position_).starts_with(o);
    });
    if (op == kOperators.end()) {
      const Utf8Step step = utf8_step(view().substr(position_));
      fail(fmt::format("unexpected character '{}'", view().substr(position_, step.length)));
    }
    track_brackets(op->front(), op->size(), brackets);
    add(Kind::kOperator, std::string(*op));
    advance(position_ + op->size());
  }

  void track_brackets(char c, size_t length, std::string& brackets) const {
    if (length != 1) return;
    if (c == '(') brackets += ')';
    if (c == '[') brackets += ']';
    if (c == '{') brackets += '}';
    if (c != ')' && c != ']' && c != '}') return;
    if (brackets.empty()) fail(fmt::format("unexpected '{}'", c));
    if (brackets.back() != c)
      fail(fmt::format("unexpected '{}', expected '{}'", c, brackets.back()));
    brackets.pop_back();
  }

  // Digits with single underscores between them.
  size_t digits_end(size_t i) const {
    while (is_decimal(at(i)) || (at(i) == '_' && is_decimal(at(i + 1)))) ++i;
    return i;
  }

  void lex_number() {
    const bool after_dot = !tokens_.empty() && tokens_.back().kind == Kind::kOperator &&
                           tokens_.back().text == "." && position_ > 0 &&
                           source_[position_ - 1] == '.';  // x.0.1 has two indices
    size_t end = digits_end(position_);
    bool is_float = false;
    if (!after_dot) {
      if (at(end) == '.' && is_decimal(at(end + 1))) {
        end = digits_end(end + 1);
        is_float = true;
      }
      size_t e = end;
      if (at(e) == 'e' || at(e) == 'E') {
        ++e;
        if (at(e) == '+' || at(e) == '-') ++e;
        if (is_decimal(at(e))) {
          end = digits_end(e);
          is_float = true;
        }
      }
    }
    std::string digits = source_.substr(position_, end - position_);
    std::erase(digits, '_');
    if (!is_float && digits.size() > 1 && digits.find_first_not_of('0') != digits.npos &&
        digits.front() == '0') {
      fail(fmt::format("number '{}' begins with 0", digits));
    }
    if (digits == "0" && end == position_ + 1 && is_name_start(at(end)) &&
        std::string_view("xXbBoO").find(at(end)) != std::string_view::npos) {
      fail("hexadecimal, octal and binary numbers are not supported: write it in decimal");
    }
    add(is_float ? Kind::kFloat : Kind::kInteger, std::move(digits));
    advance(end);
  }

  void lex_string(char quote) {
    std::string value;
    size_t i = position_ + 1;
    while (true) {
      if (i >= source_.size()) fail("string is not closed");
      if (source_[i] == quote) break;
      if (source_[i] != '\\') {
        value += source_[i++];
        continue;
      }
      if (i + 1 >= source_.size()) fail("string is not closed");
      i = lex_escape(i + 1, value);
    }
    add(Kind::kString, std::move(value));
    advance(i + 1);
  }

  // As Python reads them; an unknown one keeps its backslash. `i` is behind the backslash.
  size_t lex_escape(size_t i, std::string& value) const {
    const char c = source_[i];
    constexpr std::string_view kLetters = "abfnrtv\\'\"", kMeanings = "\a\b\f\n\r\t\v\\'\"";
    if (const size_t index = kLetters.find(c); index != kLetters.npos) {
      value += kMeanings[index];
      return i + 1;
    }
    if (c == '\n') return i + 1;
    if (c >= '0' && c <= '7') {
      char32_t code = 0;
      size_t end = i;
      while (end < i + 3 && at(end) >= '0' && at(end) <= '7') {
        code = code * 8 + static_cast<char32_t>(source_[end++] - '0');
      }
      append_utf8(code, value);
      return end;
    }
    if (c == 'N') fail("escape \\N{...} is not supported: write the character itself");
    const size_t digits = c == 'x' ? 2 : c == 'u' ? 4 : c == 'U' ? 8 : 0;
    if (digits == 0) {
      value += '\\';
      return i;
    }
    char32_t code = 0;
    for (size_t k = i + 1; k <= i + digits; ++k) {
      const char h = at(k);
      const int digit = is_decimal(h)          ? h - '0'
                        : h >= 'a' && h <= 'f' ? h - 'a' + 10
                        : h >= 'A' && h <= 'F' ? h - 'A' + 10
                                               : -1;
      if (digit < 0) fail(fmt::format("escape \\{} needs {} hexadecimal digits", c, digits));
      code = code * 16 + static_cast<char32_t>(digit);
    }
    if (code > 0x10FFFF || (code >= 0xD800 && code < 0xE000)) {
      fail(fmt::format("escape \\{} is no Unicode character", c));
    }
    append_utf8(code, value);
    return i + 1 + digits;
  }

  std::string source_;
  size_t position_ = 0;
  int line_ = 1;
  bool line_starting_ = true;  // nothing but white space was seen in the line so far
  std::vector<Token> tokens_;
};

}  // namespace

std::vector<Token> tokenize(std::string_view source) { return Lexer(source).run(); }

}  // namespace kvarn::jinja
