#include "server/stop_checker.h"

#include <algorithm>
#include <utility>

#include "kernels/core/check.h"

namespace kvarn {

StopChecker::StopChecker(std::vector<std::string> stop_strings, bool include_stop_string)
    : include_stop_string_(include_stop_string) {
  for (std::string& text : stop_strings) {
    CHECK(!text.empty(), "stop strings are checked when the request is parsed");
    Pattern pattern{std::move(text), {}, 0};
    pattern.border.assign(pattern.text.size(), 0);
    for (size_t i = 1; i < pattern.text.size(); ++i) {
      uint32_t k = pattern.border[i - 1];
      while (k > 0 && pattern.text[i] != pattern.text[k]) k = pattern.border[k - 1];
      pattern.border[i] = k + (pattern.text[i] == pattern.text[k] ? 1 : 0);
    }
    patterns_.push_back(std::move(pattern));
  }
}

StopChecker::Output StopChecker::push(int32_t token_id, std::string_view text) {
  if (has_matched_) return {};
  last_token_ = token_id;
  return append({token_id, std::string(text), true});
}

StopChecker::Output StopChecker::finish(std::string_view tail) {
  Output out;
  if (has_matched_) return out;
  // The token the tail belongs to has been completed already, with or without text.
  if (!tail.empty()) out = append({last_token_, std::string(tail), false});
  if (!has_matched_) release(held_bytes_, out);
  return out;
}

StopChecker::Output StopChecker::append(Held token) {
  Output out;
  const size_t before = held_bytes_;
  held_bytes_ += token.text.size();
  held_.push_back(std::move(token));
  const std::string& text = held_.back().text;
  for (size_t i = 0; i < text.size(); ++i) {
    const std::optional<size_t> matched = advance(text[i]);
    if (!matched) continue;
    out.matched = matched;
    has_matched_ = true;
    const size_t end = before + i + 1;
    release(include_stop_string_ ? end : end - patterns_[*matched].text.size(), out);
    for (const Held& cut : held_) out.pieces.push_back({cut.token_id, "", cut.completes_token});
    held_.clear();
    held_bytes_ = 0;
    return out;
  }
  release(held_bytes_ - possible_prefix(), out);
  return out;
}

std::optional<size_t> StopChecker::advance(char byte) {
  std::optional<size_t> matched;
  for (size_t i = 0; i < patterns_.size(); ++i) {
    Pattern& pattern = patterns_[i];
    uint32_t& k = pattern.state;
    while (k > 0 && pattern.text[k] != byte) k = pattern.border[k - 1];
    if (pattern.text[k] == byte) ++k;
    if (k < pattern.text.size()) continue;
    k = pattern.border[k - 1];
    if (!matched || pattern.text.size() > patterns_[*matched].text.size()) matched = i;
  }
  return matched;
}

size_t StopChecker::possible_prefix() const {
  size_t longest = 0;
  for (const Pattern& pattern : patterns_) longest = std::max<size_t>(longest, pattern.state);
  return longest;
}

void StopChecker::release(size_t num_bytes, Output& out) {
  while (!held_.empty() && held_.front().text.size() <= num_bytes) {
    Held& front = held_.front();
    num_bytes -= front.text.size();
    held_bytes_ -= front.text.size();
    out.pieces.push_back({front.token_id, std::move(front.text), front.completes_token});
    held_.pop_front();
  }
  if (num_bytes == 0 || held_.empty()) return;
  Held& front = held_.front();
  out.pieces.push_back({front.token_id, front.text.substr(0, num_bytes), false});
  front.text.erase(0, num_bytes);
  held_bytes_ -= num_bytes;
}

}  // namespace kvarn
