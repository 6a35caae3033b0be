#include "engine/tokenizer/split_regex.h"

#include <algorithm>
#include <iterator>
#include <utility>

#include <fmt/format.h>
#include <pcre2.h>

#include "engine/tokenizer/utf8.h"

namespace kvarn {
namespace {

enum class CharClass : uint8_t { kLetter, kNumber, kOther };
struct ClassRange {
  char32_t first, last;
  CharClass reference;
};

// Characters that the reference (Oniguruma, Unicode 16) classes otherwise than PCRE2 10.42 (Unicode
// 14): letters and numbers assigned since, and U+180E, which PCRE2 still takes for a space. Found
// by asking the reference about every character; the tokenizer oracle repeats it. With a newer
// PCRE2 the table changes nothing.
constexpr ClassRange kReclassified[] = {
    {0x180E, 0x180E, CharClass::kOther},    {0x1C89, 0x1C8A, CharClass::kLetter},
    {0xA7CB, 0xA7CD, CharClass::kLetter},   {0xA7DA, 0xA7DC, CharClass::kLetter},
    {0x105C0, 0x105F3, CharClass::kLetter}, {0x10D40, 0x10D49, CharClass::kNumber},
    {0x10D4A, 0x10D65, CharClass::kLetter}, {0x10D6F, 0x10D85, CharClass::kLetter},
    {0x10EC2, 0x10EC4, CharClass::kLetter}, {0x1123F, 0x11240, CharClass::kLetter},
    {0x11380, 0x11389, CharClass::kLetter}, {0x1138B, 0x1138B, CharClass::kLetter},
    {0x1138E, 0x1138E, CharClass::kLetter}, {0x11390, 0x113B5, CharClass::kLetter},
    {0x113B7, 0x113B7, CharClass::kLetter}, {0x113D1, 0x113D1, CharClass::kLetter},
    {0x113D3, 0x113D3, CharClass::kLetter}, {0x116D0, 0x116E3, CharClass::kNumber},
    {0x11BC0, 0x11BE0, CharClass::kLetter}, {0x11BF0, 0x11BF9, CharClass::kNumber},
    {0x11F02, 0x11F02, CharClass::kLetter}, {0x11F04, 0x11F10, CharClass::kLetter},
    {0x11F12, 0x11F33, CharClass::kLetter}, {0x11F50, 0x11F59, CharClass::kNumber},
    {0x1342F, 0x1342F, CharClass::kLetter}, {0x13441, 0x13446, CharClass::kLetter},
    {0x13460, 0x143FA, CharClass::kLetter}, {0x16100, 0x1611D, CharClass::kLetter},
    {0x16130, 0x16139, CharClass::kNumber}, {0x16D40, 0x16D6C, CharClass::kLetter},
    {0x16D70, 0x16D79, CharClass::kNumber}, {0x18CFF, 0x18CFF, CharClass::kLetter},
    {0x1B132, 0x1B132, CharClass::kLetter}, {0x1B155, 0x1B155, CharClass::kLetter},
    {0x1CCF0, 0x1CCF9, CharClass::kNumber}, {0x1D2C0, 0x1D2D3, CharClass::kNumber},
    {0x1DF25, 0x1DF2A, CharClass::kLetter}, {0x1E030, 0x1E06D, CharClass::kLetter},
    {0x1E4D0, 0x1E4EB, CharClass::kLetter}, {0x1E4F0, 0x1E4F9, CharClass::kNumber},
    {0x1E5D0, 0x1E5ED, CharClass::kLetter}, {0x1E5F0, 0x1E5F0, CharClass::kLetter},
    {0x1E5F1, 0x1E5FA, CharClass::kNumber}, {0x2B739, 0x2B739, CharClass::kLetter},
    {0x2EBF0, 0x2EE5D, CharClass::kLetter}, {0x31350, 0x323AF, CharClass::kLetter},
};

// A character of the class that the reference gives `c`, with as many bytes as `c`; or 0.
char32_t stand_in(char32_t c) {
  const auto it =
      std::upper_bound(std::begin(kReclassified), std::end(kReclassified), c,
                       [](char32_t value, const ClassRange& range) { return value < range.first; });
  if (it == std::begin(kReclassified) || c > std::prev(it)->last) return 0;
  const bool four_bytes = c >= 0x10000;
  switch (std::prev(it)->reference) {
    case CharClass::kLetter:
      return four_bytes ? 0x20000 : 0x4E00;  // CJK ideographs
    case CharClass::kNumber:
      return four_bytes ? 0x1D7CE : 0x0966;  // digits zero
    case CharClass::kOther:
      return four_bytes ? 0x1F300 : 0x2010;  // an emoji, a hyphen
  }
  return 0;
}

// True, with the text to match instead of `text`, if a character needs a stand-in. Offsets stay.
bool reclassify(std::string_view text, std::string& out) {
  bool changed = false;
  for (size_t i = 0; i < text.size();) {
    i += ascii_prefix(text.substr(i));
    if (i == text.size()) break;
    const Utf8Step step = utf8_step(text.substr(i));
    if (const char32_t other = step.length >= 3 ? stand_in(step.code_point) : 0; other != 0) {
      if (!changed) out = text;
      changed = true;
      std::string bytes;
      append_utf8(other, bytes);
      out.replace(i, step.length, bytes);
    }
    i += step.length;
  }
  return changed;
}

struct FreeCode {
  void operator()(pcre2_code* code) const { pcre2_code_free(code); }
};
struct FreeMatchData {
  void operator()(pcre2_match_data* data) const { pcre2_match_data_free(data); }
};

}  // namespace

class SplitRegex::Compiled {
 public:
  std::unique_ptr<pcre2_code, FreeCode> code;
  bool has_jit = false;

  int match(PCRE2_SPTR subject, size_t size, size_t begin, pcre2_match_data* data) const {
    if (has_jit) {
      const int rc =
          pcre2_jit_match(code.get(), subject, size, begin, PCRE2_NO_UTF_CHECK, data, nullptr);
      // The JIT's stack is small (32 KiB); the interpreter backtracks on the heap.
      if (rc != PCRE2_ERROR_JIT_STACKLIMIT) return rc;
    }
    return pcre2_match(code.get(), subject, size, begin, PCRE2_NO_UTF_CHECK | PCRE2_NO_JIT, data,
                       nullptr);
  }
};

SplitRegex::SplitRegex(std::unique_ptr<Compiled> compiled) : compiled_(std::move(compiled)) {}
SplitRegex::~SplitRegex() = default;

Result<std::unique_ptr<SplitRegex>> SplitRegex::compile(const std::string& pattern) {
  for (size_t i = 0; i + 1 < pattern.size(); ++i) {
    if (pattern[i] != '\\') continue;
    ++i;
    if (pattern[i] == 'h' || pattern[i] == 'H') {
      return Status::invalid_argument(
          fmt::format("'\\{}' at offset {} is not supported: write the class out, e.g. [0-9A-Fa-f]",
                      pattern[i], i - 1));
    }
  }
  int error = 0;
  PCRE2_SIZE offset = 0;
  auto compiled = std::make_unique<Compiled>();
  compiled->code.reset(pcre2_compile(reinterpret_cast<PCRE2_SPTR>(pattern.data()), pattern.size(),
                                     PCRE2_UTF | PCRE2_UCP, &error, &offset, nullptr));
  if (!compiled->code) {
    PCRE2_UCHAR message[256] = {};
    pcre2_get_error_message(error, message, sizeof message);
    return Status::invalid_argument(
        fmt::format("the pattern is no valid regular expression: {} at offset {}",
                    reinterpret_cast<const char*>(message), offset));
  }
  compiled->has_jit = pcre2_jit_compile(compiled->code.get(), PCRE2_JIT_COMPLETE) == 0;
  return std::unique_ptr<SplitRegex>(new SplitRegex(std::move(compiled)));
}

void SplitRegex::split(std::string_view text, std::vector<std::string_view>& pieces) const {
  std::string replaced;
  const std::string_view subject = reclassify(text, replaced) ? std::string_view(replaced) : text;
  const auto* bytes = reinterpret_cast<PCRE2_SPTR>(subject.data());
  const std::unique_ptr<pcre2_match_data, FreeMatchData> data(
      pcre2_match_data_create_from_pattern(compiled_->code.get(), nullptr));
  const PCRE2_SIZE* bounds = pcre2_get_ovector_pointer(data.get());
  const auto add = [&](size_t begin, size_t end) {
    if (begin < end) pieces.push_back(text.substr(begin, end - begin));
  };
  size_t done = 0;    // pieces so far end here
  size_t search = 0;  // the next match begins here or later
  while (search < text.size()) {
    size_t begin, end;
    const int rc = compiled_->match(bytes, subject.size(), search, data.get());
    if (rc > 0) {
      begin = bounds[0];
      end = bounds[1];
    } else if (rc == PCRE2_ERROR_NOMATCH) {
      break;
    } else {
      // PCRE2's limits on backtracking, which no known tokenizer's pattern comes near: the next
      // character is a piece of its own, so nothing is lost and the search goes on behind it.
      begin = search;
      end = search + utf8_step(subject.substr(search)).length;
    }
    add(done, begin);
    add(begin, end);
    done = end;
    // An empty match is a border; a \K in a lookaround could even end before it began.
    search = end > search ? end : search + utf8_step(subject.substr(search)).length;
  }
  add(done, text.size());
}

}  // namespace kvarn
