// Reads a Hugging Face tokenizer.json into plain data and refuses what we would not reproduce.
// Errors name the file, the JSON path, what stands there and what is supported.
#pragma once

#include <array>
#include <filesystem>
#include <string>
#include <vector>

#include "engine/tokenizer/added_tokens.h"
#include "kernels/core/status.h"

namespace kvarn {

struct TokenizerFile {
  struct Merge {
    int32_t left, right, merged;
  };
  std::vector<std::string> token_bytes;  // by id; "" for an id that has no token in the vocabulary
  std::array<int32_t, 256> byte_ids{};   // -1: no token (only bytes that UTF-8 never has)
  std::vector<Merge> merges;             // by rank
  std::vector<AddedToken> added_tokens;
  bool nfc = false;
  bool ignore_merges = false;  // a piece that is a token of the vocabulary is taken as it is
  std::string split_pattern;   // "": text is not split
};

Result<TokenizerFile> read_tokenizer_file(const std::filesystem::path& path);

}  // namespace kvarn
