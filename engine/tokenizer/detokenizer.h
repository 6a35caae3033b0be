// Incremental detokeniser: feeds on ids, emits text that is always valid UTF-8. An incomplete
// character is held back (at most 3 bytes) until it completes; bytes that cannot continue any
// character become U+FFFD at once (maximal subpart rule). One per choice; not thread-safe; the
// tokenizer must outlive it.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>

#include "engine/tokenizer/tokenizer.h"

namespace kvarn {

class Detokenizer {
 public:
  Detokenizer(const Tokenizer& tokenizer, bool skip_special_tokens)
      : tokenizer_(&tokenizer), skip_special_tokens_(skip_special_tokens) {}

  std::string push(int32_t id);  // text that this token completed
  std::string finish();          // an unfinished character becomes one U+FFFD

 private:
  const Tokenizer* tokenizer_;
  bool skip_special_tokens_;
  std::string pending_;  // bytes of an incomplete character
};

// Bytes -> valid UTF-8 by the maximal subpart rule.
std::string sanitize_utf8(std::string_view bytes);
bool is_valid_utf8(std::string_view bytes);

}  // namespace kvarn
