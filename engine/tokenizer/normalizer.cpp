#include "engine/tokenizer/normalizer.h"

#include <algorithm>
#include <iterator>
#include <vector>

#include <utf8proc.h>

#include "engine/tokenizer/utf8.h"
#include "kernels/core/check.h"

namespace kvarn {
namespace {

struct Range {
  char32_t first, last;
};

bool contains(const Range* begin, const Range* end, char32_t c) {
  const Range* it = std::upper_bound(
      begin, end, c, [](char32_t value, const Range& range) { return value < range.first; });
  return it != begin && c <= std::prev(it)->last;
}

// Scripts and signs whose characters are NFC starters that never combine with what stands before
// them: next to one another they are normalised already.
constexpr Range kSafe[] = {
    {0x0000, 0x02FF}, {0x0391, 0x03CE},   {0x0400, 0x0482}, {0x0531, 0x0590}, {0x05D0, 0x05EA},
    {0x0621, 0x064A}, {0x0904, 0x0939},   {0x0E01, 0x0E37}, {0x1E00, 0x1EFF}, {0x2002, 0x205E},
    {0x20A0, 0x20BF}, {0x2190, 0x2328},   {0x232B, 0x27FF}, {0x3000, 0x3029}, {0x3041, 0x3096},
    {0x30A0, 0x30FF}, {0x3400, 0x4DBF},   {0x4E00, 0x9FFF}, {0xAC00, 0xD7A3}, {0xFE0F, 0xFE0F},
    {0xFF00, 0xFFEF}, {0x1F300, 0x1FAFF},
};

// Assigned after Unicode 9.0 and taking part in normalisation since. Up to Unicode 14 found by
// asking the reference about every character (tools/oracles/tokenizer_oracle.py repeats it); from
// 15 on the marks of the standard and, generously, whole new blocks.
constexpr Range kInert[] = {
    {0x07FD, 0x07FD},   {0x0897, 0x089F},   {0x08CA, 0x08D3},   {0x09FE, 0x09FE},
    {0x0C3C, 0x0C3C},   {0x0D3B, 0x0D3C},   {0x0EBA, 0x0EBA},   {0x1715, 0x1715},
    {0x1ABF, 0x1AEB},   {0x1DF6, 0x1DFA},   {0xA82C, 0xA82C},   {0x105C0, 0x105FF},
    {0x10D24, 0x10D27}, {0x10D69, 0x10D6D}, {0x10EAB, 0x10EAC}, {0x10EFA, 0x10EFF},
    {0x10F46, 0x10F50}, {0x10F82, 0x10F85}, {0x11070, 0x11070}, {0x1133B, 0x1133B},
    {0x11380, 0x113FF}, {0x1145E, 0x1145E}, {0x11839, 0x1183A}, {0x11930, 0x11930},
    {0x11935, 0x11935}, {0x11938, 0x11938}, {0x1193D, 0x1193E}, {0x11943, 0x11943},
    {0x119E0, 0x119E0}, {0x11A34, 0x11A34}, {0x11A47, 0x11A47}, {0x11A99, 0x11A99},
    {0x11D42, 0x11D42}, {0x11D44, 0x11D45}, {0x11D97, 0x11D97}, {0x11F00, 0x11F5F},
    {0x16100, 0x1613F}, {0x16D40, 0x16D7F}, {0x16FF0, 0x16FF1}, {0x1E08F, 0x1E08F},
    {0x1E130, 0x1E136}, {0x1E2AE, 0x1E2AE}, {0x1E2EC, 0x1E2EF}, {0x1E4EC, 0x1E4EF},
    {0x1E5EE, 0x1E5EF}, {0x1E6C0, 0x1E6FF},
};

bool is_inert(char32_t c) {
  return c >= kInert[0].first && contains(std::begin(kInert), std::end(kInert), c);
}

int combining_class(int32_t c) { return utf8proc_get_property(c)->combining_class; }

// Canonical order: within a run of marks by class, equal classes in their order.
void reorder(std::vector<int32_t>& chars) {
  for (size_t i = 0; i < chars.size();) {
    if (combining_class(chars[i]) == 0) {
      ++i;
      continue;
    }
    size_t end = i;
    while (end < chars.size() && combining_class(chars[end]) != 0) ++end;
    std::stable_sort(chars.begin() + static_cast<ptrdiff_t>(i),
                     chars.begin() + static_cast<ptrdiff_t>(end),
                     [](int32_t a, int32_t b) { return combining_class(a) < combining_class(b); });
    i = end;
  }
}

// Composes what was decomposed so far and moves it to `out`.
void flush(std::vector<int32_t>& chars, std::string& out) {
  if (chars.empty()) return;
  reorder(chars);
  const utf8proc_ssize_t length =
      utf8proc_normalize_utf32(chars.data(), static_cast<utf8proc_ssize_t>(chars.size()),
                               static_cast<utf8proc_option_t>(UTF8PROC_STABLE | UTF8PROC_COMPOSE));
  CHECK(length >= 0, "composition of valid code points cannot fail");
  for (utf8proc_ssize_t i = 0; i < length; ++i) {
    append_utf8(static_cast<char32_t>(chars[static_cast<size_t>(i)]), out);
  }
  chars.clear();
}

}  // namespace

bool is_surely_nfc(std::string_view text) {
  while (true) {
    text.remove_prefix(ascii_prefix(text));
    if (text.empty()) return true;
    const Utf8Step step = utf8_step(text);
    if (!contains(std::begin(kSafe), std::end(kSafe), step.code_point)) return false;
    text.remove_prefix(step.length);
  }
}

std::string to_nfc(std::string_view text) {
  std::string out;
  out.reserve(text.size());
  std::vector<int32_t> chars;
  constexpr int kMaxDecomposition = 8;  // the longest canonical one has 4
  int32_t parts[kMaxDecomposition];
  while (!text.empty()) {
    const Utf8Step step = utf8_step(text);
    if (is_inert(step.code_point)) {
      flush(chars, out);
      append_utf8(step.code_point, out);
    } else {
      int boundary = 0;
      const utf8proc_ssize_t count = utf8proc_decompose_char(
          static_cast<int32_t>(step.code_point), parts, kMaxDecomposition,
          static_cast<utf8proc_option_t>(UTF8PROC_STABLE | UTF8PROC_DECOMPOSE), &boundary);
      CHECK(count >= 0 && count <= kMaxDecomposition, "a code point's canonical decomposition");
      chars.insert(chars.end(), parts, parts + count);
    }
    text.remove_prefix(step.length);
  }
  flush(chars, out);
  return out;
}

}  // namespace kvarn
