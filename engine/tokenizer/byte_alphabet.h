// Byte-level BPE spells bytes as printable characters: the 188 printable ones of Latin-1 stand for
// themselves, the other 68 bytes for U+0100 and up, in order.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <string_view>

namespace kvarn {

// The character for a byte, as UTF-8.
std::string byte_to_spelling(uint8_t byte);
// "Ġthe" -> " the". Empty if a character stands for no byte or the text is not UTF-8.
std::optional<std::string> spelling_to_bytes(std::string_view spelling);

}  // namespace kvarn
