// Splits text into the pieces that BPE works on, by a tokenizer.json's Split pattern (PCRE2 with
// Unicode classes, JIT-compiled). Immutable and thread-safe.
#pragma once

#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "kernels/core/status.h"

namespace kvarn {

class SplitRegex {
 public:
  // The error says what PCRE2 objects to and where. The reference reads patterns as Oniguruma does;
  // where the same letters mean something else (\h) the pattern is refused.
  static Result<std::unique_ptr<SplitRegex>> compile(const std::string& pattern);
  ~SplitRegex();

  // Appends the pieces of `text` (valid UTF-8): each match and what lies between matches. Together
  // they are `text`; none is empty.
  void split(std::string_view text, std::vector<std::string_view>& pieces) const;

 private:
  class Compiled;
  explicit SplitRegex(std::unique_ptr<Compiled> compiled);
  std::unique_ptr<Compiled> compiled_;
};

}  // namespace kvarn
