// Walking UTF-8: one step per character or per ill-formed piece. An ill-formed piece is a maximal
// subpart (Unicode 3.9, table 3-8): the longest beginning of a character, or else one byte; each
// stands for one U+FFFD, as in every decoder that follows the WHATWG rules.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <string_view>

namespace kvarn {

inline constexpr std::string_view kReplacementCharacter = "\xEF\xBF\xBD";

struct Utf8Step {
  enum class Kind : uint8_t { kCharacter, kInvalid, kIncomplete };  // kIncomplete: cut by the end
  Kind kind;
  uint8_t length;       // bytes, 1..4
  char32_t code_point;  // of a kCharacter
};

// `text` is not empty.
Utf8Step utf8_step(std::string_view text);
void append_utf8(char32_t code_point, std::string& out);
bool is_ascii(std::string_view text);
// First byte that is not ASCII, or the size.
size_t ascii_prefix(std::string_view text);

}  // namespace kvarn
