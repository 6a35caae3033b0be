// A small byte-level tokenizer.json for tests, which change it and see what the loader says.
#pragma once

#include <filesystem>
#include <fstream>
#include <string>
#include <utility>

#include <unistd.h>
#include <nlohmann/json.hpp>

#include "engine/tokenizer/byte_alphabet.h"

namespace kvarn {

// 256 bytes, the tokens "he", "ll", "hell", "hello", " t", and <|end|> (special) and <think>.
inline nlohmann::json small_tokenizer() {
  using nlohmann::json;
  json vocab = json::object();
  for (int byte = 0; byte < 256; ++byte) vocab[byte_to_spelling(static_cast<uint8_t>(byte))] = byte;
  int id = 256;
  for (const char* token : {"he", "ll", "hell", "hello", "Ġt"}) vocab[token] = id++;
  const auto added = [&id](const char* content, bool special) {
    return json{{"id", id++},      {"content", content},   {"special", special}, {"lstrip", false},
                {"rstrip", false}, {"single_word", false}, {"normalized", false}};
  };
  const json split = {{"type", "Split"},
                      {"pattern", {{"Regex", "\\s?\\p{L}+|\\s+|[^\\s\\p{L}]+"}}},
                      {"behavior", "Isolated"},
                      {"invert", false}};
  const json byte_level = {
      {"type", "ByteLevel"}, {"add_prefix_space", false}, {"use_regex", false}};
  const auto pair = [](const char* left, const char* right) { return json::array({left, right}); };
  json file = json::object();
  file["version"] = "1.0";
  file["added_tokens"] = json::array();
  file["added_tokens"].push_back(added("<|end|>", true));
  file["added_tokens"].push_back(added("<think>", false));
  file["normalizer"] = {{"type", "NFC"}};
  file["pre_tokenizer"] = {{"type", "Sequence"},
                           {"pretokenizers", json::array({split, byte_level})}};
  file["decoder"] = {{"type", "ByteLevel"}};
  file["model"] = {{"type", "BPE"}, {"byte_fallback", false}, {"vocab", vocab}};
  file["model"]["merges"] = json::array(
      {pair("h", "e"), pair("l", "l"), pair("he", "ll"), pair("hell", "o"), pair("Ġ", "t")});
  return file;
}

// Writes `text` to a file of this test's own and removes it with the object.
class ScratchFile {
 public:
  explicit ScratchFile(const std::string& text)
      : path_(std::filesystem::temp_directory_path() /
              ("kvarn_tokenizer_" + std::to_string(getpid()) + ".json")) {
    std::ofstream(path_, std::ios::binary) << text;
  }
  ~ScratchFile() { std::filesystem::remove(path_); }
  ScratchFile(const ScratchFile&) = delete;
  ScratchFile& operator=(const ScratchFile&) = delete;
  const std::filesystem::path& path() const { return path_; }

 private:
  std::filesystem::path path_;
};

}  // namespace kvarn
