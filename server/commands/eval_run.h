// The measuring part of `kvarn eval`: several ways to keep and read the KV cache, over the same
// tokens and the same needle cases. One thread.
#pragma once

#include <array>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "engine/tokenizer/tokenizer.h"
#include "models/model.h"
#include "server/chat_template.h"
#include "server/commands/kv_quality.h"
#include "server/commands/model_session.h"
#include "server/commands/needles.h"

namespace kvarn::commands {

constexpr int kDepthBuckets = 5;  // fifths of the text

// One way to keep and read the cache. The first of the list is the reference.
struct Variant {
  std::string name;
  KvFormat format;
  ReadingRule rule;
};

struct TextResult {
  int64_t tokens = 0, windows = 0;
  std::vector<KvQuality> quality;  // by variant; of the reference against itself: its perplexity
};

struct NeedleResult {
  int length = 0;
  int cases = 0;
  std::vector<int> hits;                                      // by variant
  std::vector<std::array<int, kDepthBuckets>> hits_by_depth;  // by variant
  std::array<int, kDepthBuckets> cases_by_depth{};
};

class Evaluation {
 public:
  // Prompts are fed in chunks of `chunk` tokens, a multiple of 128. All borrowed.
  Evaluation(std::vector<Variant> variants, int chunk, Backend& backend, Model& model,
             const Tokenizer& tokenizer)
      : variants_(std::move(variants)),
        chunk_(chunk),
        backend_(backend),
        model_(model),
        tokenizer_(tokenizer) {}

  // The first `max_tokens` of the text, in windows that are read on their own. The text must hold
  // two tokens.
  Result<TextResult> run_text(const std::string& text, int max_tokens, int window);

  // `cases` at each of the lengths. The longest and its answer must fit the model's context.
  Result<std::vector<NeedleResult>> run_needles(const ChatTemplate& chat_template,
                                                const NeedlePatterns& patterns,
                                                const std::vector<int>& lengths, int cases,
                                                uint64_t seed);

  const std::vector<Variant>& variants() const { return variants_; }

 private:
  using Sessions = std::vector<std::unique_ptr<ModelSession>>;
  Sessions make_sessions(int max_tokens);
  void run_window(std::span<const int32_t> tokens, Sessions& sessions,
                  std::vector<KvQuality>& quality);
  bool finds(ModelSession& session, const NeedleCase& needle, int max_new_tokens);

  std::vector<Variant> variants_;
  int chunk_;
  Backend& backend_;
  Model& model_;
  const Tokenizer& tokenizer_;
};

}  // namespace kvarn::commands
