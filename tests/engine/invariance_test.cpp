// The promise of the reading rule, end to end on a tiny model: what a request gets depends on its
// prompt, seed and choice alone. Random workloads run once request by request (one thread, no
// cache, one chunk where it fits), then all together under random budgets, threads, caches, pool
// sizes and forced preemptions; every token and the log-probabilities of the whole vocabulary must
// be the same bits.
#include <gtest/gtest.h>

#include <algorithm>
#include <bit>
#include <cstdlib>
#include <iostream>
#include <map>
#include <random>
#include <set>

#include "engine/engine_core.h"
#include "engine/kv_capacity.h"
#include "kernels/core/log.h"
#include "models/model.h"
#include "tests/support/tiny_model.h"

namespace kvarn {
namespace {

constexpr int kVocab = 64, kLayers = 2, kKvHeads = 2;
constexpr int kMaxBlocks = 12;  // of a prompt, and of an output
constexpr int kMaxLen = 2 * kMaxBlocks * kBlockTokens + 2;
constexpr int kMaxSeqs = 8;
constexpr int kMaxBudget = 1024;

// Sanitizers slow the kernels down twenty times and look for other faults.
#if defined(__SANITIZE_THREAD__) || defined(__SANITIZE_ADDRESS__)
constexpr int kShare = 16;
#else
constexpr int kShare = 1;
#endif
constexpr int kMargin = kShare == 1 ? 1 : 2 * kShare;  // few workloads vary more

// What one choice got: per token one word that stands for the token and every log-probability.
using Trace = std::vector<uint64_t>;

class TraceSink : public EventSink {
 public:
  void on_event(RequestId, EngineEvent event) override {
    if (auto* const token = std::get_if<TokenEvent>(&event)) {
      const SampledToken& sampled = token->sampled;
      uint64_t word = 0x9e3779b97f4a7c15u;
      const auto add = [&](uint64_t x) { word = (word ^ x) * 0x100000001b3u + (word >> 29); };
      add(static_cast<uint64_t>(sampled.token));
      add(std::bit_cast<uint32_t>(sampled.logprob));
      EXPECT_EQ(sampled.top_logprobs.size(), static_cast<size_t>(kVocab));
      for (const TokenLogprob& top : sampled.top_logprobs) {
        add(static_cast<uint64_t>(top.token));
        add(std::bit_cast<uint32_t>(top.logprob));
      }
      traces[token->choice].push_back(word);
      tokens[token->choice].push_back(sampled.token);
    } else if (auto* const error = std::get_if<ErrorEvent>(&event)) {
      ADD_FAILURE() << error->status.message();
    }
  }
  std::map<int32_t, Trace> traces;
  std::map<int32_t, std::vector<int32_t>> tokens;
};

struct Request {
  std::vector<int32_t> prompt;
  int max_tokens = 1;
  int n = 1;
  uint64_t seed = 0;
  std::map<int32_t, Trace> alone;
  std::vector<int32_t> output;  // of choice 0, alone
};

struct Counts {
  int64_t workloads = 0, requests = 0, tokens = 0, several_choices = 0, mismatches = 0;
  int64_t two_threads = 0, cache_off = 0, preempted_runs = 0;
  uint64_t coded_reads = 0, hit_tokens = 0, preemptions = 0, mixed_steps = 0, tiles = 0;
};

class Workload {
 public:
  Workload(uint64_t seed, KvFormat format, std::string rule, const std::filesystem::path& model)
      : random_(seed), format_(format), rule_(std::move(rule)), model_(model) {
    // Mostly the host's best instructions, which users run; a bit of each lesser one.
    if (below(6) == 0) {
      const auto lesser = static_cast<CpuIsa>(below(static_cast<int>(best_cpu_isa()) + 1));
      if (cpu_isa_supported(lesser)) isa_ = lesser;
    }
  }

  void run(int num_requests, int num_variants, Counts& counts) {
    for (int i = 0; i < num_requests; ++i) {
      requests_.push_back(make_request());
      run_alone(requests_.back());
      counts.several_choices += requests_.back().n > 1 ? 1 : 0;
    }
    for (int i = 0; i < num_variants; ++i) run_together(counts);
    ++counts.workloads;
    counts.requests += num_requests;
  }

 private:
  int below(int bound) { return static_cast<int>(random_() % static_cast<uint64_t>(bound)); }

  // On or beside a border, or anywhere; short ones are more frequent.
  int length(int max_blocks) {
    const int blocks = below(3) == 0 ? 1 + below(max_blocks) : 1 + below(std::min(max_blocks, 2));
    const int tokens = kBlockTokens * blocks;
    switch (below(4)) {
      case 0:
        return tokens - 1 + below(3);
      case 1:
        return std::max(1, tokens - 128 + below(3) + 26);  // beside the border of two pages
      default:
        return 1 + below(tokens);
    }
  }

  Request make_request() {
    Request request;
    const auto target = static_cast<size_t>(length(kMaxBlocks));
    if (!requests_.empty() && below(2) == 0) {  // a later turn of a conversation, or its beginning
      const Request& other =
          requests_[static_cast<size_t>(below(static_cast<int>(requests_.size())))];
      request.prompt = other.prompt;
      request.prompt.insert(request.prompt.end(), other.output.begin(), other.output.end());
      if (below(2) == 0) request.prompt.resize(std::min(request.prompt.size(), target));
      request.prompt.resize(std::min<size_t>(request.prompt.size(), kMaxBlocks * kBlockTokens + 1));
    }
    while (request.prompt.size() < target) request.prompt.push_back(below(kVocab));
    request.max_tokens = below(4) == 0 ? length(kMaxBlocks) : length(1);
    request.n = below(4) == 0 ? 2 + below(2) : 1;
    if (request.n > 1) request.max_tokens = std::min(request.max_tokens, 160);
    request.seed = random_();
    return request;
  }

  std::unique_ptr<EngineCore> make_core(int threads, bool cache, int64_t pages) {
    EngineConfig config;
    config.max_num_seqs = kMaxSeqs;
    config.max_num_batched_tokens = kMaxBudget;
    config.kv_cache_dtype = kv_format_name(format_);
    config.enable_prefix_caching = cache;
    config.reading_rule = rule_;
    const KvLayout layout = make_kv_layout(format_, kCodedHeadDim);
    config.kv_memory = std::to_string(pages * layout.page_bytes * kLayers * kKvHeads);
    std::unique_ptr<Backend> backend = make_cpu_backend({.threads = threads, .isa = isa_});
    auto model = load_model({.path = model_, .format = LoadFormat::kAuto, .shape = {}}, *backend);
    EXPECT_TRUE(model.is_ok()) << model.status().message();
    auto runner = make_model_runner(config, std::move(backend), std::move(model).value(), nullptr);
    EXPECT_TRUE(runner.is_ok()) << runner.status().message();
    EXPECT_EQ((*runner)->num_pages(), pages);
    auto core = EngineCore::create(config, std::move(runner).value(), nullptr);
    EXPECT_TRUE(core.is_ok()) << core.status().message();
    return std::move(core).value();
  }

  std::shared_ptr<TraceSink> add(EngineCore& core, const Request& request, RequestId id) {
    EngineRequest r;
    r.id = id;
    r.prompt = request.prompt;
    r.n = request.n;
    r.stop.max_tokens = request.max_tokens;
    r.sampling.seed = request.seed;
    r.sampling.num_logprobs = kVocab;
    const auto sink = std::make_shared<TraceSink>();
    r.sink = sink;
    const Status status = core.check(r);
    EXPECT_TRUE(status.is_ok()) << status.message();
    core.add(std::move(r));
    return sink;
  }

  void run_alone(Request& request) {
    const KvLayout layout = make_kv_layout(format_, kCodedHeadDim);
    const auto core = make_core(1, false, 3 * peak_pages(layout, kMaxLen));
    const auto sink = add(*core, request, 1);
    while (core->run_step()) {
    }
    request.alone = sink->traces;
    request.output = sink->tokens[0];
  }

  void run_together(Counts& counts) {
    const KvLayout layout = make_kv_layout(format_, kCodedHeadDim);
    int64_t longest = 0, all = 0;
    for (const Request& request : requests_) {
      const int64_t pages =
          peak_pages(layout, static_cast<int64_t>(request.prompt.size()) + request.max_tokens);
      longest = std::max(longest, pages);
      all += pages * request.n;
    }
    const int threads = 1 + below(2);
    const bool cache = below(4) != 0;
    // Sometimes so few pages that sequences push each other out.
    const int64_t pages = longest + below(3) * (all - longest) / 2;
    const auto core = make_core(threads, cache, pages);
    const int preempt_every = below(2) == 0 ? 0 : 10 + below(150);
    const bool one_budget = below(3) == 0;
    const auto budget = [&] {
      return kMaxSeqs + kBlockTokens + below(kMaxBudget - kMaxSeqs - kBlockTokens + 1);
    };
    core->scheduler().set_token_budget(budget());

    std::vector<std::shared_ptr<TraceSink>> sinks;
    std::vector<size_t> order(requests_.size());
    for (size_t i = 0; i < order.size(); ++i) order[i] = i;
    std::shuffle(order.begin(), order.end(), random_);
    sinks.resize(order.size());
    size_t next = 0;
    for (;;) {
      while (next < order.size() && (core->scheduler().idle() || below(12) == 0)) {
        sinks[order[next]] = add(*core, requests_[order[next]], next + 1);
        ++next;
      }
      if (!one_budget) core->scheduler().set_token_budget(budget());
      const auto& running = core->scheduler().running();
      if (preempt_every > 0 && !running.empty() && below(preempt_every) == 0) {
        core->scheduler().preempt(
            running[static_cast<size_t>(below(static_cast<int>(running.size())))]->id);
      }
      const bool ran = core->run_step();
      check_pages(*core);
      if (!ran && next == order.size()) break;
    }
    EXPECT_TRUE(core->scheduler().idle());
    EXPECT_EQ(core->blocks().audit(/*idle=*/true), 0);

    for (size_t i = 0; i < requests_.size(); ++i) {
      for (int32_t choice = 0; choice < requests_[i].n; ++choice) {
        const Trace& alone = requests_[i].alone[choice];
        EXPECT_EQ(alone.size(), static_cast<size_t>(requests_[i].max_tokens));
        counts.tokens += static_cast<int64_t>(alone.size());
        if (sinks[i]->traces[choice] != alone) ++counts.mismatches;
      }
    }
    const EngineStats stats = core->stats();
    counts.coded_reads += stats.coded_block_reads;
    counts.hit_tokens += stats.prefix_hits;
    counts.preemptions += stats.preemptions;
    counts.mixed_steps += stats.steps_mixed;
    counts.tiles += stats.tiles_encoded;
    counts.two_threads += threads == 2 ? 1 : 0;
    counts.cache_off += cache ? 0 : 1;
    counts.preempted_runs += stats.preemptions > 0 ? 1 : 0;
  }

  // Each sequence holds the pages that its length says, and no page is lost.
  void check_pages(EngineCore& core) {
    const BlockManager& blocks = core.blocks();
    ASSERT_EQ(blocks.audit(/*idle=*/false), 0);
    std::set<BlockId> held;
    for (const Sequence* s : core.scheduler().running()) {
      int64_t pages = 0;
      for (const BlockId id : s->blocks) pages += blocks.block(id).num_pages;
      const int64_t prefilled = pages_after_prefill(blocks.layout(), s->num_computed);
      const int64_t decoded = pages_after_decode(blocks.layout(), s->num_computed);
      ASSERT_TRUE(pages == prefilled || pages == decoded)
          << pages << " pages for " << s->num_computed << " positions";
      held.insert(s->blocks.begin(), s->blocks.end());
    }
    int64_t in_use = 0;
    for (const BlockId id : held) in_use += blocks.block(id).num_pages;
    ASSERT_EQ(blocks.stats().pages_in_use, in_use);
  }

  std::mt19937_64 random_;
  KvFormat format_;
  std::string rule_;
  std::filesystem::path model_;
  CpuIsa isa_ = best_cpu_isa();
  std::vector<Request> requests_;
};

class InvarianceTest : public testing::TestWithParam<KvFormat> {
 protected:
  void SetUp() override {
    set_log_level(LogLevel::kWarning);
    test::TinyModelOptions options;
    options.vocab_size = kVocab;
    options.num_layers = kLayers;
    options.num_q_heads = 4;
    options.num_kv_heads = kKvHeads;
    options.max_position_embeddings = kMaxLen;
    test::write_tiny_model(model_.path(), options);
  }
  Counts run(const std::string& rule, int num_workloads) {
    Counts counts;
    for (int i = 0; i < num_workloads; ++i) {
      const auto seed = static_cast<uint64_t>(1000 * static_cast<int>(GetParam()) + i + 1);
      SCOPED_TRACE(testing::Message() << kv_format_name(GetParam()) << " workload " << seed);
      Workload(seed, GetParam(), rule, model_.path())
          .run(/*num_requests=*/4, /*num_variants=*/2, counts);
      if (HasFatalFailure() || (rule == "position" && counts.mismatches > 0)) {
        ADD_FAILURE() << "differs in " << counts.mismatches << " choices of workload " << seed;
        break;
      }
    }
    std::cout << kv_format_name(GetParam()) << " " << rule << ": workloads=" << counts.workloads
              << " requests=" << counts.requests << " tokens=" << counts.tokens
              << " mismatches=" << counts.mismatches << " coded_reads=" << counts.coded_reads
              << " hit_tokens=" << counts.hit_tokens << " preemptions=" << counts.preemptions
              << " mixed_steps=" << counts.mixed_steps << " tiles=" << counts.tiles
              << " several_choices=" << counts.several_choices
              << " two_threads=" << counts.two_threads << " cache_off=" << counts.cache_off
              << " preempted_runs=" << counts.preempted_runs << "\n";
    return counts;
  }
  const test::TempDir model_;
};

// 67 workloads for each of three formats: 201.
TEST_P(InvarianceTest, ARequestGetsTheSameBitsHoweverItIsScheduled) {
  const Counts counts = run("position", 67 / kShare);
  EXPECT_EQ(counts.mismatches, 0);
  // What is rare was not tested.
  if (GetParam() != KvFormat::kFp16) {
    EXPECT_GT(counts.coded_reads, 10000u / kMargin);
    EXPECT_GT(counts.tiles, 300u / kMargin);
  }
  EXPECT_GT(counts.hit_tokens, 10000u / kMargin);
  EXPECT_GT(counts.preemptions, 100u / kMargin);
  EXPECT_GT(counts.preempted_runs, 30 / kMargin);
  EXPECT_GT(counts.mixed_steps, 200u / kMargin);
  EXPECT_GT(counts.several_choices, 20 / kMargin);
  EXPECT_GT(counts.two_threads, 30 / kMargin);
  EXPECT_GT(counts.cache_off, 15 / kMargin);
}

// The same check with a rule that asks for the chunk's start must see the difference: chunks and
// preemptions change what is read coded. Where nothing is coded there is no difference to see.
TEST_P(InvarianceTest, TheCheckFailsWhenTheRuleAsksForTheChunksStart) {
  const Counts counts = run("chunk_start", 5);
  if (GetParam() == KvFormat::kFp16) {
    EXPECT_EQ(counts.mismatches, 0);
  } else {
    EXPECT_GT(counts.mismatches, 0);
  }
}

INSTANTIATE_TEST_SUITE_P(Formats, InvarianceTest,
                         testing::Values(KvFormat::kFp16, KvFormat::kKvarnK4V2,
                                         KvFormat::kKvarnK4V4),
                         [](const auto& param_info) { return kv_format_name(param_info.param); });

}  // namespace
}  // namespace kvarn
