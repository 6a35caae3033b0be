#include "engine/tokenizer/detokenizer.h"

#include <utility>

#include "engine/tokenizer/utf8.h"

namespace kvarn {
namespace {

// Moves the whole characters of `bytes` to the result, U+FFFD for ill-formed pieces. What is left
// in `bytes` is a beginning of a character, at most 3 bytes.
std::string take_complete(std::string& bytes) {
  std::string text;
  std::string_view rest = bytes;
  while (!rest.empty()) {
    const size_t ascii = ascii_prefix(rest);
    text += rest.substr(0, ascii);
    rest.remove_prefix(ascii);
    if (rest.empty()) break;
    const Utf8Step step = utf8_step(rest);
    if (step.kind == Utf8Step::Kind::kIncomplete) break;
    text += step.kind == Utf8Step::Kind::kCharacter ? rest.substr(0, step.length)
                                                    : kReplacementCharacter;
    rest.remove_prefix(step.length);
  }
  bytes.erase(0, bytes.size() - rest.size());
  return text;
}

}  // namespace

std::string Detokenizer::push(int32_t id) {
  if (skip_special_tokens_ && tokenizer_->is_special(id)) return {};
  pending_ += tokenizer_->token_bytes(id);
  return take_complete(pending_);
}

std::string Detokenizer::finish() {
  if (pending_.empty()) return {};
  pending_.clear();
  return std::string(kReplacementCharacter);
}

std::string sanitize_utf8(std::string_view bytes) {
  std::string rest(bytes);
  std::string text = take_complete(rest);
  if (!rest.empty()) text += kReplacementCharacter;
  return text;
}

bool is_valid_utf8(std::string_view bytes) {
  while (true) {
    bytes.remove_prefix(ascii_prefix(bytes));
    if (bytes.empty()) return true;
    const Utf8Step step = utf8_step(bytes);
    if (step.kind != Utf8Step::Kind::kCharacter) return false;
    bytes.remove_prefix(step.length);
  }
}

}  // namespace kvarn
