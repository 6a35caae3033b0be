// An EngineCore on a fake runner, step by step: what the engine does, without its thread.
#pragma once

#include <gtest/gtest.h>

#include <memory>
#include <utility>
#include <vector>

#include "engine/engine_core.h"
#include "tests/support/fake_model_runner.h"
#include "tests/support/recording_sink.h"

namespace kvarn::test {

inline std::vector<int32_t> make_prompt(int length, int seed = 1, int vocab_size = 1000) {
  std::vector<int32_t> prompt(static_cast<size_t>(length));
  uint64_t x = static_cast<uint64_t>(seed) * 7919 + 1;
  for (int32_t& id : prompt) {
    x = x * 6364136223846793005u + 1442695040888963407u;
    id = static_cast<int32_t>((x >> 33) % static_cast<uint64_t>(vocab_size));
  }
  return prompt;
}

class CoreDriver {
 public:
  struct Handle {
    RequestId id;
    std::shared_ptr<RecordingSink> sink;
    std::vector<int32_t> prompt;
    uint64_t seed;
  };

  explicit CoreDriver(FakeRunnerOptions options = {}, EngineConfig config = {},
                      EngineObserver* observer = nullptr) {
    auto runner = std::make_unique<FakeModelRunner>(std::move(options));
    runner_ = runner.get();
    auto core = EngineCore::create(config, std::move(runner), observer);
    EXPECT_TRUE(core.is_ok()) << core.status().message();
    core_ = std::move(core).value();
  }
  ~CoreDriver() { expect_no_violations(); }

  EngineRequest request(std::vector<int32_t> prompt, int max_tokens, int n = 1) {
    EngineRequest r;
    r.id = ++last_id_;
    r.prompt = std::move(prompt);
    r.n = n;
    r.stop.max_tokens = max_tokens;
    r.sampling.seed = r.id;
    r.sampling.num_logprobs = 0;
    return r;
  }
  Handle add(EngineRequest r) {
    const auto sink = std::make_shared<RecordingSink>(r.n);
    r.sink = sink;
    const Handle handle{r.id, sink, r.prompt, r.sampling.seed};
    const Status status = core_->check(r);
    EXPECT_TRUE(status.is_ok()) << status.message();
    core_->add(std::move(r));
    return handle;
  }
  Handle add(std::vector<int32_t> prompt, int max_tokens, int n = 1) {
    return add(request(std::move(prompt), max_tokens, n));
  }

  bool step() {
    const bool ran = core_->run_step();
    EXPECT_EQ(core_->blocks().audit(/*idle=*/false), 0);
    expect_no_violations();
    return ran;
  }
  // Steps until nothing is left to run; the pages must be all accounted for then.
  void run_all(int max_steps = 100000) {
    for (int i = 0; step(); ++i) ASSERT_LT(i, max_steps) << "the schedule does not end";
    EXPECT_TRUE(core_->scheduler().idle());
    EXPECT_EQ(core_->blocks().audit(/*idle=*/true), 0);
  }
  // The tokens are those of the prompt's true prefix: every page that was read was the right one.
  void expect_true_tokens(const Handle& handle, size_t count, uint32_t choice = 0) const {
    std::vector<int32_t> tokens = handle.prompt;
    for (size_t i = 0; i < count; ++i) {
      tokens.push_back(fake_next_token(tokens, handle.seed, choice, runner_->vocab_size()));
    }
    tokens.erase(tokens.begin(),
                 tokens.begin() + static_cast<std::ptrdiff_t>(handle.prompt.size()));
    EXPECT_EQ(handle.sink->tokens(static_cast<int32_t>(choice)), tokens);
  }
  const Sequence* sequence(RequestId id, int32_t choice = 0) const {
    for (const Sequence* s : core_->scheduler().running()) {
      if (s->request->request.id == id && s->choice == choice) return s;
    }
    return nullptr;
  }
  void expect_no_violations() const {
    for (const std::string& what : runner_->violations()) ADD_FAILURE() << what;
  }

  EngineCore& core() { return *core_; }
  Scheduler& scheduler() { return core_->scheduler(); }
  FakeModelRunner& runner() { return *runner_; }
  const BlockStats& pages() const { return core_->blocks().stats(); }

 private:
  FakeModelRunner* runner_ = nullptr;  // owned by core_
  std::unique_ptr<EngineCore> core_;
  RequestId last_id_ = 0;
};

}  // namespace kvarn::test
