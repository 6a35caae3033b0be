#include "server/json_out.h"

#include <charconv>
#include <cmath>
#include <cstdio>
#include <utility>

#include <fmt/core.h>
#include <nlohmann/json.hpp>

#include "engine/tokenizer/detokenizer.h"

namespace kvarn {
namespace {

constexpr size_t kMessageCharacters = 64;

// Line separators of Unicode as they appear in UTF-8, and what is written instead. They can only
// occur inside strings, so replacing bytes is safe.
void escape_line_separators(std::string& json) {
  size_t at = json.find_first_of("\xC2\xE2");
  if (at == std::string::npos) return;
  std::string out;
  out.reserve(json.size() + 16);
  for (size_t i = 0; i < json.size();) {
    if (json.compare(i, 2, "\xC2\x85") == 0) {
      out += "\\u0085";
      i += 2;
    } else if (json.compare(i, 3, "\xE2\x80\xA8") == 0) {
      out += "\\u2028";
      i += 3;
    } else if (json.compare(i, 3, "\xE2\x80\xA9") == 0) {
      out += "\\u2029";
      i += 3;
    } else {
      out += json[i++];
    }
  }
  json = std::move(out);
}

size_t character_bytes(unsigned char lead) {
  return lead < 0x80 ? 1 : lead < 0xE0 ? 2 : lead < 0xF0 ? 3 : 4;
}

}  // namespace

std::string dump_json(const nlohmann::ordered_json& value) {
  std::string json = value.dump(-1, ' ', false, nlohmann::ordered_json::error_handler_t::replace);
  escape_line_separators(json);
  return json;
}

double finite_logprob(float logprob) {
  if (!std::isfinite(logprob)) return -9999.0;
  // Through the shortest decimal of the float, so that -0.1 is not written as -0.10000000149.
  const std::string text = fmt::format("{}", logprob);
  double value = 0;
  std::from_chars(text.data(), text.data() + text.size(), value);
  return value;
}

std::string quote_for_message(std::string_view text) {
  // Cut well beyond what can be shown before anything is copied: the value may be megabytes long.
  const bool long_text = text.size() > 4 * kMessageCharacters;
  const std::string clean = sanitize_utf8(text.substr(0, 4 * kMessageCharacters));
  std::string out;
  size_t characters = 0, i = 0;
  while (i < clean.size() && characters < kMessageCharacters) {
    const auto lead = static_cast<unsigned char>(clean[i]);
    if (lead < 0x20 || lead == 0x7F) {
      char escaped[8];
      std::snprintf(escaped, sizeof escaped, "\\u%04x", lead);
      out += escaped;
      ++i;
    } else {
      const size_t bytes = character_bytes(lead);
      out += clean.substr(i, bytes);
      i += bytes;
    }
    ++characters;
  }
  if (i < clean.size() || long_text) out += "...";
  return out;
}

}  // namespace kvarn
