// One choice's way from tokens to deltas: Detokenizer -> StopChecker -> OutputParser, and which
// tokens each delta accounts for. Pure state machine; one thread.
#pragma once

#include <cstdint>
#include <deque>
#include <optional>
#include <string>
#include <vector>

#include "engine/request.h"
#include "engine/tokenizer/detokenizer.h"
#include "engine/tokenizer/tokenizer.h"
#include "server/generate_output.h"
#include "server/generate_request.h"
#include "server/output_parser.h"
#include "server/stop_checker.h"

namespace kvarn {

// How the output of one prompt is to be treated; equal for all its choices.
struct OutputRules {
  std::vector<std::string> stop;
  int32_t min_tokens = 0;  // until then stop strings are not looked for
  bool include_stop_string = false;
  ResponseOptions response;
};

class ChoiceOutput {
 public:
  // `tokenizer`, `format` and `rules` must outlive it.
  ChoiceOutput(int32_t choice, const Tokenizer& tokenizer, const OutputFormat& format,
               OutputParser::State start, const OutputRules& rules);

  // Takes one event and appends the deltas that it released, the finish delta last if it ended the
  // choice. Events after the end are ignored.
  void push(const TokenEvent& event, std::vector<Delta>& deltas);

  bool done() const { return finish_.has_value(); }
  // The engine does not know that this choice has ended: a stop string did it.
  bool ended_by_stop_string() const { return ended_by_stop_string_; }
  const std::optional<Finish>& finish() const { return finish_; }
  int32_t num_tokens() const { return num_tokens_; }
  int32_t reasoning_tokens() const { return parser_.reasoning_tokens(); }

 private:
  void record(const SampledToken& token, bool in_text);
  void parse(const std::vector<TextPiece>& pieces);
  std::optional<size_t> push_text(int32_t token, bool silent);
  std::optional<size_t> finish_text();
  Delta delta_of(DeltaKind kind, int32_t num_tokens);
  void release(std::vector<Delta>& deltas);
  void release_finish(std::vector<Delta>& deltas);

  const int32_t choice_;
  const Tokenizer* tokenizer_;
  const OutputRules* rules_;
  Detokenizer detokenizer_;
  StopChecker stop_checker_;
  OutputParser parser_;
  std::vector<OutputDelta> parsed_;     // scratch of one push
  std::deque<int32_t> ids_;             // of tokens that no delta accounts for yet, where asked for
  std::deque<TokenLogprobs> logprobs_;  // likewise
  int32_t num_tokens_ = 0, sent_reasoning_tokens_ = 0;
  int32_t carried_tokens_ = 0;  // released with text that is not sent (include_reasoning false)
  bool ended_by_stop_string_ = false;
  std::optional<Finish> finish_;
};

}  // namespace kvarn
