// Byte-level BPE from a Hugging Face tokenizer.json. Immutable and thread-safe after load().
#pragma once

#include <cstdint>
#include <filesystem>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "kernels/core/status.h"

namespace kvarn {

class Tokenizer {
 public:
  // Errors name the file, the JSON path and what is supported (BPE, NFC, Split + ByteLevel, no byte
  // fallback).
  static Result<std::unique_ptr<Tokenizer>> load(const std::filesystem::path& tokenizer_json);
  ~Tokenizer();

  // Valid UTF-8 -> ids. NFC-normalises, recognises added tokens inside the text, adds no BOS.
  // Invalid UTF-8 is replaced by U+FFFD first (maximal subparts), as a lossy decode would.
  std::vector<int32_t> encode(std::string_view text) const;
  // Exact bytes, which need not be valid UTF-8 for a cut sequence. Ids outside the vocabulary give
  // nothing.
  std::string decode(std::span<const int32_t> ids, bool skip_special_tokens) const;
  // Raw bytes of one token ("" for an id that does not exist).
  const std::string& token_bytes(int32_t id) const;
  bool is_special(int32_t id) const;  // added token with special: true
  bool is_added(int32_t id) const;    // any added token (<think>, <tool_call>, ...)
  std::optional<int32_t> added_token_id(std::string_view content) const;  // "</think>" -> id
  int32_t vocab_size() const;                                             // highest id + 1

 private:
  class Impl;
  explicit Tokenizer(std::unique_ptr<Impl> impl);
  std::unique_ptr<Impl> impl_;
};

}  // namespace kvarn
