#include "engine/tokenizer/byte_alphabet.h"

#include <array>

#include "engine/tokenizer/utf8.h"

namespace kvarn {
namespace {

constexpr bool stands_for_itself(int byte) {
  return (byte >= 0x21 && byte <= 0x7E) || (byte >= 0xA1 && byte <= 0xAC) || byte >= 0xAE;
}

constexpr int kNumShifted = 68;  // bytes that do not stand for themselves

struct Alphabet {
  std::array<char32_t, 256> to_char{};
  std::array<int, 256 + kNumShifted> to_byte{};  // by code point, -1: none
};

constexpr Alphabet make_alphabet() {
  Alphabet alphabet;
  for (int& byte : alphabet.to_byte) byte = -1;
  char32_t next = 0x100;
  for (int byte = 0; byte < 256; ++byte) {
    const char32_t c = stands_for_itself(byte) ? static_cast<char32_t>(byte) : next++;
    alphabet.to_char[static_cast<size_t>(byte)] = c;
    alphabet.to_byte[c] = byte;
  }
  return alphabet;
}

constexpr Alphabet kAlphabet = make_alphabet();
static_assert(kAlphabet.to_char[' '] == 0x120 && kAlphabet.to_char[0xAD] == 0x143);

}  // namespace

std::string byte_to_spelling(uint8_t byte) {
  std::string out;
  append_utf8(kAlphabet.to_char[byte], out);
  return out;
}

std::optional<std::string> spelling_to_bytes(std::string_view spelling) {
  std::string bytes;
  bytes.reserve(spelling.size());
  while (!spelling.empty()) {
    const Utf8Step step = utf8_step(spelling);
    if (step.kind != Utf8Step::Kind::kCharacter) return std::nullopt;
    if (step.code_point >= kAlphabet.to_byte.size()) return std::nullopt;
    const int byte = kAlphabet.to_byte[step.code_point];
    if (byte < 0) return std::nullopt;
    bytes.push_back(static_cast<char>(byte));
    spelling.remove_prefix(step.length);
  }
  return bytes;
}

}  // namespace kvarn
