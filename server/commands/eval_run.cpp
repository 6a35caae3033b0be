#include "server/commands/eval_run.h"

#include <algorithm>

#include <fmt/format.h>
#include <nlohmann/json.hpp>

#include "server/commands/table.h"

namespace kvarn::commands {
namespace {

int32_t most_likely(std::span<const float> logits) {
  return static_cast<int32_t>(std::max_element(logits.begin(), logits.end()) - logits.begin());
}

}  // namespace

Result<TextResult> Evaluation::run_text(const std::string& text, int max_tokens, int window) {
  std::vector<int32_t> tokens = tokenizer_.encode(text);
  tokens.resize(std::min(tokens.size(), static_cast<size_t>(max_tokens)));
  if (tokens.size() < 2) {
    return Status::invalid_argument(
        fmt::format("--text holds {} tokens, at least 2 are needed", tokens.size()));
  }
  TextResult result;
  result.quality.resize(variants_.size());
  Sessions sessions = make_sessions(window);
  Progress progress("text, tokens", static_cast<int64_t>(tokens.size()));
  for (size_t at = 0; at + 1 < tokens.size(); at += static_cast<size_t>(window)) {
    const auto span = std::span<const int32_t>(tokens).subspan(at).first(
        std::min(static_cast<size_t>(window), tokens.size() - at));
    run_window(span, sessions, result.quality);
    result.tokens += static_cast<int64_t>(span.size());
    ++result.windows;
    progress.update(result.tokens);
  }
  return result;
}

// All variants read the window chunk by chunk, side by side, so that only one chunk's logits of
// each are in memory.
void Evaluation::run_window(std::span<const int32_t> tokens, Sessions& sessions,
                            std::vector<KvQuality>& quality) {
  for (const auto& session : sessions) session->reset();
  const auto vocab = static_cast<size_t>(model_.config().vocab_size);
  const auto chunk = static_cast<size_t>(chunk_);
  for (size_t at = 0; at < tokens.size(); at += chunk) {
    const auto part = tokens.subspan(at, std::min(chunk, tokens.size() - at));
    std::span<const float> reference;
    for (size_t v = 0; v < sessions.size(); ++v) {
      sessions[v]->prefill(part, /*all_rows=*/true, [&](int, std::span<const float> logits) {
        if (v == 0) reference = logits;
        for (size_t row = 0; row < part.size(); ++row) {
          const size_t next = at + row + 1;
          quality[v].add(reference.subspan(row * vocab, vocab), logits.subspan(row * vocab, vocab),
                         next < tokens.size() ? tokens[next] : -1);
        }
      });
    }
  }
}

Result<std::vector<NeedleResult>> Evaluation::run_needles(const ChatTemplate& chat_template,
                                                          const NeedlePatterns& patterns,
                                                          const std::vector<int>& lengths,
                                                          int cases, uint64_t seed) {
  const int context = model_.config().max_position_embeddings;
  const int needed = *std::max_element(lengths.begin(), lengths.end()) + patterns.max_new_tokens;
  if (needed > context) {
    return Status::invalid_argument(
        fmt::format("--lengths and {} new tokens reach {}, the model's context is {}",
                    patterns.max_new_tokens, needed, context));
  }
  const std::vector<Sentence> filler = split_sentences(patterns.filler_text);
  const RenderPrompt render = [&](const std::string& message) -> Result<std::vector<int32_t>> {
    nlohmann::ordered_json user = {{"role", "user"}, {"content", message}};
    nlohmann::ordered_json variables = {{"messages", nlohmann::ordered_json::array({user})},
                                        {"add_generation_prompt", true},
                                        {"enable_thinking", patterns.enable_thinking}};
    KVARN_ASSIGN_OR_RETURN(const std::string prompt, chat_template.render(variables));
    return tokenizer_.encode(prompt);
  };
  Sessions sessions = make_sessions(needed);
  std::vector<NeedleResult> results;
  Progress progress("needles, cases", static_cast<int64_t>(lengths.size()) * cases);
  int64_t done = 0;
  for (const int length : lengths) {
    NeedleResult result;
    result.length = length;
    result.hits.resize(variants_.size());
    result.hits_by_depth.resize(variants_.size());
    for (int i = 0; i < cases; ++i) {
      KVARN_ASSIGN_OR_RETURN(const NeedleCase needle,
                             make_needle_case(patterns, filler, render, length, i, cases, seed));
      const auto bucket = static_cast<size_t>(
          std::min(static_cast<int>(needle.depth * kDepthBuckets), kDepthBuckets - 1));
      ++result.cases;
      ++result.cases_by_depth[bucket];
      for (size_t v = 0; v < sessions.size(); ++v) {
        if (!finds(*sessions[v], needle, patterns.max_new_tokens)) continue;
        ++result.hits[v];
        ++result.hits_by_depth[v][bucket];
      }
      progress.update(++done);
    }
    results.push_back(std::move(result));
  }
  return results;
}

Evaluation::Sessions Evaluation::make_sessions(int max_tokens) {
  Sessions sessions;
  for (const Variant& variant : variants_) {
    sessions.push_back(std::make_unique<ModelSession>(model_, backend_, variant.format,
                                                      variant.rule, max_tokens, chunk_));
  }
  return sessions;
}

// Greedy, until the code has come, the answer ends or it is long enough.
bool Evaluation::finds(ModelSession& session, const NeedleCase& needle, int max_new_tokens) {
  session.reset();
  int32_t token = -1;
  session.prefill(needle.prompt, /*all_rows=*/false,
                  [&](int, std::span<const float> logits) { token = most_likely(logits); });
  std::string answer;
  const std::vector<int32_t>& ends = model_.config().eos_token_ids;
  for (int i = 0; i < max_new_tokens; ++i) {
    if (std::find(ends.begin(), ends.end(), token) != ends.end()) return false;
    answer += tokenizer_.decode({&token, 1}, /*skip_special_tokens=*/true);
    if (answer.find(needle.code) != std::string::npos) return true;
    token = most_likely(session.decode(token));
  }
  return false;
}

}  // namespace kvarn::commands
