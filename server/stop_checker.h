// Finds stop strings in the raw text of one choice (reasoning and calls included) as it is
// generated. Holds back only what may still become a match: at most the longest stop string minus
// one byte. The first match to end wins; of several that end together, the one that starts first.
// Pure; not thread-safe.
#pragma once

#include <cstddef>
#include <cstdint>
#include <deque>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "server/text_piece.h"

namespace kvarn {

class StopChecker {
 public:
  struct Output {
    std::vector<TextPiece> pieces;
    std::optional<size_t>
        matched;  // index into the stop strings; set once, on the push that ends it
  };

  // `stop_strings` are valid UTF-8 and not empty. With `include_stop_string` the text ends after
  // the match, else before it.
  StopChecker(std::vector<std::string> stop_strings, bool include_stop_string);

  // `text` is what the detokeniser gave for this token, possibly empty. After a match every further
  // token is ignored (it gives no pieces).
  Output push(int32_t token_id, std::string_view text);
  // The end of generation: everything held is released. `tail` (the detokeniser's finish()) belongs
  // to the last token pushed; it is matched as well.
  Output finish(std::string_view tail);

  const std::string& stop_string(size_t index) const { return patterns_[index].text; }
  bool has_matched() const { return has_matched_; }

 private:
  struct Pattern {
    std::string text;
    std::vector<uint32_t>
        border;          // [i]: longest proper border of text[0..i], for Knuth-Morris-Pratt
    uint32_t state = 0;  // bytes of `text` that the output so far ends with
  };
  struct Held {
    int32_t token_id;
    std::string text;  // not yet released
    bool completes_token;
  };

  Output append(Held token);
  std::optional<size_t> advance(char byte);
  size_t possible_prefix() const;
  void release(size_t num_bytes, Output& out);

  std::vector<Pattern> patterns_;
  bool include_stop_string_;
  bool has_matched_ = false;
  std::deque<Held> held_;
  size_t held_bytes_ = 0;
  int32_t last_token_ = -1;
};

}  // namespace kvarn
