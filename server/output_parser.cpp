#include "server/output_parser.h"

#include <algorithm>
#include <utility>

namespace kvarn {
namespace {

constexpr std::string_view kWhitespace = " \t\n\r\v\f";

// Length of the longest end of `text` that is a proper beginning of `marker`.
size_t possible_prefix(std::string_view text, std::string_view marker) {
  for (size_t n = std::min(text.size(), marker.size() - 1); n > 0; --n) {
    if (marker.starts_with(text.substr(text.size() - n))) return n;
  }
  return 0;
}

}  // namespace

OutputFormat OutputFormat::qwen3(const Tokenizer& tokenizer) {
  OutputFormat format;
  format.reasoning = true;
  format.think_open_id = tokenizer.added_token_id(format.think_open).value_or(-1);
  format.think_close_id = tokenizer.added_token_id(format.think_close).value_or(-1);
  return format;
}

OutputParser::State OutputParser::start_state(const OutputFormat& format,
                                              const Tokenizer& tokenizer,
                                              std::span<const int32_t> prompt) {
  if (!format.reasoning) return State::kContent;
  size_t begin = prompt.size();
  while (begin > 0 && !tokenizer.is_special(prompt[begin - 1])) {
    --begin;
    // Special or not, a marker that is one token decides by its id.
    if (prompt[begin] == format.think_open_id) return State::kReasoning;
    if (prompt[begin] == format.think_close_id) return State::kContent;
  }
  if (begin > 0 && prompt[begin - 1] == format.think_open_id) return State::kReasoning;
  if (begin > 0 && prompt[begin - 1] == format.think_close_id) return State::kContent;

  const std::string header = tokenizer.decode(prompt.subspan(begin), false);
  const size_t open = format.think_open_id < 0 ? header.rfind(format.think_open) : header.npos;
  const size_t close = format.think_close_id < 0 ? header.rfind(format.think_close) : header.npos;
  if (open == header.npos && close == header.npos) return State::kStart;
  if (open == header.npos) return State::kContent;
  return close == header.npos || close < open ? State::kReasoning : State::kContent;
}

OutputParser::OutputParser(const OutputFormat& format, State start)
    : format_(&format),
      state_(format.reasoning ? start : State::kContent),
      at_block_start_(state_ == State::kReasoning) {}

void OutputParser::push(const TextPiece& piece, std::vector<OutputDelta>& deltas) {
  position_ += piece.text.size();
  if (piece.completes_token) token_ends_.push_back(position_);
  in_reasoning_ |= state_ == State::kReasoning;

  if (!format_->reasoning) {
    on_text(piece.text, position_, deltas);
  } else if (piece.token_id >= 0 && piece.token_id == format_->think_open_id) {
    on_marker_token(Marker::kOpen, piece, deltas);
  } else if (piece.token_id >= 0 && piece.token_id == format_->think_close_id) {
    on_marker_token(Marker::kClose, piece, deltas);
  } else {
    scan_text(piece.text, deltas);
  }

  in_reasoning_ |= state_ == State::kReasoning;
  if (piece.completes_token) {
    reasoning_tokens_ += in_reasoning_ ? 1 : 0;
    in_reasoning_ = false;
  }
}

void OutputParser::finish(std::vector<OutputDelta>& deltas) {
  flush_scan(position_, deltas);
  if (state_ != State::kReasoning) {
    emit(OutputDelta::Kind::kContent, std::exchange(held_, {}), position_, deltas);
  }
  held_.clear();
}

// The text is the marker's, behind what the detokeniser released with it (a U+FFFD for a character
// that the marker cut off), or a beginning of it if a stop string ended the output inside: that
// part is dropped, so no half marker reaches a client.
void OutputParser::on_marker_token(Marker marker, const TextPiece& piece,
                                   std::vector<OutputDelta>& deltas) {
  if (marker_text_.empty()) flush_scan(position_ - piece.text.size(), deltas);
  marker_text_ += piece.text;
  if (!piece.completes_token) return;
  const std::string text = std::exchange(marker_text_, {});
  const std::string_view spelling =
      marker == Marker::kOpen ? format_->think_open : format_->think_close;
  // Without text it is a special token that the detokeniser skipped.
  const bool whole = text.empty() || std::string_view(text).ends_with(spelling);
  const size_t length = text.empty() ? 0
                        : whole      ? spelling.size()
                                     : possible_prefix(text, spelling);
  const std::string_view before = std::string_view(text).substr(0, text.size() - length);
  on_text(before, position_ - length, deltas);
  if (whole) on_marker(marker, position_ - length, deltas);
}

// Markers without an id are searched in the text; a possible beginning of one is held back.
void OutputParser::scan_text(std::string_view text, std::vector<OutputDelta>& deltas) {
  const bool open_by_text = format_->think_open_id < 0, close_by_text = format_->think_close_id < 0;
  if (!open_by_text && !close_by_text) return on_text(text, position_, deltas);
  scanned_ += text;
  std::string_view rest = scanned_;
  const auto at = [this](std::string_view behind) { return position_ - behind.size(); };
  while (true) {
    const size_t open = open_by_text ? rest.find(format_->think_open) : rest.npos;
    const size_t close = close_by_text ? rest.find(format_->think_close) : rest.npos;
    const size_t found = std::min(open, close);
    if (found == rest.npos) break;
    const Marker marker = open < close ? Marker::kOpen : Marker::kClose;
    const size_t length =
        (marker == Marker::kOpen ? format_->think_open : format_->think_close).size();
    on_text(rest.substr(0, found), at(rest.substr(found)), deltas);
    on_marker(marker, at(rest.substr(found)), deltas);
    rest.remove_prefix(found + length);
  }
  size_t hold = 0;
  if (open_by_text) hold = std::max(hold, possible_prefix(rest, format_->think_open));
  if (close_by_text) hold = std::max(hold, possible_prefix(rest, format_->think_close));
  on_text(rest.substr(0, rest.size() - hold), position_ - hold, deltas);
  scanned_ = std::string(rest.substr(rest.size() - hold));
}

void OutputParser::flush_scan(uint64_t end, std::vector<OutputDelta>& deltas) {
  on_text(std::exchange(scanned_, {}), end, deltas);
}

void OutputParser::on_text(std::string_view text, uint64_t end, std::vector<OutputDelta>& deltas) {
  if (at_block_start_) {
    text.remove_prefix(std::min(text.find_first_not_of('\n'), text.size()));
    if (!text.empty()) at_block_start_ = false;
  }
  if (text.empty()) return;
  switch (state_) {
    case State::kStart:
      held_ += text;
      if (text.find_first_not_of(kWhitespace) == text.npos) return;
      state_ = State::kContent;
      emit(OutputDelta::Kind::kContent, std::exchange(held_, {}), end, deltas);
      return;
    case State::kReasoning: {
      const size_t tail = text.size() - 1 - text.find_last_not_of('\n');  // npos + 1 == 0
      if (tail == text.size()) {
        held_ += text;
        return;
      }
      std::string released = std::exchange(held_, std::string(text.substr(text.size() - tail)));
      released += text.substr(0, text.size() - tail);
      emit(OutputDelta::Kind::kReasoning, std::move(released), end - tail, deltas);
      return;
    }
    case State::kContent:
      emit(OutputDelta::Kind::kContent, std::string(text), end, deltas);
      return;
  }
}

// `begin` is the position of the marker's first byte.
void OutputParser::on_marker(Marker marker, uint64_t begin, std::vector<OutputDelta>& deltas) {
  if (marker == Marker::kOpen) {
    if (state_ == State::kReasoning) return;  // opened twice (the prompt opened it, too): dropped
    // A marker spelled by several tokens: those before the last were not counted when they came.
    if (format_->think_open_id < 0) {
      const size_t completed = token_ends_.size();
      for (size_t i = completed; i > 0 && token_ends_[i - 1] > begin; --i) {
        if (token_ends_[i - 1] < position_) ++reasoning_tokens_;
      }
    }
    held_.clear();
    state_ = State::kReasoning;
    at_block_start_ = true;
    in_reasoning_ = true;
  } else if (state_ == State::kReasoning) {
    held_.clear();
    state_ = State::kContent;
    at_block_start_ = true;
  } else {  // stray: dropped; not whitespace, so it ends Start
    state_ = State::kContent;
    emit(OutputDelta::Kind::kContent, std::exchange(held_, {}), begin, deltas);
  }
}

void OutputParser::emit(OutputDelta::Kind kind, std::string text, uint64_t end,
                        std::vector<OutputDelta>& deltas) {
  if (text.empty()) return;
  int32_t num_tokens = 0;
  for (; !token_ends_.empty() && token_ends_.front() <= end; token_ends_.pop_front()) ++num_tokens;
  if (!deltas.empty() && deltas.back().kind == kind) {
    deltas.back().text += text;
    deltas.back().num_tokens += num_tokens;
  } else {
    deltas.push_back({kind, std::move(text), num_tokens});
  }
}

}  // namespace kvarn
