// A ModelRunner without a model. It keeps what every page holds as symbols: each stored row is the
// hash of the token prefix up to it, each coded page the prefix hashes at both ends of its block.
// Every step is checked as the real kernels would read it, so a plan that reads a freed, stale or
// half-written page, or reads coded what is exact, is a recorded violation and a failed test.
//
// The next token is a function of the prefix hash as read from the pages (and of seed and choice
// where the row samples), so a test can tell from the tokens alone that the right prefix was read.
#pragma once

#include <atomic>
#include <chrono>
#include <cstdint>
#include <functional>
#include <mutex>
#include <span>
#include <string>
#include <vector>

#include "engine/model_runner.h"

namespace kvarn::test {

struct FakeRunnerOptions {
  KvFormat format = KvFormat::kKvarnK4V2;
  int64_t num_pages = 1000;
  int model_max_len = 16384;
  int vocab_size = 1000;
  std::chrono::milliseconds step_time{0};  // above 0: steps run on a thread of their own
  // Called before each step, on the thread that runs it; may throw, sleep or wait.
  std::function<void(int64_t step, const StepBatch& batch)> before_step = {};
  // Replaces the default rule for the next token.
  std::function<int32_t(uint64_t prefix_hash, const SamplingRow& row)> next_token = {};
};

uint64_t fake_prefix_hash(std::span<const int32_t> tokens);
// What the default rule answers after `tokens` (prompt and output so far).
int32_t fake_next_token(std::span<const int32_t> tokens, uint64_t seed, uint32_t choice,
                        int vocab_size);

class FakeModelRunner : public ModelRunner {
 public:
  explicit FakeModelRunner(FakeRunnerOptions options = {});

  int64_t num_pages() const override { return options_.num_pages; }
  KvLayout kv_layout() const override { return layout_; }
  int model_max_len() const override { return options_.model_max_len; }
  int vocab_size() const override { return options_.vocab_size; }
  std::future<StepResult> run(const StepBatch& batch) override;
  std::chrono::steady_clock::time_point last_progress() const override { return progress_.load(); }

  // Of all steps so far; call while no step runs.
  const std::vector<std::string>& violations() const { return violations_; }
  int64_t steps() const { return steps_; }
  int64_t rows() const { return rows_; }
  int64_t coded_reads() const { return coded_reads_; }
  int64_t encode_only_steps() const { return encode_only_steps_; }
  int max_rows() const { return max_rows_; }

 private:
  struct StoredRow {
    uint64_t before = 0, hash = 0;  // of the prefix without and with this row's token
    int32_t position = -1;          // -1: nothing
  };
  struct Page {
    bool coded = false;
    std::vector<StoredRow> rows;    // exact
    uint64_t before = 0, hash = 0;  // coded: of the prefix before and after the block
    int32_t block = -1;
  };

  StepResult step(const StepBatch& batch);
  void encode_from_pages(const StepBatch& batch);
  void check_shapes(const StepBatch& batch);
  void check_owners(const StepBatch& batch);
  void write_rows(const StepBatch& batch);
  void read_sequence(const StepBatch& batch, size_t index, std::vector<uint64_t>& row_hash);
  // The prefix hash after reading a whole block; reports what is not as it should be.
  uint64_t read_block(const BlockPages& pages, int32_t block, bool coded, int32_t num_rows,
                      uint64_t before, const std::string& who);
  Page* page_at(int32_t id, const std::string& who);
  void violation(const std::string& what);

  FakeRunnerOptions options_;
  KvLayout layout_;
  std::vector<Page> pages_;
  std::vector<std::string> violations_;
  std::atomic<std::chrono::steady_clock::time_point> progress_;
  int64_t steps_ = 0, rows_ = 0, coded_reads_ = 0, encode_only_steps_ = 0;
  int max_rows_ = 0;
};

}  // namespace kvarn::test
