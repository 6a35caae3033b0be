// Choosing one token from a row of logits. Order (docs/api.md, "Sampling order"): logprobs are
// taken from the raw logits; then masks, logit bias, repetition, presence and frequency penalties,
// temperature, min_p, top_k, top_p, draw. Ties in greedy decoding go to the lowest id. The random
// number is Philox4x32-10 keyed by (seed, choice, output position), so it depends on nothing else.
// Thread-safe: pure functions.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

namespace kvarn {

struct LogitBias {
  int32_t token;
  float bias;
};

struct SamplingRow {
  float temperature = 1.f;  // below 1e-5: greedy
  float top_p = 1.f;        // 0: the most likely token only
  float min_p = 0.f;
  int32_t top_k = 0;  // <= 0: off
  float repetition_penalty = 1.f, presence_penalty = 0.f, frequency_penalty = 0.f;
  uint64_t seed = 0;
  uint32_t choice = 0;           // index of the choice within its request
  uint32_t output_position = 0;  // 0 for the first generated token
  std::span<const LogitBias> logit_bias;
  std::span<const int32_t> banned;         // masked ids (EOS and stop ids before min_tokens, ...)
  std::span<const int32_t> prompt_tokens;  // for repetition_penalty
  std::span<const int32_t> output_tokens;  // for all penalties
  int32_t num_logprobs = -1;  // -1: none; 0: of the sampled token; n: and of the n most likely
};

struct TokenLogprob {
  int32_t token;
  float logprob;
};

struct SampledToken {
  int32_t token = -1;
  float logprob = 0.f;  // of `token` under the raw logits, where num_logprobs >= 0
  std::vector<TokenLogprob> top_logprobs;  // most likely first, ties by lower id
  bool non_finite = false;  // the row held NaN or only -inf: the step is to be failed
};

// The specification. `logits` is scratch afterwards.
SampledToken sample_row(std::span<float> logits, const SamplingRow& row);

}  // namespace kvarn
