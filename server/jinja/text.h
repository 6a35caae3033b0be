// Python's string functions over UTF-8: indices and lengths count code points.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

namespace kvarn::jinja {

bool is_space(char32_t c);  // str.isspace()
std::u32string decode(std::string_view text);
std::string encode(std::u32string_view text);
int64_t count_chars(std::string_view text);

enum class Side : uint8_t { kLeft, kRight, kBoth };
std::string_view strip(std::string_view text, Side side);                          // white space
std::string_view strip(std::string_view text, std::string_view chars, Side side);  // these

std::string to_upper(std::string_view text);
std::string to_lower(std::string_view text);
std::string to_capitalized(std::string_view text);
std::string to_title(std::string_view text);  // str.title()

std::string replace(std::string_view text, std::string_view from, std::string_view to,
                    int64_t max_count);  // negative: all
// At each `separator`, at most `max_splits` times (negative: no limit), from the right if asked.
std::vector<std::string> split(std::string_view text, std::string_view separator,
                               int64_t max_splits, bool from_right);
std::vector<std::string> split_space(std::string_view text, int64_t max_splits, bool from_right);
std::vector<std::string> split_lines(std::string_view text, bool keep_ends);

bool is_printable(char32_t c);  // str.isprintable()
bool is_alpha(char32_t c);
bool is_digit(char32_t c);
bool is_upper(char32_t c);
bool is_lower(char32_t c);

}  // namespace kvarn::jinja
