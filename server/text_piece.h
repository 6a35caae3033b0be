// The unit that flows from the detokeniser to the client: text of one token, in order.
//
// How a choice composes them (one of each per choice, fed on one thread):
//
//   std::string text = detokenizer.push(id);                 // "" while a character is incomplete
//   StopChecker::Output out = stop_checker.push(id, text);   // pieces that no stop string can
//   touch for (const TextPiece& piece : out.pieces) parser.push(piece, deltas); if (out.matched)
//   ...                                     // send finish to the engine at the end:  for (piece :
//   stop_checker.finish(detokenizer.finish()).pieces) parser.push(...);
//                parser.finish(deltas);
//
// Token accounting, for logprobs and token_ids. Every token pushed comes out of the stop checker as
// one or more pieces, exactly one of which has `completes_token`: the one that gives out the last
// of its text (a token without text, or one cut off by a stop string, has a piece with empty text).
// The parser adds them up: OutputDelta::num_tokens is how many tokens, in order of generation, are
// accounted for by this delta. Tokens whose text was dropped or is still held join the next delta;
// what is left when parser.finish() returns goes with the finish chunk. So
//   sum of num_tokens + parser.unaccounted_tokens() == tokens pushed   (after finish).
#pragma once

#include <cstdint>
#include <string>

namespace kvarn {

struct TextPiece {
  int32_t token_id = -1;
  std::string text;
  bool completes_token = false;
  friend bool operator==(const TextPiece&, const TextPiece&) = default;
};

}  // namespace kvarn
