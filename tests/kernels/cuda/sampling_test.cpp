// The GPU sampler against sample_row(), its specification. Greedy tokens, tokens of top_logprobs
// and failures must be equal. A drawn token must be equal too, unless the row's uniform number (or
// the end of the nucleus) lies within 1e-5 of a border of the distribution function, computed here
// in float64: weights are fp32 on both sides and are added in different orders. Logprobs: 1e-4.
#include "kernels/sampling_cuda.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <memory>
#include <numeric>
#include <random>
#include <string>

#include "kernels/philox.h"
#include "tests/support/cuda_fixture.h"
#include "tests/support/random_tensor.h"

namespace kvarn {
namespace {

using test::DeviceArray;

constexpr float kInf = std::numeric_limits<float>::infinity();
constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();
constexpr double kBorder = 1e-5;

// A row with what its spans view.
struct Case {
  std::vector<float> logits;
  SamplingRow row;
  std::vector<LogitBias> bias;
  std::vector<int32_t> banned, prompt, output;
  const SamplingRow& view() {
    row.logit_bias = bias;
    row.banned = banned;
    row.prompt_tokens = prompt;
    row.output_tokens = output;
    return row;
  }
};

// Masks, bias and penalties in fp32, each operation rounded, as the twin does them.
std::vector<float> ruled_logits(const Case& c) {
  std::vector<float> x = c.logits;
  const auto valid = [&](int32_t t) { return t >= 0 && static_cast<size_t>(t) < x.size(); };
  std::vector<int> in_output(x.size(), 0), anywhere(x.size(), 0);
  for (const int32_t t : c.output) {
    if (valid(t)) ++in_output[static_cast<size_t>(t)], ++anywhere[static_cast<size_t>(t)];
  }
  for (const int32_t t : c.prompt) {
    if (valid(t)) ++anywhere[static_cast<size_t>(t)];
  }
  for (const int32_t t : c.banned) {
    if (valid(t)) x[static_cast<size_t>(t)] = -kInf;
  }
  for (const LogitBias& b : c.bias) {
    if (valid(b.token)) x[static_cast<size_t>(b.token)] += b.bias;
  }
  const SamplingRow& row = c.row;
  for (size_t i = 0; i < x.size(); ++i) {
    if (anywhere[i] > 0 && row.repetition_penalty != 1.f) {
      x[i] = x[i] > 0.f ? x[i] / row.repetition_penalty : x[i] * row.repetition_penalty;
    }
    if (in_output[i] > 0) {
      const float counted = row.frequency_penalty * static_cast<float>(in_output[i]);
      x[i] = x[i] - row.presence_penalty - counted;
    }
  }
  return x;
}

// The distribution drawn from, as float64: tokens in order of probability, with cumulative sums.
class Distribution {
 public:
  explicit Distribution(const Case& c) : logits_(ruled_logits(c)), row_(c.row) {
    const size_t n = logits_.size();
    const float max = *std::max_element(logits_.begin(), logits_.end());
    const float floor =
        row_.min_p > 0.f ? std::min(max, max + row_.temperature * std::log(row_.min_p)) : -kInf;
    weights_.resize(n, 0);
    for (size_t i = 0; i < n; ++i) {
      if (logits_[i] < floor || logits_[i] == -kInf) continue;
      order_.push_back(i);
      weights_[i] = std::exp((double{logits_[i]} - double{max}) / double{row_.temperature});
    }
    std::stable_sort(order_.begin(), order_.end(),
                     [&](size_t a, size_t b) { return logits_[a] > logits_[b]; });
    if (row_.top_k > 0 && static_cast<size_t>(row_.top_k) < order_.size()) {
      order_.resize(static_cast<size_t>(row_.top_k));
    }
  }

  // Whether a correct sampler may give `token`.
  bool allows(int32_t token) const {
    const double uniform = sampling_uniform(row_.seed, row_.choice, row_.output_position);
    std::vector<double> sums;  // of the first tokens in order
    double sum = 0;
    for (const size_t i : order_) sums.push_back(sum += weights_[i]);
    size_t least = order_.size(), most = order_.size();
    if (row_.top_p < 1.f) {
      const double mass = double{row_.top_p} * sum;
      const auto first_at = [&](double aim) {
        const auto at = std::lower_bound(sums.begin(), sums.end(), aim) - sums.begin();
        return std::min(static_cast<size_t>(at) + 1, order_.size());
      };
      least = first_at(mass - kBorder * sum);
      most = first_at(mass + kBorder * sum);
    }
    for (size_t kept = least; kept <= most; ++kept) {
      double before = 0;
      bool is_kept = false;
      for (size_t i = 0; i < kept; ++i) {
        if (static_cast<int32_t>(order_[i]) < token) before += weights_[order_[i]];
        is_kept |= static_cast<int32_t>(order_[i]) == token;
      }
      if (!is_kept) continue;
      const double total = sums[kept - 1];
      const double after = before + weights_[static_cast<size_t>(token)];
      if (uniform > before / total - kBorder && uniform < after / total + kBorder) return true;
    }
    return false;
  }

  // By id, normalised; 0 for what is cut.
  std::vector<double> probabilities() const {
    double total = 0, sum = 0;
    for (const size_t i : order_) total += weights_[i];
    std::vector<double> p(logits_.size(), 0);
    double kept = 0;
    for (const size_t i : order_) {
      if (row_.top_p < 1.f && sum >= double{row_.top_p} * total) break;
      sum += weights_[i];
      kept += p[i] = weights_[i];
    }
    for (double& value : p) value /= kept;
    return p;
  }

 private:
  std::vector<float> logits_;
  SamplingRow row_;
  std::vector<size_t> order_;
  std::vector<double> weights_;
};

enum class Shape { kFlat, kTies, kPeaked };

std::vector<float> random_logits(int vocab, uint64_t seed, Shape shape) {
  std::vector<float> logits = test::random_floats(static_cast<size_t>(vocab), seed, -8, 8);
  std::mt19937_64 random(seed);
  switch (shape) {
    case Shape::kFlat:
      break;
    case Shape::kTies:
      for (float& logit : logits) logit = std::round(logit);
      break;
    case Shape::kPeaked:  // as a language model's: a few tokens stand out
      for (float& logit : logits) logit *= 0.6f;
      for (int i = 0; i < 60; ++i) {
        logits[random() % logits.size()] = 20.f - 0.35f * static_cast<float>(i);
      }
      break;
  }
  return logits;
}

Case random_case(int vocab, uint64_t seed) {
  std::mt19937_64 random(seed);
  const auto one_of = [&](std::initializer_list<float> values) {
    return *(values.begin() + random() % values.size());
  };
  Case c;
  c.logits = random_logits(vocab, random(), static_cast<Shape>(random() % 3));
  SamplingRow& row = c.row;
  row.temperature = one_of({0.f, 0.3f, 0.6f, 1.f, 1.f, 1.7f});
  row.top_p = one_of({1.f, 1.f, 0.95f, 0.8f, 0.3f, 0.01f, 0.999f});
  row.min_p = one_of({0.f, 0.f, 0.f, 0.05f, 0.4f});
  row.top_k = static_cast<int32_t>(one_of({0, 0, 1, 2, 20, 20, 50, 128, 129, 1000, 5000, 1e6}));
  row.repetition_penalty = one_of({1.f, 1.f, 1.3f, 0.7f});
  row.presence_penalty = one_of({0.f, 0.f, 0.9f, -0.4f});
  row.frequency_penalty = one_of({0.f, 0.f, 0.6f, 0.01f});
  row.seed = random();
  row.choice = static_cast<uint32_t>(random() % 4);
  row.output_position = static_cast<uint32_t>(random() % 1000);
  row.num_logprobs = static_cast<int32_t>(one_of({-1, -1, 0, 1, 5, 20}));
  c.prompt = test::random_tokens(random() % 700, vocab, random());
  c.output = test::random_tokens(random() % 700, vocab, random());
  for (size_t i = 1; i < c.output.size(); ++i) {
    if (random() % 4 == 0) c.output[i] = c.output[i / 2];  // some tokens often
  }
  const auto token = [&] { return static_cast<int32_t>(random() % static_cast<uint64_t>(vocab)); };
  if (random() % 2 == 0) c.banned = {token(), -1, vocab, token()};
  if (random() % 2 == 0) {
    c.bias = {{token(), 3.5f}, {token(), -100.f}, {vocab + 5, 9.f}, {-7, 9.f}, {token(), 2.f}};
    c.bias.push_back({c.bias[0].token, 0.25f});  // twice the same token
  }
  return c;
}

class SamplingCudaTest : public test::CudaTest {
 protected:
  static StepLimits limits(int rows, int vocab, int max_model_len = 2048) {
    StepLimits limits;
    limits.max_logit_rows = rows;
    limits.vocab = vocab;
    limits.max_model_len = max_model_len;
    return limits;
  }

  static std::vector<SamplingRow> rows_of(std::vector<Case>& cases) {
    std::vector<SamplingRow> rows;
    for (Case& c : cases) rows.push_back(c.view());
    return rows;
  }

  // Rows of logits beyond the cases' are NaN: they only fill the launch up.
  static std::unique_ptr<DeviceArray<float>> upload(const std::vector<Case>& cases, int vocab,
                                                    size_t launch_rows) {
    std::vector<float> all(launch_rows * static_cast<size_t>(vocab), kNaN);
    for (size_t i = 0; i < cases.size(); ++i) {
      std::copy(cases[i].logits.begin(), cases[i].logits.end(),
                all.begin() + static_cast<int64_t>(i * static_cast<size_t>(vocab)));
    }
    return std::make_unique<DeviceArray<float>>(all);
  }

  std::vector<SampledToken> sample(std::vector<Case>& cases, int vocab, size_t fillers = 0) {
    const size_t launch_rows = cases.size() + fillers;
    const auto logits = upload(cases, vocab, launch_rows);
    cuda::Sampler sampler(limits(static_cast<int>(cases.size()), vocab));
    return sample(sampler, cases, *logits, vocab);
  }

  std::vector<SampledToken> sample(cuda::Sampler& sampler, std::vector<Case>& cases,
                                   const DeviceArray<float>& logits, int vocab) {
    const auto rows = rows_of(cases);
    sampler.stage(stream_, rows);
    sampler.run(stream_, Tensor::of(logits.data(),
                                    {static_cast<int64_t>(logits.size()) / vocab, int64_t{vocab}}));
    wait();
    std::vector<SampledToken> tokens(cases.size());
    sampler.collect(tokens);
    return tokens;
  }

  SampledToken sample_one(Case c) {
    std::vector<Case> cases;
    const auto vocab = static_cast<int>(c.logits.size());
    cases.push_back(std::move(c));
    return sample(cases, vocab)[0];
  }

  void expect_twin(Case& c, const SampledToken& got, const std::string& what) {
    std::vector<float> scratch = c.logits;
    const SampledToken twin = sample_row(scratch, c.view());
    const SamplingRow& row = c.row;
    const std::string where =
        what + ": T " + std::to_string(row.temperature) + " top_k " + std::to_string(row.top_k) +
        " top_p " + std::to_string(row.top_p) + " min_p " + std::to_string(row.min_p) + " rep " +
        std::to_string(row.repetition_penalty) + " pres " + std::to_string(row.presence_penalty) +
        " freq " + std::to_string(row.frequency_penalty) + " logprobs " +
        std::to_string(row.num_logprobs);
    ASSERT_EQ(got.non_finite, twin.non_finite) << where;
    ASSERT_EQ(got.top_logprobs.size(), twin.top_logprobs.size()) << where;
    if (twin.non_finite) {
      EXPECT_EQ(got.token, -1) << where;
      return;
    }
    const bool greedy = row.temperature < 1e-5f || row.top_k == 1 || row.top_p <= 0.f;
    ++compared_;
    if (greedy) {
      ASSERT_EQ(got.token, twin.token) << where;
    } else if (got.token != twin.token) {
      ++at_borders_;
      ASSERT_GE(got.token, 0) << where;
      ASSERT_LT(got.token, static_cast<int32_t>(c.logits.size())) << where;
      ASSERT_TRUE(Distribution(c).allows(got.token))
          << where << ": " << got.token << " instead of " << twin.token;
    }
    for (size_t i = 0; i < twin.top_logprobs.size(); ++i) {
      ASSERT_EQ(got.top_logprobs[i].token, twin.top_logprobs[i].token) << where << " place " << i;
      ASSERT_NEAR(got.top_logprobs[i].logprob, twin.top_logprobs[i].logprob, 1e-4) << where;
    }
    if (row.num_logprobs >= 0) {
      const float max = *std::max_element(c.logits.begin(), c.logits.end());
      double total = 0;
      for (const float logit : c.logits) total += std::exp(double{logit} - double{max});
      const double expected =
          double{c.logits[static_cast<size_t>(got.token)]} - double{max} - std::log(total);
      ASSERT_NEAR(got.logprob, expected, 1e-4) << where;
    }
  }

  void expect_twins(std::vector<Case>& cases, const std::vector<SampledToken>& tokens,
                    const std::string& what) {
    for (size_t i = 0; i < cases.size(); ++i) {
      expect_twin(cases[i], tokens[i], what + " row " + std::to_string(i));
      if (HasFatalFailure()) return;
    }
  }

  void expect_random_cases_follow_the_twin(int vocab, size_t num_cases, uint64_t seed) {
    std::vector<Case> cases;
    for (size_t i = 0; i < num_cases; ++i) cases.push_back(random_case(vocab, seed + i));
    expect_twins(cases, sample(cases, vocab, 3), "vocab " + std::to_string(vocab));
  }

  int compared_ = 0, at_borders_ = 0;
};

TEST_F(SamplingCudaTest, SmallVocabulariesFollowTheTwin) {
  for (const int vocab : {1, 2, 3, 7, 129, 1000, 1024}) {
    expect_random_cases_follow_the_twin(vocab, 60, 1000 + static_cast<uint64_t>(vocab));
  }
  EXPECT_GT(compared_, 300);
  EXPECT_LE(at_borders_, compared_ / 100);  // probabilities are far wider than 1e-5
}

TEST_F(SamplingCudaTest, MiddleVocabulariesFollowTheTwin) {
  for (const int vocab : {6144, 6145, 32003}) {
    expect_random_cases_follow_the_twin(vocab, 150, 2000 + static_cast<uint64_t>(vocab));
  }
  EXPECT_LE(at_borders_, compared_ / 20);
}

TEST_F(SamplingCudaTest, TheVocabularyOfQwen3FollowsTheTwin) {
  for (const uint64_t seed : {3000u, 4000u, 5000u}) {
    expect_random_cases_follow_the_twin(151'936, 128, seed);
  }
  // Flat rows give a token about 1e-5, so rounding of the sums may choose its neighbour.
  EXPECT_LE(at_borders_, compared_ / 5);
  RecordProperty("compared", compared_);
  RecordProperty("at_borders", at_borders_);
}

TEST_F(SamplingCudaTest, AnyNumberOfRows) {
  constexpr int kVocab = 6144;
  for (const size_t rows : {size_t{0}, size_t{1}, size_t{127}, size_t{128}, size_t{129}}) {
    for (const size_t fillers : {size_t{0}, size_t{5}}) {
      std::vector<Case> cases;
      for (size_t i = 0; i < rows; ++i) cases.push_back(random_case(kVocab, 7000 + i));
      expect_twins(cases, sample(cases, kVocab, fillers), std::to_string(rows) + " rows");
    }
  }
}

TEST_F(SamplingCudaTest, ARowDependsOnNoOtherRow) {
  constexpr int kVocab = 20'000;
  for (uint64_t seed = 0; seed < 12; ++seed) {
    const Case subject = random_case(kVocab, 8000 + seed);
    const SampledToken alone = sample_one(subject);
    for (const size_t batch : {size_t{2}, size_t{37}}) {
      for (const size_t at : {size_t{0}, batch / 2, batch - 1}) {
        std::vector<Case> cases;
        for (size_t i = 0; i < batch; ++i) {
          cases.push_back(i == at ? subject : random_case(kVocab, 9000 + 100 * seed + i));
        }
        const SampledToken among = sample(cases, kVocab)[at];
        EXPECT_EQ(among.token, alone.token);
        EXPECT_EQ(among.logprob, alone.logprob);
        EXPECT_EQ(among.non_finite, alone.non_finite);
        ASSERT_EQ(among.top_logprobs.size(), alone.top_logprobs.size());
        for (size_t i = 0; i < alone.top_logprobs.size(); ++i) {
          EXPECT_EQ(among.top_logprobs[i].token, alone.top_logprobs[i].token);
          EXPECT_EQ(among.top_logprobs[i].logprob, alone.top_logprobs[i].logprob);
        }
      }
    }
  }
}

TEST_F(SamplingCudaTest, EdgesOfTheParameters) {
  for (const int vocab : {7, 1000, 6144}) {
    for (uint64_t seed = 0; seed < 6; ++seed) {
      std::vector<Case> cases;
      const auto add = [&](auto change) {
        Case c;
        c.logits = random_logits(vocab, 100 + seed, static_cast<Shape>(seed % 3));
        c.row.seed = seed;
        change(c);
        cases.push_back(std::move(c));
      };
      add([](Case& c) { c.row.temperature = 0.f; });
      add([](Case& c) { c.row.temperature = 1e-6f; });
      add([](Case& c) { c.row.temperature = 1e-4f; });
      add([](Case& c) { c.row.temperature = 1e-4f, c.row.top_p = 0.9f; });
      add([](Case& c) { c.row.temperature = 1e-4f, c.row.top_k = 300; });
      add([](Case& c) { c.row.temperature = 2.f; });
      add([](Case& c) { c.row.temperature = 1e10f; });
      add([](Case& c) { c.row.temperature = 1e10f, c.row.top_p = 0.5f; });
      add([](Case& c) { c.row.top_p = 0.f; });
      add([](Case& c) { c.row.top_p = 1e-7f; });
      add([](Case& c) { c.row.top_p = 0.99999994f; });
      add([](Case& c) { c.row.top_p = 0.99999994f, c.row.top_k = 4; });
      add([](Case& c) { c.row.top_k = 1; });
      add([&](Case& c) { c.row.top_k = vocab; });
      add([&](Case& c) { c.row.top_k = vocab - 1; });
      add([](Case& c) { c.row.min_p = 1.f; });
      add([](Case& c) { c.row.min_p = 1.f, c.row.top_k = 3, c.row.top_p = 0.5f; });
      add([](Case& c) { c.row.min_p = 1e-30f; });
      add([&](Case& c) { c.bias = {{vocab / 2, 100.f}}; });
      add([&](Case& c) { c.bias = {{vocab / 2, 1e30f}}, c.row.num_logprobs = 2; });
      add([&](Case& c) { c.bias = {{vocab - 1, -1e30f}, {0, -1e30f}}; });
      add([&](Case& c) {  // all banned but one
        for (int32_t t = 0; t < vocab; ++t) {
          if (t != vocab / 3) c.banned.push_back(t);
        }
        c.row.top_p = 0.9f;
        c.row.num_logprobs = 3;
      });
      add([&](Case& c) {  // all banned
        for (int32_t t = 0; t < vocab; ++t) c.banned.push_back(t);
        c.row.num_logprobs = 3;
      });
      add([](Case& c) {  // a token a thousand times
        c.output.assign(1000, 3);
        c.row.frequency_penalty = 0.013f, c.row.presence_penalty = 0.5f;
      });
      add([](Case& c) {  // the same, and so that it rises
        c.output.assign(70'000, 3);
        c.row.frequency_penalty = -0.001f;
      });
      add([&](Case& c) {  // every token, so that a block has more than one window of counts
        for (int32_t t = 0; t < 2 * vocab; ++t) c.output.push_back(t * 7 % vocab);
        c.row.frequency_penalty = 0.5f, c.row.repetition_penalty = 1.2f;
      });
      add([&](Case& c) { std::fill(c.logits.begin(), c.logits.end(), 1.f), c.row.top_k = 3; });
      add([&](Case& c) {
        std::fill(c.logits.begin(), c.logits.end(), 1.f), c.row.num_logprobs = 20;
      });
      add([&](Case& c) { std::fill(c.logits.begin(), c.logits.end(), -3.f), c.row.top_p = 0.5f; });
      add([&](Case& c) {  // +0 and -0 are a tie
        std::fill(c.logits.begin(), c.logits.end(), -1.f);
        c.logits[2] = 0.f, c.logits[1] = -0.f, c.row.temperature = 0.f, c.row.num_logprobs = 2;
      });
      add([&](Case& c) {
        std::fill(c.logits.begin(), c.logits.end(), -kInf);
        c.logits[5] = -3.f, c.row.top_k = 6, c.row.num_logprobs = 5;
      });
      add([&](Case& c) {
        std::fill(c.logits.begin(), c.logits.end(), -kInf);
        c.logits[5] = -3.f, c.row.top_p = 0.9f;
      });
      add([&](Case& c) { c.logits[0] = 3e38f, c.logits[1] = -3e38f, c.row.top_p = 0.9f; });
      expect_twins(cases, sample(cases, vocab, 1),
                   "vocab " + std::to_string(vocab) + " seed " + std::to_string(seed));
      if (HasFatalFailure()) return;
    }
  }
}

TEST_F(SamplingCudaTest, RowsThatAreNotFiniteFail) {
  for (const int vocab : {7, 1000, 6144}) {
    std::vector<Case> cases;
    for (const float temperature : {0.f, 1.f}) {
      for (const int num_logprobs : {-1, 0, 2}) {
        for (const float value : {kNaN, kInf, -kInf}) {
          for (const bool banned : {false, true}) {
            Case c;
            c.logits = random_logits(vocab, 5, Shape::kFlat);
            if (value == -kInf) {
              std::fill(c.logits.begin(), c.logits.end(), -kInf);
            } else {
              c.logits.back() = value;
            }
            if (banned) c.banned = {vocab - 1};  // then only logprobs, of the raw row, see it
            c.row.temperature = temperature;
            c.row.num_logprobs = num_logprobs;
            cases.push_back(std::move(c));
          }
        }
      }
    }
    const auto tokens = sample(cases, vocab);
    expect_twins(cases, tokens, "vocab " + std::to_string(vocab));
    EXPECT_TRUE(tokens[0].non_finite);
    EXPECT_FALSE(tokens[1].non_finite);
  }
}

TEST_F(SamplingCudaTest, ListsMayOutgrowTheirBuffer) {
  constexpr int kVocab = 6144;
  std::vector<Case> cases;
  for (uint64_t i = 0; i < 5; ++i) {
    Case c = random_case(kVocab, 600 + i);
    c.prompt = test::random_tokens(3000, kVocab, i);
    c.output = test::random_tokens(5000, kVocab, 50 + i);
    c.row.repetition_penalty = 1.1f;
    c.row.frequency_penalty = 0.2f;
    cases.push_back(std::move(c));
  }
  cuda::Sampler sampler(limits(8, kVocab, 16));
  const auto logits = upload(cases, kVocab, 8);
  for (int step = 0; step < 3; ++step) {
    for (Case& c : cases) ++c.row.output_position;
    expect_twins(cases, sample(sampler, cases, *logits, kVocab), "step " + std::to_string(step));
  }
}

TEST_F(SamplingCudaTest, IsRecordedOnceAndReplayedForOtherParameters) {
  constexpr int kVocab = 6144;
  constexpr size_t kRows = 16;
  cuda::Sampler sampler(limits(kRows, kVocab));
  DeviceArray<float> logits(kRows * kVocab);
  cudaGraph_t graph = nullptr;
  cudaGraphExec_t executable = nullptr;
  CUDA_CHECK(cudaStreamBeginCapture(stream_, cudaStreamCaptureModeThreadLocal));
  sampler.run(stream_, Tensor::of(logits.data(), {int64_t{kRows}, int64_t{kVocab}}));
  CUDA_CHECK(cudaStreamEndCapture(stream_, &graph));
  CUDA_CHECK(cudaGraphInstantiate(&executable, graph, 0));
  for (const size_t rows : {kRows, size_t{1}, size_t{9}, size_t{0}, kRows}) {
    std::vector<Case> cases;
    for (size_t i = 0; i < rows; ++i) cases.push_back(random_case(kVocab, 700 + 20 * rows + i));
    std::vector<float> all(kRows * kVocab, kNaN);
    for (size_t i = 0; i < rows; ++i) {
      std::copy(cases[i].logits.begin(), cases[i].logits.end(),
                all.begin() + static_cast<int64_t>(i * kVocab));
    }
    CUDA_CHECK(cudaMemcpy(logits.data(), all.data(), logits.bytes(), cudaMemcpyHostToDevice));
    const auto views = rows_of(cases);
    sampler.stage(stream_, views);
    CUDA_CHECK(cudaGraphLaunch(executable, stream_));
    wait();
    std::vector<SampledToken> tokens(rows);
    sampler.collect(tokens);
    expect_twins(cases, tokens, std::to_string(rows) + " rows replayed");
  }
  CUDA_CHECK(cudaGraphExecDestroy(executable));
  CUDA_CHECK(cudaGraphDestroy(graph));
}

TEST_F(SamplingCudaTest, FrequenciesFollowTheDistribution) {
  constexpr int kVocab = 40, kBatch = 128, kLaunches = 320;
  Case plain;
  plain.logits = random_logits(kVocab, 2, Shape::kFlat);
  plain.row.temperature = 2.f;
  Case cut = plain, nucleus = plain, penalised = plain;
  cut.row.top_k = 12;
  cut.row.top_p = 0.9f;
  nucleus.row.top_p = 0.8f;
  nucleus.row.min_p = 0.02f;
  penalised.output = {1, 1, 2, 3, 5, 5, 5, 8};
  penalised.row.frequency_penalty = 0.7f;
  penalised.row.presence_penalty = 0.3f;
  for (const Case& base : {plain, cut, nucleus, penalised}) {
    const std::vector<double> p = Distribution(base).probabilities();
    std::vector<int> counts(p.size(), 0);
    std::vector<Case> cases(kBatch, base);
    const auto logits = upload(cases, kVocab, kBatch);
    cuda::Sampler sampler(limits(kBatch, kVocab));
    for (int launch = 0; launch < kLaunches; ++launch) {
      for (size_t i = 0; i < cases.size(); ++i) {
        cases[i].row.seed = static_cast<uint64_t>(launch);
        cases[i].row.output_position = static_cast<uint32_t>(i);
      }
      for (const SampledToken& token : sample(sampler, cases, *logits, kVocab)) {
        ASSERT_GE(token.token, 0);
        ASSERT_LT(token.token, kVocab);
        ++counts[static_cast<size_t>(token.token)];
      }
    }
    double chi_square = 0;
    int cells = 0;
    for (size_t i = 0; i < p.size(); ++i) {
      if (p[i] == 0) {
        ASSERT_EQ(counts[i], 0) << "token " << i << " was cut";
        continue;
      }
      const double expected = p[i] * kBatch * kLaunches;
      if (expected < 5) continue;
      chi_square += std::pow(counts[i] - expected, 2) / expected;
      ++cells;
    }
    ASSERT_GT(cells, 4);
    // Mean `cells`, deviation sqrt(2 cells): five deviations, and the seeds are fixed.
    EXPECT_LT(chi_square, cells + 5 * std::sqrt(2.0 * cells)) << cells << " cells";
  }
}

}  // namespace
}  // namespace kvarn
