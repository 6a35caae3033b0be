#include "server/jinja/text.h"

#include <algorithm>

#include <utf8proc.h>

#include "engine/tokenizer/utf8.h"

namespace kvarn::jinja {
namespace {

int32_t signed_of(char32_t c) { return static_cast<int32_t>(c); }

// The text's first or last character and its bytes. Values are valid UTF-8.
Utf8Step first_of(std::string_view text) { return utf8_step(text); }
Utf8Step last_of(std::string_view text) {
  size_t begin = text.size() - 1;
  while (begin > 0 && (static_cast<uint8_t>(text[begin]) & 0xC0) == 0x80) --begin;
  return utf8_step(text.substr(begin));
}

template <typename Predicate>
std::string_view strip_if(std::string_view text, Side side, Predicate drop) {
  if (side != Side::kRight) {
    while (!text.empty()) {
      const Utf8Step step = first_of(text);
      if (!drop(step.code_point)) break;
      text.remove_prefix(step.length);
    }
  }
  if (side != Side::kLeft) {
    while (!text.empty()) {
      const Utf8Step step = last_of(text);
      if (!drop(step.code_point)) break;
      text.remove_suffix(step.length);
    }
  }
  return text;
}

void append_upper(char32_t c, std::string& out) {
  // The one common letter whose capital is two letters; other such expansions are not made.
  if (c == 0xDF) {
    out += "SS";
  } else {
    append_utf8(static_cast<char32_t>(utf8proc_toupper(signed_of(c))), out);
  }
}

bool is_cased(char32_t c) { return is_upper(c) || is_lower(c); }

}  // namespace

bool is_space(char32_t c) {
  return (c >= 0x09 && c <= 0x0D) || (c >= 0x1C && c <= 0x20) || c == 0x85 || c == 0xA0 ||
         c == 0x1680 || (c >= 0x2000 && c <= 0x200A) || c == 0x2028 || c == 0x2029 || c == 0x202F ||
         c == 0x205F || c == 0x3000;
}

std::u32string decode(std::string_view text) {
  std::u32string out;
  out.reserve(text.size());
  while (!text.empty()) {
    const Utf8Step step = utf8_step(text);
    out.push_back(step.kind == Utf8Step::Kind::kCharacter ? step.code_point : U'\uFFFD');
    text.remove_prefix(step.length);
  }
  return out;
}

std::string encode(std::u32string_view text) {
  std::string out;
  for (const char32_t c : text) append_utf8(c, out);
  return out;
}

int64_t count_chars(std::string_view text) {
  return std::count_if(text.begin(), text.end(),
                       [](char c) { return (static_cast<uint8_t>(c) & 0xC0) != 0x80; });
}

std::string_view strip(std::string_view text, Side side) { return strip_if(text, side, is_space); }

std::string_view strip(std::string_view text, std::string_view chars, Side side) {
  const std::u32string set = decode(chars);
  return strip_if(text, side, [&set](char32_t c) { return set.find(c) != set.npos; });
}

std::string to_upper(std::string_view text) {
  std::string out;
  for (const char32_t c : decode(text)) append_upper(c, out);
  return out;
}

std::string to_lower(std::string_view text) {
  std::string out;
  for (const char32_t c : decode(text)) {
    append_utf8(static_cast<char32_t>(utf8proc_tolower(signed_of(c))), out);
  }
  return out;
}

std::string to_capitalized(std::string_view text) {
  if (text.empty()) return {};
  const Utf8Step first = first_of(text);
  std::string out;
  append_utf8(static_cast<char32_t>(utf8proc_totitle(signed_of(first.code_point))), out);
  return out + to_lower(text.substr(first.length));
}

std::string to_title(std::string_view text) {
  std::string out;
  bool in_word = false;
  for (const char32_t c : decode(text)) {
    const int32_t mapped =
        in_word ? utf8proc_tolower(signed_of(c)) : utf8proc_totitle(signed_of(c));
    append_utf8(static_cast<char32_t>(mapped), out);
    in_word = is_cased(c);
  }
  return out;
}

std::string replace(std::string_view text, std::string_view from, std::string_view to,
                    int64_t max_count) {
  std::string out;
  if (from.empty()) {  // between all characters, as Python does
    const std::u32string chars = decode(text);
    for (size_t i = 0; i <= chars.size(); ++i) {
      if (max_count < 0 || static_cast<int64_t>(i) < max_count) out += to;
      if (i < chars.size()) append_utf8(chars[i], out);
    }
    return out;
  }
  size_t done = 0;
  for (int64_t n = 0; max_count < 0 || n < max_count; ++n) {
    const size_t found = text.find(from, done);
    if (found == text.npos) break;
    out += text.substr(done, found - done);
    out += to;
    done = found + from.size();
  }
  out += text.substr(done);
  return out;
}

std::vector<std::string> split(std::string_view text, std::string_view separator,
                               int64_t max_splits, bool from_right) {
  std::vector<std::string> parts;
  const auto may_split = [&] {
    return max_splits < 0 || static_cast<int64_t>(parts.size()) < max_splits;
  };
  while (may_split()) {
    const size_t found = from_right ? text.rfind(separator) : text.find(separator);
    if (found == text.npos) break;
    if (from_right) {
      parts.emplace_back(text.substr(found + separator.size()));
      text = text.substr(0, found);
    } else {
      parts.emplace_back(text.substr(0, found));
      text.remove_prefix(found + separator.size());
    }
  }
  parts.emplace_back(text);
  if (from_right) std::reverse(parts.begin(), parts.end());
  return parts;
}

std::vector<std::string> split_space(std::string_view text, int64_t max_splits, bool from_right) {
  std::vector<std::string> parts;
  const Side outer = from_right ? Side::kRight : Side::kLeft;
  text = strip(text, outer);
  while (!text.empty()) {
    if (max_splits >= 0 && static_cast<int64_t>(parts.size()) >= max_splits) {
      parts.emplace_back(text);  // as it stands, with the white space at its other end
      break;
    }
    size_t length = 0;  // of the word at the outer end
    while (length < text.size()) {
      const std::string_view rest =
          from_right ? text.substr(0, text.size() - length) : text.substr(length);
      const Utf8Step step = from_right ? last_of(rest) : first_of(rest);
      if (is_space(step.code_point)) break;
      length += step.length;
    }
    parts.emplace_back(from_right ? text.substr(text.size() - length) : text.substr(0, length));
    if (from_right) {
      text.remove_suffix(length);
    } else {
      text.remove_prefix(length);
    }
    text = strip(text, outer);
  }
  if (from_right) std::reverse(parts.begin(), parts.end());
  return parts;
}

std::vector<std::string> split_lines(std::string_view text, bool keep_ends) {
  const std::u32string chars = decode(text);
  const auto ends_line = [](char32_t c) {
    return (c >= 0x0A && c <= 0x0D) || (c >= 0x1C && c <= 0x1E) || c == 0x85 || c == 0x2028 ||
           c == 0x2029;
  };
  std::vector<std::string> lines;
  for (size_t begin = 0; begin < chars.size();) {
    size_t end = begin;
    while (end < chars.size() && !ends_line(chars[end])) ++end;
    size_t next = end;
    if (next < chars.size()) {
      const bool crlf = chars[next] == '\r' && next + 1 < chars.size() && chars[next + 1] == '\n';
      next += crlf ? 2 : 1;
    }
    lines.push_back(
        encode(std::u32string_view(chars).substr(begin, (keep_ends ? next : end) - begin)));
    begin = next;
  }
  return lines;
}

bool is_printable(char32_t c) {
  if (c == ' ') return true;
  switch (utf8proc_category(signed_of(c))) {
    case UTF8PROC_CATEGORY_CC:
    case UTF8PROC_CATEGORY_CF:
    case UTF8PROC_CATEGORY_CS:
    case UTF8PROC_CATEGORY_CO:
    case UTF8PROC_CATEGORY_CN:
    case UTF8PROC_CATEGORY_ZS:
    case UTF8PROC_CATEGORY_ZL:
    case UTF8PROC_CATEGORY_ZP:
      return false;
    default:
      return true;
  }
}

bool is_alpha(char32_t c) {
  const utf8proc_category_t category = utf8proc_category(signed_of(c));
  return category >= UTF8PROC_CATEGORY_LU && category <= UTF8PROC_CATEGORY_LO;
}
bool is_digit(char32_t c) { return utf8proc_category(signed_of(c)) == UTF8PROC_CATEGORY_ND; }
bool is_upper(char32_t c) {
  const utf8proc_category_t category = utf8proc_category(signed_of(c));
  return category == UTF8PROC_CATEGORY_LU || category == UTF8PROC_CATEGORY_LT;
}
bool is_lower(char32_t c) { return utf8proc_category(signed_of(c)) == UTF8PROC_CATEGORY_LL; }

}  // namespace kvarn::jinja
