#include "engine/tokenizer/tokenizer_file.h"

#include <algorithm>
#include <fstream>
#include <initializer_list>
#include <optional>
#include <sstream>
#include <string_view>
#include <unordered_map>
#include <utility>

#include <fmt/format.h>
#include <nlohmann/json.hpp>

#include "engine/tokenizer/byte_alphabet.h"

namespace kvarn {
namespace {

using nlohmann::json;

constexpr int64_t kMaxId = (int64_t{1} << 21) - 1;                 // far above any vocabulary
constexpr std::streamoff kMaxFileBytes = std::streamoff{1} << 29;  // far above any tokenizer.json

// GPT-2's pattern, which ByteLevel applies itself with use_regex: true.
constexpr const char* kByteLevelPattern =
    R"('s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+)";

std::string shown(const json& value) {
  std::string text = value.dump(-1, ' ', false, json::error_handler_t::replace);
  constexpr size_t kMaxShown = 80;
  if (text.size() > kMaxShown) text = text.substr(0, kMaxShown) + "...";
  return text;
}

class Reader {
 public:
  explicit Reader(const std::filesystem::path& path) : file_(path.string()) {}

  Result<TokenizerFile> read();

 private:
  Status bad(std::string_view path, std::string_view what) const {
    return Status::invalid_argument(fmt::format("{}: {}: {}", file_, path, what));
  }
  Status unsupported(const std::string& path, const json& value, std::string_view supported) const {
    return bad(path, fmt::format("{} is not supported; supported: {}", shown(value), supported));
  }
  // Refuses object[key] unless it is absent or one of `allowed`.
  Status expect(const json& object, const std::string& path, const char* key,
                std::initializer_list<json> allowed) const;
  Result<bool> flag(const json& object, const std::string& path, const char* key) const;

  Status read_model(const json& model);
  Status read_vocab(const json& vocab);
  Status read_merges(const json& merges);
  Status read_added_tokens(const json& tokens);
  Status read_normalizer(const json& normalizer, const std::string& path);
  Status read_pre_tokenizer(const json& pre);
  Status read_split(const json& split, const std::string& path);
  Status read_byte_level(const json& byte_level, const std::string& path, bool is_only);

  std::string file_;
  TokenizerFile out_;
  std::unordered_map<std::string, int32_t> ids_;  // by spelling
};

Status Reader::expect(const json& object, const std::string& path, const char* key,
                      std::initializer_list<json> allowed) const {
  const auto it = object.find(key);
  if (it == object.end()) return Status::ok();
  std::string list;
  for (const json& value : allowed) {
    if (*it == value) return Status::ok();
    list += (list.empty() ? "" : " or ") + value.dump();
  }
  return unsupported(path + "." + key, *it, list);
}

Result<bool> Reader::flag(const json& object, const std::string& path, const char* key) const {
  const auto it = object.find(key);
  if (it == object.end() || it->is_null()) return false;
  if (!it->is_boolean()) return bad(path + "." + key, shown(*it) + " must be a boolean");
  return it->get<bool>();
}

Result<TokenizerFile> Reader::read() {
  std::ifstream in(file_, std::ios::binary | std::ios::ate);
  if (!in) return Status::not_found(fmt::format("{}: cannot be opened", file_));
  if (in.tellg() > kMaxFileBytes) {
    return Status::invalid_argument(fmt::format("{}: larger than {} bytes", file_, kMaxFileBytes));
  }
  in.seekg(0);
  json root;
  try {
    root = json::parse(in);
  } catch (const json::exception& e) {
    return Status::invalid_argument(
        fmt::format("{}: is no valid JSON (truncated download?): {}", file_, e.what()));
  }
  if (!root.is_object()) return bad("$", "must be an object, got " + shown(root));
  const auto member = [&root](const char* key) {
    const auto it = root.find(key);
    return it == root.end() ? json() : std::move(*it);
  };
  // truncation, padding and post_processor are not read: lengths are the server's business, and the
  // chat template writes its own special tokens.
  KVARN_RETURN_IF_ERROR(read_model(member("model")));
  KVARN_RETURN_IF_ERROR(read_added_tokens(member("added_tokens")));
  KVARN_RETURN_IF_ERROR(read_normalizer(member("normalizer"), "normalizer"));
  KVARN_RETURN_IF_ERROR(read_pre_tokenizer(member("pre_tokenizer")));
  const json decoder = member("decoder");
  if (!decoder.is_object() || decoder.value("type", json()) != "ByteLevel") {
    return unsupported("decoder", decoder, "{\"type\": \"ByteLevel\"}");
  }
  return std::move(out_);
}

Status Reader::read_model(const json& model) {
  if (!model.is_object()) return bad("model", "must be an object, got " + shown(model));
  KVARN_RETURN_IF_ERROR(expect(model, "model", "type", {"BPE"}));
  KVARN_RETURN_IF_ERROR(expect(model, "model", "dropout", {nullptr, 0.0}));
  KVARN_RETURN_IF_ERROR(expect(model, "model", "byte_fallback", {false, nullptr}));
  KVARN_RETURN_IF_ERROR(expect(model, "model", "continuing_subword_prefix", {nullptr, ""}));
  KVARN_RETURN_IF_ERROR(expect(model, "model", "end_of_word_suffix", {nullptr, ""}));
  KVARN_ASSIGN_OR_RETURN(out_.ignore_merges, flag(model, "model", "ignore_merges"));
  // unk_token and fuse_unk have no effect: every byte that text can have is in the vocabulary.
  for (const char* key : {"vocab", "merges"}) {
    if (!model.contains(key)) return bad(fmt::format("model.{}", key), "is missing");
  }
  KVARN_RETURN_IF_ERROR(read_vocab(model["vocab"]));
  return read_merges(model["merges"]);
}

Status Reader::read_vocab(const json& vocab) {
  if (!vocab.is_object()) return bad("model.vocab", "must be an object, got " + shown(vocab));
  ids_.reserve(vocab.size());
  for (const auto& [spelling, id] : vocab.items()) {
    const auto path = [&key = spelling] { return fmt::format("model.vocab['{}']", key); };
    if (!id.is_number_integer() || id.get<int64_t>() < 0 || id.get<int64_t>() > kMaxId) {
      return bad(path(), fmt::format("{} must be an integer from 0 to {}", shown(id), kMaxId));
    }
    std::optional<std::string> bytes = spelling_to_bytes(spelling);
    // A vocabulary may also list its added tokens, whose content is no byte-level spelling.
    if (!bytes) bytes = spelling;
    const auto index = id.get<size_t>();
    if (index >= out_.token_bytes.size()) out_.token_bytes.resize(index + 1);
    if (!out_.token_bytes[index].empty()) {
      return bad(path(), fmt::format("id {} is used by two tokens", index));
    }
    if (bytes->empty()) return bad(path(), "a token must not be empty");
    out_.token_bytes[index] = std::move(*bytes);
    ids_.emplace(spelling, static_cast<int32_t>(index));
  }
  for (int byte = 0; byte < 256; ++byte) {
    const auto b = static_cast<uint8_t>(byte);
    const auto it = ids_.find(byte_to_spelling(b));
    out_.byte_ids[b] = it == ids_.end() ? -1 : it->second;
    const bool never_in_utf8 = b == 0xC0 || b == 0xC1 || b >= 0xF5;
    if (it == ids_.end() && !never_in_utf8) {
      return bad("model.vocab",
                 fmt::format("has no token '{}' for byte 0x{:02X}; supported: byte-level "
                             "vocabularies with a token for each byte",
                             byte_to_spelling(b), byte));
    }
  }
  return Status::ok();
}

Status Reader::read_merges(const json& merges) {
  if (!merges.is_array()) return bad("model.merges", "must be an array, got " + shown(merges));
  out_.merges.reserve(merges.size());
  std::string left, right;
  for (size_t i = 0; i < merges.size(); ++i) {
    const json& merge = merges[i];
    const auto path = [i] { return fmt::format("model.merges[{}]", i); };
    // Two forms: ["a", "b"], and in older files "a b".
    if (merge.is_array() && merge.size() == 2 && merge[0].is_string() && merge[1].is_string()) {
      left = merge[0].get_ref<const std::string&>();
      right = merge[1].get_ref<const std::string&>();
    } else if (merge.is_string()) {
      const auto& text = merge.get_ref<const std::string&>();
      if (text.starts_with("#version")) continue;
      const size_t space = text.find(' ');
      if (space == text.npos || text.find(' ', space + 1) != text.npos) {
        return bad(path(),
                   fmt::format("{} must be two tokens with one space between", shown(merge)));
      }
      left = text.substr(0, space);
      right = text.substr(space + 1);
    } else {
      return bad(path(), fmt::format("{} must be [\"a\", \"b\"] or \"a b\"", shown(merge)));
    }
    std::array<int32_t, 3> ids{};
    const std::string merged = left + right;
    const std::string* spellings[3] = {&left, &right, &merged};
    for (size_t k = 0; k < 3; ++k) {
      const auto it = ids_.find(*spellings[k]);
      if (it == ids_.end()) {
        return bad(path(), fmt::format("token '{}' is not in model.vocab", *spellings[k]));
      }
      ids[k] = it->second;
    }
    out_.merges.push_back({ids[0], ids[1], ids[2]});
  }
  return Status::ok();
}

Status Reader::read_added_tokens(const json& tokens) {
  if (tokens.is_null()) return Status::ok();
  if (!tokens.is_array()) return bad("added_tokens", "must be an array, got " + shown(tokens));
  std::unordered_map<std::string, size_t> seen;
  for (size_t i = 0; i < tokens.size(); ++i) {
    const json& token = tokens[i];
    const std::string path = fmt::format("added_tokens[{}]", i);
    if (!token.is_object()) return bad(path, "must be an object, got " + shown(token));
    const json content = token.value("content", json()), id = token.value("id", json());
    if (!content.is_string() || content.get_ref<const std::string&>().empty()) {
      return bad(path + ".content", shown(content) + " must be a string that is not empty");
    }
    if (!id.is_number_integer() || id.get<int64_t>() < 0 || id.get<int64_t>() > kMaxId) {
      return bad(path + ".id",
                 fmt::format("{} must be an integer from 0 to {}", shown(id), kMaxId));
    }
    KVARN_ASSIGN_OR_RETURN(const bool single_word, flag(token, path, "single_word"));
    if (single_word) return unsupported(path + ".single_word", true, "false");
    AddedToken added;
    added.id = id.get<int32_t>();
    added.content = content.get<std::string>();
    KVARN_ASSIGN_OR_RETURN(added.special, flag(token, path, "special"));
    KVARN_ASSIGN_OR_RETURN(added.lstrip, flag(token, path, "lstrip"));
    KVARN_ASSIGN_OR_RETURN(added.rstrip, flag(token, path, "rstrip"));
    KVARN_ASSIGN_OR_RETURN(added.normalized, flag(token, path, "normalized"));
    if (const auto [it, is_new] = seen.emplace(added.content, i); !is_new) {
      return bad(path + ".content",
                 fmt::format("'{}' is added_tokens[{}], too", added.content, it->second));
    }
    const auto index = static_cast<size_t>(added.id);
    if (index >= out_.token_bytes.size()) out_.token_bytes.resize(index + 1);
    std::string& bytes = out_.token_bytes[index];
    const auto in_vocab = ids_.find(added.content);
    const bool is_same = in_vocab != ids_.end() && in_vocab->second == added.id;
    if (!is_same && (!bytes.empty() || in_vocab != ids_.end())) {
      return bad(path + ".id", fmt::format("id {} of '{}' disagrees with model.vocab or another "
                                           "added token",
                                           added.id, added.content));
    }
    bytes = added.content;
    out_.added_tokens.push_back(std::move(added));
  }
  return Status::ok();
}

Status Reader::read_normalizer(const json& normalizer, const std::string& path) {
  if (normalizer.is_null()) return Status::ok();
  const json type = normalizer.is_object() ? normalizer.value("type", json()) : json();
  if (type == "NFC") {
    out_.nfc = true;
    return Status::ok();
  }
  if (type == "Sequence" && normalizer.contains("normalizers") &&
      normalizer["normalizers"].is_array()) {
    const json& list = normalizer["normalizers"];
    for (size_t i = 0; i < list.size(); ++i) {
      if (!list[i].is_object() || list[i].value("type", json()) != "NFC") {
        return unsupported(fmt::format("{}.normalizers[{}]", path, i), list[i],
                           "{\"type\": \"NFC\"}");
      }
      out_.nfc = true;
    }
    return Status::ok();
  }
  return unsupported(path, normalizer, "null or {\"type\": \"NFC\"}");
}

Status Reader::read_pre_tokenizer(const json& pre) {
  constexpr const char* kSupported =
      "ByteLevel, or a Sequence of a Split (Regex, Isolated) and a ByteLevel";
  const json type = pre.is_object() ? pre.value("type", json()) : json();
  if (type == "ByteLevel") return read_byte_level(pre, "pre_tokenizer", true);
  if (type != "Sequence" || !pre.contains("pretokenizers") || !pre["pretokenizers"].is_array()) {
    return unsupported("pre_tokenizer", pre, kSupported);
  }
  const json& list = pre["pretokenizers"];
  if (list.empty() || list.size() > 2) {
    return unsupported("pre_tokenizer.pretokenizers", list, kSupported);
  }
  for (size_t i = 0; i < list.size(); ++i) {
    const std::string path = fmt::format("pre_tokenizer.pretokenizers[{}]", i);
    const json item_type = list[i].is_object() ? list[i].value("type", json()) : json();
    const bool is_last = i + 1 == list.size();
    if (item_type != (is_last ? "ByteLevel" : "Split")) {
      return unsupported(path, list[i], kSupported);
    }
    KVARN_RETURN_IF_ERROR(is_last ? read_byte_level(list[i], path, list.size() == 1)
                                  : read_split(list[i], path));
  }
  return Status::ok();
}

Status Reader::read_split(const json& split, const std::string& path) {
  KVARN_RETURN_IF_ERROR(expect(split, path, "behavior", {"Isolated"}));
  KVARN_RETURN_IF_ERROR(expect(split, path, "invert", {false}));
  const json pattern = split.value("pattern", json());
  if (!pattern.is_object() || !pattern.value("Regex", json()).is_string()) {
    return unsupported(path + ".pattern", pattern, "{\"Regex\": \"...\"}");
  }
  out_.split_pattern = pattern["Regex"].get<std::string>();
  return Status::ok();
}

Status Reader::read_byte_level(const json& byte_level, const std::string& path, bool is_only) {
  KVARN_RETURN_IF_ERROR(expect(byte_level, path, "add_prefix_space", {false}));
  // Absent means true, as the reference reads it.
  const bool use_regex = byte_level.value("use_regex", json(true)) != json(false);
  if (!use_regex) return Status::ok();
  if (!is_only) return unsupported(path + ".use_regex", true, "false after a Split");
  out_.split_pattern = kByteLevelPattern;
  return Status::ok();
}

}  // namespace

Result<TokenizerFile> read_tokenizer_file(const std::filesystem::path& path) {
  return Reader(path).read();
}

}  // namespace kvarn
