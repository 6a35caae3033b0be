#include "engine/tokenizer/added_tokens.h"

#include <algorithm>

#include "engine/tokenizer/utf8.h"

namespace kvarn {
namespace {

// Unicode's White_Space property, which is closed: it has not changed since Unicode 6.3.
bool is_white_space(char32_t c) {
  return (c >= 0x09 && c <= 0x0D) || c == 0x20 || c == 0x85 || c == 0xA0 || c == 0x1680 ||
         (c >= 0x2000 && c <= 0x200A) || c == 0x2028 || c == 0x2029 || c == 0x202F || c == 0x205F ||
         c == 0x3000;
}

size_t leading_white_space(std::string_view text) {
  size_t length = 0;
  while (length < text.size()) {
    const Utf8Step step = utf8_step(text.substr(length));
    if (step.kind != Utf8Step::Kind::kCharacter || !is_white_space(step.code_point)) break;
    length += step.length;
  }
  return length;
}

size_t trailing_white_space(std::string_view text) {
  size_t length = 0;
  while (length < text.size()) {
    size_t begin = text.size() - length - 1;
    while (begin > 0 && (static_cast<uint8_t>(text[begin]) & 0xC0) == 0x80) --begin;
    const Utf8Step step = utf8_step(text.substr(begin));
    if (step.kind != Utf8Step::Kind::kCharacter || !is_white_space(step.code_point)) break;
    length = text.size() - begin;
  }
  return length;
}

}  // namespace

void AddedTokenMatcher::add(const AddedToken& token, std::string_view content) {
  if (content.empty()) return;
  is_first_byte_[static_cast<uint8_t>(content.front())] = true;
  uint32_t node = 0;
  for (const char byte : content) {
    const auto next = static_cast<uint32_t>(nodes_.size());
    const auto [it, is_new] = nodes_[node].children.try_emplace(byte, next);
    node = it->second;
    if (is_new) nodes_.emplace_back();
  }
  nodes_[node].id = token.id;
  nodes_[node].lstrip = token.lstrip;
  nodes_[node].rstrip = token.rstrip;
}

const AddedTokenMatcher::Node* AddedTokenMatcher::longest_at(std::string_view text, size_t begin,
                                                             size_t& end) const {
  const Node* longest = nullptr;
  const Node* node = &nodes_[0];
  for (size_t i = begin; i < text.size(); ++i) {
    const auto it = node->children.find(text[i]);
    if (it == node->children.end()) break;
    node = &nodes_[it->second];
    if (node->id < 0) continue;
    longest = node;
    end = i + 1;
  }
  return longest;
}

std::vector<AddedTokenMatcher::Segment> AddedTokenMatcher::split(std::string_view text) const {
  std::vector<Segment> segments;
  size_t done = 0;
  for (size_t i = 0; i < text.size();) {
    size_t end = 0;
    const Node* token =
        is_first_byte_[static_cast<uint8_t>(text[i])] ? longest_at(text, i, end) : nullptr;
    if (!token) {
      ++i;
      continue;
    }
    size_t begin = i;
    // Spaces that the token before took are not taken twice.
    if (token->lstrip) begin = std::max(done, i - trailing_white_space(text.substr(0, i)));
    if (token->rstrip) end += leading_white_space(text.substr(end));
    if (done < begin) segments.push_back({done, begin, -1});
    segments.push_back({begin, end, token->id});
    done = i = end;
  }
  if (done < text.size()) segments.push_back({done, text.size(), -1});
  return segments;
}

}  // namespace kvarn
