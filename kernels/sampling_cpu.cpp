// sample_row(): the order of docs/api.md, "Sampling order". Temperature is monotone, so min_p,
// top_k and top_p all become one cut in the order (logit descending, id ascending), found without
// sorting the row: the k-th largest of the block maxima bounds the k-th largest logit from below,
// and only blocks above that bound are looked into. The draw is the inverse of the distribution
// function over the kept tokens in order of id, so it is the same however the cut was found.
#include <algorithm>
#include <cmath>
#include <limits>

#include "kernels/ops_cpu.h"
#include "kernels/philox.h"
#include "kernels/sampling.h"
#include "kernels/sampling_scan_cpu.h"

namespace kvarn {
namespace {

constexpr float kMinusInf = -std::numeric_limits<float>::infinity();
constexpr float kGreedyTemperature = 1e-5f;

struct Candidate {
  float logit;
  int32_t token;
};
bool comes_first(const Candidate& a, const Candidate& b) {
  return a.logit > b.logit || (a.logit == b.logit && a.token < b.token);
}

// Reused from row to row of a thread, so that a warm step allocates nothing here.
struct Scratch {
  std::vector<float> block_max, bounds;
  std::vector<double> block_sums;
  std::vector<Candidate> candidates;
  std::vector<Candidate> raw;  // logits as they were before a rule changed them
  std::vector<int32_t> tokens;
};

// The `count` first tokens in the order above among those with logit >= floor, sorted.
// scratch.block_max is the scan of `logits`.
void find_top(std::span<const float> logits, int64_t count, float floor, Scratch& scratch) {
  const auto num_blocks = static_cast<int64_t>(scratch.block_max.size());
  float bound = floor;
  if (count < num_blocks) {
    scratch.bounds = scratch.block_max;
    std::nth_element(scratch.bounds.begin(), scratch.bounds.begin() + (count - 1),
                     scratch.bounds.end(), std::greater<>());
    bound = std::max(bound, scratch.bounds[static_cast<size_t>(count - 1)]);
  }
  auto& found = scratch.candidates;
  found.clear();
  const auto n = static_cast<int64_t>(logits.size());
  for (int64_t block = 0; block < num_blocks; ++block) {
    if (scratch.block_max[static_cast<size_t>(block)] < bound) continue;
    const int64_t end = std::min((block + 1) * cpu::kScanBlock, n);
    for (int64_t i = block * cpu::kScanBlock; i < end; ++i) {
      const float logit = logits[static_cast<size_t>(i)];
      if (logit >= bound && logit > kMinusInf) found.push_back({logit, static_cast<int32_t>(i)});
    }
  }
  if (static_cast<int64_t>(found.size()) > count) {
    std::nth_element(found.begin(), found.begin() + (count - 1), found.end(), comes_first);
    found.resize(static_cast<size_t>(count));
  }
  std::sort(found.begin(), found.end(), comes_first);
}

int32_t first_maximum(std::span<const float> logits, float max, const Scratch& scratch) {
  size_t block = 0;
  while (scratch.block_max[block] != max) ++block;
  size_t i = block * size_t{cpu::kScanBlock};
  while (logits[i] != max) ++i;
  return static_cast<int32_t>(i);
}

// Masks, bias and penalties, in that order. What a token had before its first change goes to
// scratch.raw, for its logprob.
class LogitRules {
 public:
  LogitRules(std::span<float> logits, const SamplingRow& row, Scratch& scratch)
      : logits_(logits), row_(row), scratch_(scratch) {}

  void apply() {
    scratch_.raw.clear();
    for (const int32_t token : row_.banned) change(token, [](float) { return kMinusInf; });
    for (const LogitBias& b : row_.logit_bias) {
      change(b.token, [&](float logit) { return logit + b.bias; });
    }
    if (row_.repetition_penalty != 1.f) penalize_repetition();
    if (row_.presence_penalty != 0.f || row_.frequency_penalty != 0.f) penalize_output();
  }

 private:
  template <typename Fn>
  void change(int32_t token, Fn fn) {
    if (token < 0 || static_cast<size_t>(token) >= logits_.size()) return;
    float& logit = logits_[static_cast<size_t>(token)];
    if (row_.num_logprobs >= 0) scratch_.raw.push_back({logit, token});
    logit = fn(logit);
  }

  void penalize_repetition() {
    auto& tokens = scratch_.tokens;
    tokens.assign(row_.prompt_tokens.begin(), row_.prompt_tokens.end());
    tokens.insert(tokens.end(), row_.output_tokens.begin(), row_.output_tokens.end());
    std::sort(tokens.begin(), tokens.end());
    tokens.erase(std::unique(tokens.begin(), tokens.end()), tokens.end());
    const float penalty = row_.repetition_penalty;
    for (const int32_t token : tokens) {
      change(token, [&](float logit) { return logit > 0.f ? logit / penalty : logit * penalty; });
    }
  }

  void penalize_output() {
    auto& tokens = scratch_.tokens;
    tokens.assign(row_.output_tokens.begin(), row_.output_tokens.end());
    std::sort(tokens.begin(), tokens.end());
    for (size_t i = 0; i < tokens.size();) {
      size_t end = i + 1;
      while (end < tokens.size() && tokens[end] == tokens[i]) ++end;
      const auto count = static_cast<float>(end - i);
      change(tokens[i], [&](float logit) {
        return logit - row_.presence_penalty - row_.frequency_penalty * count;
      });
      i = end;
    }
  }

  std::span<float> logits_;
  const SamplingRow& row_;
  Scratch& scratch_;
};

// Log-softmax of the raw row: the normaliser and the most likely tokens.
float log_normalizer(std::span<const float> logits, float max, Scratch& scratch) {
  const double total = cpu::softmax_block_sums(logits.data(), static_cast<int64_t>(logits.size()),
                                               max, 1.f, kMinusInf, scratch.block_sums);
  return max + static_cast<float>(std::log(total));
}

// The whole vocabulary is kept (above `floor`): walk the block sums, then one block.
int32_t draw_from_row(std::span<const float> logits, const SamplingRow& row, float max, float floor,
                      double uniform, Scratch& scratch) {
  const auto n = static_cast<int64_t>(logits.size());
  const float inverse_temperature = 1.f / row.temperature;
  const double total = cpu::softmax_block_sums(logits.data(), n, max, inverse_temperature, floor,
                                               scratch.block_sums);
  const double target = uniform * total;
  double before = 0;
  size_t block = 0, last_filled = 0;
  for (; block < scratch.block_sums.size(); ++block) {
    const double sum = scratch.block_sums[block];
    if (sum > 0) last_filled = block;
    if (before + sum > target) break;
    before += sum;
  }
  // Sums are rounded: past the last block means its last token.
  if (block == scratch.block_sums.size()) block = last_filled;
  const int64_t begin = static_cast<int64_t>(block) * cpu::kScanBlock;
  const int64_t count = std::min(cpu::kScanBlock, n - begin);
  float weights[cpu::kScanBlock];
  cpu::softmax_weights(logits.data() + begin, count, max, inverse_temperature, floor, weights);
  int64_t chosen = 0;
  for (int64_t i = 0; i < count; ++i) {
    if (weights[i] <= 0.f) continue;
    chosen = i;
    before += static_cast<double>(weights[i]);
    if (before > target) break;
  }
  return static_cast<int32_t>(begin + chosen);
}

// Draws among scratch.candidates, weights computed beside them.
int32_t draw_from_candidates(const SamplingRow& row, float max, double uniform, Scratch& scratch) {
  auto& kept = scratch.candidates;
  std::sort(kept.begin(), kept.end(),
            [](const Candidate& a, const Candidate& b) { return a.token < b.token; });
  const double inverse_temperature = 1.0 / static_cast<double>(row.temperature);
  double total = 0;
  const auto weight = [&](const Candidate& c) {
    return std::exp((static_cast<double>(c.logit) - static_cast<double>(max)) *
                    inverse_temperature);
  };
  for (const Candidate& c : kept) total += weight(c);
  const double target = uniform * total;
  double sum = 0;
  int32_t chosen = kept.front().token;
  for (const Candidate& c : kept) {
    const double w = weight(c);
    if (w <= 0) continue;
    chosen = c.token;
    sum += w;
    if (sum > target) break;
  }
  return chosen;
}

// How many of scratch.candidates (sorted) it takes to reach `mass`; 0 if all of them do not.
size_t nucleus_size(const SamplingRow& row, float max, double mass, const Scratch& scratch) {
  const double inverse_temperature = 1.0 / static_cast<double>(row.temperature);
  double sum = 0;
  for (size_t i = 0; i < scratch.candidates.size(); ++i) {
    const double logit = static_cast<double>(scratch.candidates[i].logit);
    sum += std::exp((logit - static_cast<double>(max)) * inverse_temperature);
    if (sum >= mass) return i + 1;
  }
  return 0;
}

int32_t draw(std::span<const float> logits, const SamplingRow& row, float max, Scratch& scratch) {
  const auto n = static_cast<int64_t>(logits.size());
  const double uniform = sampling_uniform(row.seed, row.choice, row.output_position);
  // min_p: p >= min_p * p_max, as a bound on the logit.
  const float floor =
      row.min_p > 0.f ? std::min(max, max + row.temperature * std::log(row.min_p)) : kMinusInf;
  const bool has_top_k = row.top_k > 0 && row.top_k < n;
  const bool has_top_p = row.top_p < 1.f;
  if (!has_top_k && !has_top_p) return draw_from_row(logits, row, max, floor, uniform, scratch);

  if (has_top_k) {
    find_top(logits, row.top_k, floor, scratch);
    if (has_top_p) {
      double total = 0;
      const double inverse_temperature = 1.0 / static_cast<double>(row.temperature);
      for (const Candidate& c : scratch.candidates) {
        const double logit = static_cast<double>(c.logit);
        total += std::exp((logit - static_cast<double>(max)) * inverse_temperature);
      }
      const size_t kept = nucleus_size(row, max, static_cast<double>(row.top_p) * total, scratch);
      if (kept > 0) scratch.candidates.resize(kept);
    }
    return draw_from_candidates(row, max, uniform, scratch);
  }

  const double total = cpu::softmax_block_sums(logits.data(), n, max, 1.f / row.temperature, floor,
                                               scratch.block_sums);
  const double mass = static_cast<double>(row.top_p) * total;
  for (int64_t count = 64;; count *= 16) {  // most nuclei are small; a flat row ends at n
    find_top(logits, std::min(count, n), floor, scratch);
    const size_t kept = nucleus_size(row, max, mass, scratch);
    if (kept > 0) scratch.candidates.resize(kept);
    const bool complete = static_cast<int64_t>(scratch.candidates.size()) < std::min(count, n);
    if (kept > 0 || complete || count >= n) break;
  }
  return draw_from_candidates(row, max, uniform, scratch);
}

}  // namespace

SampledToken sample_row(std::span<float> logits, const SamplingRow& row) {
  thread_local Scratch scratch;
  SampledToken result;
  const auto n = static_cast<int64_t>(logits.size());

  float normalizer = 0.f;
  if (row.num_logprobs >= 0) {
    const cpu::LogitScan raw = cpu::scan_logits(logits.data(), n, scratch.block_max);
    if (raw.has_nan || !std::isfinite(raw.max)) {
      result.non_finite = true;
      return result;
    }
    normalizer = log_normalizer(logits, raw.max, scratch);
    if (row.num_logprobs > 0) {
      find_top(logits, std::min<int64_t>(row.num_logprobs, n), kMinusInf, scratch);
      result.top_logprobs.reserve(scratch.candidates.size());
      for (const Candidate& c : scratch.candidates) {
        result.top_logprobs.push_back({c.token, c.logit - normalizer});
      }
    }
  }

  LogitRules(logits, row, scratch).apply();
  const cpu::LogitScan scan = cpu::scan_logits(logits.data(), n, scratch.block_max);
  if (scan.has_nan || !std::isfinite(scan.max)) {
    result.non_finite = true;
    result.top_logprobs.clear();
    return result;
  }

  const bool greedy = row.temperature < kGreedyTemperature || row.top_k == 1 || row.top_p <= 0.f;
  result.token =
      greedy ? first_maximum(logits, scan.max, scratch) : draw(logits, row, scan.max, scratch);
  if (row.num_logprobs >= 0) {
    float raw = logits[static_cast<size_t>(result.token)];
    for (const Candidate& c : scratch.raw) {
      if (c.token == result.token) {
        raw = c.logit;
        break;
      }
    }
    result.logprob = raw - normalizer;
  }
  return result;
}

namespace cpu {

void sample(Tensor logits, std::span<const SamplingRow> rows, std::span<SampledToken> out,
            ThreadPool& pool) {
  const int64_t vocab = logits.dim(1);
  pool.parallel_for(static_cast<int64_t>(rows.size()), 1, [&](int64_t begin, int64_t end, int) {
    for (int64_t row = begin; row < end; ++row) {
      const std::span<float> row_logits(logits.data<float>() + row * vocab,
                                        static_cast<size_t>(vocab));
      out[static_cast<size_t>(row)] = sample_row(row_logits, rows[static_cast<size_t>(row)]);
    }
  });
}

}  // namespace cpu
}  // namespace kvarn
