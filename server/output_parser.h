// Splits one choice's output into reasoning and content (docs/api.md, output parser) as it is
// generated. Markers are recognised by token id where the vocabulary has them as added tokens, so
// the same characters spelled with ordinary tokens stay text; by text only where it has not.
// Concatenated per kind, the deltas are the same however the text was cut into pieces. Pure; not
// thread-safe. How to compose it with the stop checker: text_piece.h.
#pragma once

#include <cstdint>
#include <deque>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "engine/tokenizer/tokenizer.h"
#include "server/text_piece.h"

namespace kvarn {

// How a model marks its reasoning. Made once per model, shared by all choices.
struct OutputFormat {
  bool reasoning = false;  // false: everything is content, markers included
  std::string think_open = "<think>", think_close = "</think>";
  int32_t think_open_id = -1, think_close_id = -1;  // -1: not an added token, matched by text

  static OutputFormat plain() { return {}; }              // --reasoning-parser none, completions
  static OutputFormat qwen3(const Tokenizer& tokenizer);  // <think> ... </think>
};

struct OutputDelta {
  enum class Kind : uint8_t { kReasoning, kContent };
  Kind kind = Kind::kContent;
  std::string text;        // never empty
  int32_t num_tokens = 0;  // tokens accounted for, in order of generation; may be 0
  friend bool operator==(const OutputDelta&, const OutputDelta&) = default;
};

class OutputParser {
 public:
  enum class State : uint8_t { kStart, kReasoning, kContent };

  // The state in which the output begins: inside an open <think> of the generation prompt, after a
  // closed one, or neither. Looks only behind the prompt's last special token (so at the assistant
  // header that the template wrote, never at message text).
  static State start_state(const OutputFormat& format, const Tokenizer& tokenizer,
                           std::span<const int32_t> prompt);

  // `format` must outlive the parser.
  OutputParser(const OutputFormat& format, State start);

  // Appends what the piece released; neighbouring deltas of one kind are merged within `deltas`.
  void push(const TextPiece& piece, std::vector<OutputDelta>& deltas);
  void finish(std::vector<OutputDelta>& deltas);

  // Tokens from <think> to </think> inclusive (from the first output token where the prompt opened
  // it), so far.
  int32_t reasoning_tokens() const { return reasoning_tokens_; }
  // Tokens pushed that no delta has accounted for yet; after finish(): those of the finish chunk.
  int32_t unaccounted_tokens() const { return static_cast<int32_t>(token_ends_.size()); }
  State state() const { return state_; }

 private:
  enum class Marker : uint8_t { kOpen, kClose };

  void on_marker_token(Marker marker, const TextPiece& piece, std::vector<OutputDelta>& deltas);
  void scan_text(std::string_view text, std::vector<OutputDelta>& deltas);
  void flush_scan(uint64_t end, std::vector<OutputDelta>& deltas);
  void on_text(std::string_view text, uint64_t end, std::vector<OutputDelta>& deltas);
  void on_marker(Marker marker, uint64_t begin, std::vector<OutputDelta>& deltas);
  void emit(OutputDelta::Kind kind, std::string text, uint64_t end,
            std::vector<OutputDelta>& deltas);

  const OutputFormat* format_;
  State state_;
  bool at_block_start_;        // of Reasoning or Content: leading newlines are dropped
  std::string held_;           // whitespace of Start, trailing newlines of Reasoning
  std::string scanned_;        // may still become a marker that is matched by text
  std::string marker_text_;    // of a marker token whose text came in several pieces so far
  bool in_reasoning_ = false;  // the token being pushed touched Reasoning
  int32_t reasoning_tokens_ = 0;
  // Positions are bytes of the text pushed. What is held is always its end, so a token is accounted
  // for by the first delta that ends at or behind the token's end.
  uint64_t position_ = 0;
  std::deque<uint64_t> token_ends_;  // of the tokens not yet accounted for
};

}  // namespace kvarn
