// Prompts through a whole engine on a given backend, greedy, and how two such runs agree. Runs on
// different devices (or batches of one GPU) sum in different orders, so that a token may differ
// where the two best are nearly tied; from there on the texts have nothing in common.
#pragma once

#include <gtest/gtest.h>

#include <filesystem>
#include <functional>
#include <map>
#include <memory>
#include <utility>
#include <vector>

#include "engine/engine_core.h"
#include "models/model.h"

namespace kvarn::test {

struct GreedyToken {
  int32_t token;
  float logprob;
  float gap;  // to the second best, in log-probability
};
using GreedyTexts = std::vector<std::vector<GreedyToken>>;

class GreedySink : public EventSink {
 public:
  void on_event(RequestId, EngineEvent event) override {
    if (const auto* const token = std::get_if<TokenEvent>(&event)) {
      const SampledToken& s = token->sampled;
      ASSERT_EQ(s.top_logprobs.size(), 2u);
      text.push_back({s.token, s.logprob, s.top_logprobs[0].logprob - s.top_logprobs[1].logprob});
    } else if (const auto* const failed = std::get_if<ErrorEvent>(&event)) {
      error = failed->status;
    }
  }
  std::vector<GreedyToken> text;
  Status error;
};

struct EngineRun {
  GreedyTexts texts;
  EngineStats stats;
};

// `between_steps` may preempt and change budgets.
inline EngineRun run_greedy(const EngineConfig& config, std::unique_ptr<Backend> backend,
                            const std::filesystem::path& directory,
                            const std::vector<std::vector<int32_t>>& prompts, int max_tokens,
                            const std::function<void(EngineCore&)>& between_steps = {}) {
  auto model = load_model({.path = directory,
                           .format = LoadFormat::kAuto,
                           .shape = {},
                           .max_model_len = config.max_model_len},
                          *backend);
  EXPECT_TRUE(model.is_ok()) << model.status().message();
  auto runner = make_model_runner(config, std::move(backend), std::move(model).value(), nullptr);
  EXPECT_TRUE(runner.is_ok()) << runner.status().message();
  auto core = EngineCore::create(config, std::move(runner).value(), nullptr).value();
  std::vector<std::shared_ptr<GreedySink>> sinks;
  for (const std::vector<int32_t>& prompt : prompts) {
    EngineRequest request;
    request.id = sinks.size() + 1;
    request.prompt = prompt;
    request.stop.max_tokens = max_tokens;
    request.sampling.temperature = 0;
    request.sampling.num_logprobs = 2;
    request.sink = sinks.emplace_back(std::make_shared<GreedySink>());
    const Status status = core->check(request);
    EXPECT_TRUE(status.is_ok()) << status.message();
    core->add(std::move(request));
  }
  while (core->run_step()) {
    if (between_steps) between_steps(*core);
  }
  EXPECT_EQ(core->blocks().audit(/*idle=*/true), 0);
  EngineRun run;
  run.stats = core->stats();
  for (const auto& sink : sinks) {
    EXPECT_TRUE(sink->error.is_ok()) << sink->error.message();
    EXPECT_EQ(sink->text.size(), static_cast<size_t>(max_tokens));
    run.texts.push_back(sink->text);
  }
  return run;
}

struct Agreement {
  int compared = 0, agreed = 0;  // tokens up to each text's first near-tie or difference
  int near_ties = 0, differences = 0;
  double mean_logprob_difference = 0;  // of the tokens agreed on

  double share() const { return compared == 0 ? 0.0 : static_cast<double>(agreed) / compared; }
};

inline Agreement compare_texts(const GreedyTexts& reference, const GreedyTexts& other,
                               float near_tie = 1e-2f) {
  Agreement result;
  double sum = 0;
  for (size_t i = 0; i < reference.size(); ++i) {
    for (size_t at = 0; at < std::min(reference[i].size(), other[i].size()); ++at) {
      const GreedyToken &a = reference[i][at], &b = other[i][at];
      if (a.gap < near_tie) {
        ++result.near_ties;
        if (a.token != b.token) break;  // as may be; where they agree the texts go on together
        continue;
      }
      ++result.compared;
      if (a.token != b.token) {
        ++result.differences;
        break;
      }
      ++result.agreed;
      sum += std::abs(double{a.logprob} - double{b.logprob});
    }
  }
  result.mean_logprob_difference = sum / std::max(result.agreed, 1);
  return result;
}

inline std::ostream& operator<<(std::ostream& out, const Agreement& a) {
  return out << a.agreed << " of " << a.compared << " tokens agree, " << a.near_ties
             << " near-ties, " << a.differences << " differences, mean |log p| difference "
             << a.mean_logprob_difference;
}

}  // namespace kvarn::test
