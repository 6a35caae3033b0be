#include "engine/tokenizer/tokenizer.h"

#include <unordered_map>
#include <utility>

#include <fmt/format.h>

#include "engine/tokenizer/added_tokens.h"
#include "engine/tokenizer/bpe.h"
#include "engine/tokenizer/detokenizer.h"
#include "engine/tokenizer/normalizer.h"
#include "engine/tokenizer/split_regex.h"
#include "engine/tokenizer/tokenizer_file.h"
#include "engine/tokenizer/utf8.h"
#include "engine/tokenizer/word_cache.h"

namespace kvarn {

class Tokenizer::Impl {
 public:
  Impl(TokenizerFile file, std::unique_ptr<SplitRegex> split);

  void encode(std::string_view text, std::vector<int32_t>& ids) const;
  bool exists(int32_t id) const { return id >= 0 && static_cast<size_t>(id) < token_bytes_.size(); }

  std::vector<std::string> token_bytes_;
  enum class Kind : uint8_t { kOrdinary, kAdded, kSpecial };
  std::vector<Kind> kinds_;
  std::unordered_map<std::string, int32_t> added_ids_;

 private:
  void encode_segment(std::string_view text, std::vector<int32_t>& ids) const;
  void encode_pieces(std::string_view text, std::vector<int32_t>& ids) const;

  Bpe bpe_;
  AddedTokenMatcher raw_added_;         // searched in the text as it is
  AddedTokenMatcher normalized_added_;  // searched after normalisation
  std::unique_ptr<SplitRegex> split_;   // null: text is one piece
  bool nfc_;
  std::unordered_map<std::string_view, int32_t> whole_words_;  // only with ignore_merges
  mutable WordCache cache_;
};

Tokenizer::Impl::Impl(TokenizerFile file, std::unique_ptr<SplitRegex> split)
    : token_bytes_(std::move(file.token_bytes)),
      kinds_(token_bytes_.size(), Kind::kOrdinary),
      bpe_(file.merges.size()),
      split_(std::move(split)),
      nfc_(file.nfc) {
  for (int byte = 0; byte < 256; ++byte) {
    const auto b = static_cast<uint8_t>(byte);
    bpe_.set_byte(b, file.byte_ids[b]);
  }
  for (size_t rank = 0; rank < file.merges.size(); ++rank) {
    const TokenizerFile::Merge& merge = file.merges[rank];
    bpe_.add_merge(merge.left, merge.right, merge.merged, static_cast<int32_t>(rank));
  }
  if (file.ignore_merges) {
    for (size_t id = 0; id < token_bytes_.size(); ++id) {
      if (!token_bytes_[id].empty())
        whole_words_.emplace(token_bytes_[id], static_cast<int32_t>(id));
    }
  }
  for (const AddedToken& token : file.added_tokens) {
    kinds_[static_cast<size_t>(token.id)] = token.special ? Kind::kSpecial : Kind::kAdded;
    added_ids_.emplace(token.content, token.id);
    if (token.normalized) {
      normalized_added_.add(token, nfc_ ? to_nfc(token.content) : token.content);
    } else {
      raw_added_.add(token, token.content);
    }
  }
}

void Tokenizer::Impl::encode(std::string_view text, std::vector<int32_t>& ids) const {
  for (const AddedTokenMatcher::Segment& segment : raw_added_.split(text)) {
    if (segment.id >= 0) {
      ids.push_back(segment.id);
    } else {
      encode_segment(text.substr(segment.begin, segment.end - segment.begin), ids);
    }
  }
}

void Tokenizer::Impl::encode_segment(std::string_view text, std::vector<int32_t>& ids) const {
  std::string normalized;
  if (nfc_ && !is_surely_nfc(text)) {
    normalized = to_nfc(text);
    text = normalized;
  }
  if (normalized_added_.empty()) return encode_pieces(text, ids);
  for (const AddedTokenMatcher::Segment& segment : normalized_added_.split(text)) {
    if (segment.id >= 0) {
      ids.push_back(segment.id);
    } else {
      encode_pieces(text.substr(segment.begin, segment.end - segment.begin), ids);
    }
  }
}

void Tokenizer::Impl::encode_pieces(std::string_view text, std::vector<int32_t>& ids) const {
  std::vector<std::string_view> pieces;
  if (split_) {
    split_->split(text, pieces);
  } else if (!text.empty()) {
    pieces.push_back(text);
  }
  for (const std::string_view piece : pieces) {
    if (const auto it = whole_words_.find(piece); it != whole_words_.end()) {
      ids.push_back(it->second);
      continue;
    }
    if (piece.size() > WordCache::kMaxWordBytes) {
      bpe_.encode(piece, ids);
      continue;
    }
    if (cache_.find(piece, ids)) continue;
    const size_t before = ids.size();
    bpe_.encode(piece, ids);
    cache_.insert(piece, ids.data() + before, ids.size() - before);
  }
}

Tokenizer::Tokenizer(std::unique_ptr<Impl> impl) : impl_(std::move(impl)) {}
Tokenizer::~Tokenizer() = default;

Result<std::unique_ptr<Tokenizer>> Tokenizer::load(const std::filesystem::path& tokenizer_json) {
  KVARN_ASSIGN_OR_RETURN(TokenizerFile file, read_tokenizer_file(tokenizer_json));
  std::unique_ptr<SplitRegex> split;
  if (!file.split_pattern.empty()) {
    Result<std::unique_ptr<SplitRegex>> compiled = SplitRegex::compile(file.split_pattern);
    if (!compiled.is_ok()) {
      return Status::invalid_argument(
          fmt::format("{}: pre_tokenizer.pretokenizers[0].pattern.Regex: {}",
                      tokenizer_json.string(), compiled.status().message()));
    }
    split = std::move(compiled).value();
  }
  return std::unique_ptr<Tokenizer>(
      new Tokenizer(std::make_unique<Impl>(std::move(file), std::move(split))));
}

std::vector<int32_t> Tokenizer::encode(std::string_view text) const {
  std::vector<int32_t> ids;
  ids.reserve(text.size() / 4 + 1);
  if (is_valid_utf8(text)) {
    impl_->encode(text, ids);
  } else {
    impl_->encode(sanitize_utf8(text), ids);
  }
  return ids;
}

std::string Tokenizer::decode(std::span<const int32_t> ids, bool skip_special_tokens) const {
  std::string bytes;
  for (const int32_t id : ids) {
    if (skip_special_tokens && is_special(id)) continue;
    bytes += token_bytes(id);
  }
  return bytes;
}

const std::string& Tokenizer::token_bytes(int32_t id) const {
  static const std::string empty;
  return impl_->exists(id) ? impl_->token_bytes_[static_cast<size_t>(id)] : empty;
}

bool Tokenizer::is_special(int32_t id) const {
  return impl_->exists(id) && impl_->kinds_[static_cast<size_t>(id)] == Impl::Kind::kSpecial;
}

bool Tokenizer::is_added(int32_t id) const {
  return impl_->exists(id) && impl_->kinds_[static_cast<size_t>(id)] != Impl::Kind::kOrdinary;
}

std::optional<int32_t> Tokenizer::added_token_id(std::string_view content) const {
  const auto it = impl_->added_ids_.find(std::string(content));
  if (it == impl_->added_ids_.end()) return std::nullopt;
  return it->second;
}

int32_t Tokenizer::vocab_size() const { return static_cast<int32_t>(impl_->token_bytes_.size()); }

}  // namespace kvarn
