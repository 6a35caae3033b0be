// Needle retrieval as tools/train_demo/README.md defines it: a fact planted at some depth of a long
// text, two distractors beside it, and a question. Cases are the same for every KV format. Pure.
#pragma once

#include <cstdint>
#include <filesystem>
#include <functional>
#include <string>
#include <vector>

#include "kernels/core/status.h"

namespace kvarn::commands {

struct NeedlePatterns {
  std::string sentence, question, prompt;
  std::vector<std::string> adjectives, places;
  int code_digits = 5, distractors = 2, max_new_tokens = 40;
  bool enable_thinking = false;
  std::string filler_text;
};
// Reads needles.json and the filler beside it. Errors name the file and the field.
Result<NeedlePatterns> load_needles(const std::filesystem::path& needles_json);

// A piece of filler text; `starts_paragraph` puts an empty line before it.
struct Sentence {
  std::string text;
  bool starts_paragraph = false;
};
// Ends at . ! or ? before a space and a capital letter, or at the end of a paragraph.
std::vector<Sentence> split_sentences(const std::string& text);

struct NeedleCase {
  double depth = 0;  // of the needle in the text, 0..1
  std::string code;  // a reply that contains it is a hit
  std::vector<int32_t> prompt;
};
// The user message -> tokens of the whole prompt, chat template included.
using RenderPrompt = std::function<Result<std::vector<int32_t>>(const std::string&)>;

// Case `index` of `count` at a length of at most `tokens`; depths are spread evenly over the cases.
// The same seed gives the same case.
Result<NeedleCase> make_needle_case(const NeedlePatterns& patterns,
                                    const std::vector<Sentence>& filler, const RenderPrompt& render,
                                    int tokens, int index, int count, uint64_t seed);

}  // namespace kvarn::commands
