// The parts of the commands that hold arithmetic or promises: capacity tables against a running
// engine, needle cases, quality measures, the session of eval against the engine.
#include "server/commands/commands.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cmath>
#include <condition_variable>
#include <fstream>
#include <mutex>
#include <thread>

#include <nlohmann/json.hpp>

#include "engine/kv_capacity.h"
#include "server/commands/bench_run.h"
#include "server/commands/kv_quality.h"
#include "server/commands/model_session.h"
#include "server/commands/needles.h"
#include "server/commands/table.h"
#include "server/engine_factory.h"
#include "tests/support/tiny_model.h"

namespace kvarn::commands {
namespace {

using ::testing::AllOf;
using ::testing::HasSubstr;

struct Output {
  int exit_code;
  std::string out, err;
};

Output run(std::vector<std::string> arguments) {
  ::testing::internal::CaptureStdout();
  ::testing::internal::CaptureStderr();
  const int exit_code = run_main(arguments, {});
  return {exit_code, ::testing::internal::GetCapturedStdout(),
          ::testing::internal::GetCapturedStderr()};
}

size_t lines_of(const std::string& text) {
  return static_cast<size_t>(std::count(text.begin(), text.end(), '\n'));
}

TEST(CommandsTest, HelpOfEveryCommandGivesExamplesAndEndsWell) {
  EXPECT_EQ(run({"--help"}).exit_code, kExitOk);
  for (const Command& command : all_commands()) {
    EXPECT_THAT(run({"--help"}).out, HasSubstr(std::string(command.name)));
    if (command.name == "pull") continue;  // not in this version: says so whatever is asked
    const Output help = run({std::string(command.name), "--help"});
    EXPECT_EQ(help.exit_code, kExitOk) << command.name;
    EXPECT_THAT(help.out, AllOf(HasSubstr("Usage:"), HasSubstr("Examples:"), HasSubstr("--config")))
        << command.name;
  }
}

TEST(CommandsTest, AWrongCommandFlagOrFileGivesOneLineAndExitCodeTwo) {
  const std::vector<std::vector<std::string>> wrong = {
      {"sevre"},
      {"--model", "x"},
      {"serve", "--port", "x"},
      {"serve", "--modle", "x"},
      {"serve", "--model", "x", "--api-key", "k"},
      {"serve", "--max-num-seqs", "0"},
      {"serve", "--config", "/does/not/exist"},
      {"bench", "--model", "/does/not/exist"},
      {"bench"},
      {"bench", "--load-format", "dummy", "--shape", "qwen3-9b"},
      {"bench", "--output-len", "0"},
      {"inspect"},
      {"inspect", "--shape", "qwen3-9b"},
      {"inspect", "--shape", "qwen3-8b", "--kv-memory", "8 gigs"},
      {"inspect", "--model", "/does/not/exist"},
      {"pull", "Qwen/Qwen3-8B"},
      {"version", "--jsno"},
  };
  for (const auto& arguments : wrong) {
    const Output output = run(arguments);
    EXPECT_EQ(output.exit_code, kExitUsage) << ::testing::PrintToString(arguments);
    EXPECT_EQ(lines_of(output.err), 1u) << output.err;
    EXPECT_THAT(output.err, HasSubstr("kvarn"));
    EXPECT_EQ(output.out, "");
  }
}

TEST(CommandsTest, NamesTheNearestCommand) {
  EXPECT_THAT(run({"sevre"}).err, HasSubstr("did you mean kvarn serve?"));
}

TEST(CommandsTest, VersionIsOneJsonObjectForMachines) {
  const Output output = run({"version", "--json"});
  EXPECT_EQ(output.exit_code, kExitOk);
  EXPECT_TRUE(nlohmann::json::parse(output.out).contains("commit"));
}

TEST(InspectTest, FiguresOfTheEightBillionShapeAreThoseOfTheLayout) {
  const Output output = run({"inspect", "--shape", "qwen3-8b", "--kv-memory", "8GiB", "--json"});
  ASSERT_EQ(output.exit_code, kExitOk) << output.err;
  const auto json = nlohmann::json::parse(output.out);
  const auto& kvarn = json["kv"]["formats"][0];
  EXPECT_EQ(kvarn["format"], "kvarn_k4v2_g128");
  EXPECT_EQ(kvarn["page_id_bytes"], 13824 * 36 * 8);
  EXPECT_EQ(kvarn["num_pages"], (uint64_t{8} << 30) / (13824 * 36 * 8));
  for (const auto& row : kvarn["rows"]) {
    if (row["context"] != 16384) continue;
    // Sink 5 pages, 126 coded blocks, the last block still exact in 5.
    EXPECT_EQ(row["pages"], 5 + 126 + 5);
    EXPECT_EQ(row["peak_pages"], 5 + 126 + 5 + 1);
    EXPECT_NEAR(row["ratio_to_dense_fp16"].get<double>(), 16384 * 512.0 / (136 * 13824), 1e-9);
  }
}

// Waits for the end of one request.
class EndSink : public EventSink {
 public:
  void on_event(RequestId, EngineEvent event) override {
    const std::lock_guard lock(mutex_);
    const auto* token = std::get_if<TokenEvent>(&event);
    ended_ |= token != nullptr && token->finish.has_value();
    ended_ |= std::holds_alternative<ErrorEvent>(event);
    changed_.notify_all();
  }
  void wait_ended() {
    std::unique_lock lock(mutex_);
    changed_.wait(lock, [&] { return ended_; });
  }

 private:
  std::mutex mutex_;
  std::condition_variable changed_;
  bool ended_ = false;
};

class TinyEngineTest : public ::testing::Test {
 protected:
  TinyEngineTest() {
    test::write_tiny_model(dir_.path(), {.max_position_embeddings = 2048});
    config_.model = dir_.path().string();
    config_.device = "cpu";
    config_.threads = 1;
    config_.kv_memory = "64MiB";
    config_.max_num_seqs = 4;
  }
  test::TempDir dir_;
  EngineConfig config_;
};

// The most pages ever held: sampling the counters from outside could miss a peak, so this looks
// after every step.
class PeakObserver : public EngineObserver {
 public:
  void on_step(double, int, int) override {
    if (Engine* engine = engine_.load()) {
      peak_ = std::max<int64_t>(peak_, engine->stats().pages_in_use);
    }
  }
  void on_preemption(RequestId, int) override {}
  void on_device_lost() override {}
  void watch(Engine* engine) { engine_ = engine; }
  int64_t peak() const { return peak_; }

 private:
  std::atomic<Engine*> engine_ = nullptr;
  std::atomic<int64_t> peak_ = 0;
};

TEST_F(TinyEngineTest, InspectAgreesWithThePagesOfARunningEngine) {
  for (const char* format : {"kvarn_k4v2_g128", "kvarn_k4v4_g128", "fp16"}) {
    config_.kv_cache_dtype = format;
    const Output output = run({"inspect", "--model", config_.model, "--kv-memory", "64MiB",
                               "--kv-cache-dtype", format, "--max-model-len", "700", "--json"});
    ASSERT_EQ(output.exit_code, kExitOk) << output.err;
    const auto shown = nlohmann::json::parse(output.out)["kv"]["formats"][0];
    const auto row = shown["rows"].back();
    ASSERT_EQ(row["context"], 700);

    PeakObserver observer;
    Result<LoadedEngine> loaded = load_engine(config_, &observer);
    ASSERT_TRUE(loaded.is_ok()) << loaded.status().message();
    Engine& engine = *loaded->engine;
    observer.watch(&engine);
    EXPECT_EQ(loaded->memory_plan.num_pages, shown["num_pages"].get<int64_t>());
    EXPECT_EQ(engine.stats().pages_total, shown["num_pages"].get<int64_t>());

    const auto sink = std::make_shared<EndSink>();
    EngineRequest request;
    request.id = engine.next_request_id();
    request.prompt.assign(300, 5);
    request.sampling.temperature = 0;
    request.stop.max_tokens = 401;  // the last one is never fed: 700 positions
    request.stop.ignore_eos = true;
    request.sink = sink;
    ASSERT_TRUE(engine.submit(std::move(request)).is_ok());
    sink->wait_ended();
    ASSERT_TRUE(engine.wait_idle(std::chrono::seconds(30)));
    // The peak without the reserve page, which is free until it is needed.
    const int64_t reserve = loaded->kv_layout.coded() ? 1 : 0;
    EXPECT_EQ(observer.peak(), row["peak_pages"].get<int64_t>() - reserve) << format;
    EXPECT_EQ(engine.stats().leaked_pages, 0);
    observer.watch(nullptr);
  }
}

TEST_F(TinyEngineTest, ALoadOfTheBenchGetsEveryTokenItAskedFor) {
  Result<LoadedEngine> loaded = load_engine(config_, nullptr);
  ASSERT_TRUE(loaded.is_ok()) << loaded.status().message();
  BenchLoad load;
  load.requests = 7;
  load.concurrency = 3;
  load.prompt_len = 150;
  load.output_len = 20;
  load.vocab_size = loaded->model_config.vocab_size;
  int64_t last = 0;
  const auto result = run_load(*loaded->engine, load, [&](int64_t done) { last = done; });
  ASSERT_TRUE(result.is_ok()) << result.status().message();
  EXPECT_EQ(last, 7);
  for (const RequestTimes& times :
       result.status().is_ok() ? (*result).requests : std::vector<RequestTimes>{}) {
    EXPECT_EQ(times.output_tokens, 20);
    EXPECT_EQ(times.gaps.size(), 19u);
    EXPECT_LE(times.submitted, times.first_token);
    EXPECT_LE(times.first_token, times.last_token);
  }
}

TEST_F(TinyEngineTest, ALoadThatTheEngineRefusesIsAnError) {
  Result<LoadedEngine> loaded = load_engine(config_, nullptr);
  ASSERT_TRUE(loaded.is_ok()) << loaded.status().message();
  BenchLoad load;
  load.prompt_len = 5000;
  load.vocab_size = loaded->model_config.vocab_size;
  const auto result = run_load(*loaded->engine, load, [](int64_t) {});
  ASSERT_FALSE(result.is_ok());
  EXPECT_EQ(result.status().reason(), "context_length_exceeded");
}

// The session of eval must be the engine's arithmetic: greedy tokens of both are the same.
TEST_F(TinyEngineTest, TheSessionOfEvalGeneratesWhatTheEngineDoes) {
  for (const char* format : {"kvarn_k4v2_g128", "fp16"}) {
    config_.kv_cache_dtype = format;
    std::vector<int32_t> prompt(333);
    for (size_t i = 0; i < prompt.size(); ++i) prompt[i] = static_cast<int32_t>(2 + i * 7 % 500);

    Result<std::unique_ptr<Backend>> backend = choose_backend(config_);
    ASSERT_TRUE(backend.is_ok());
    Result<std::unique_ptr<Model>> model = load_model(model_source(config_), **backend);
    ASSERT_TRUE(model.is_ok()) << model.status().message();
    ModelSession session(**model, **backend, *resolve_kv_format(format, 128),
                         ReadingRule::kPosition, 700, 256);
    std::vector<int32_t> expected;
    const auto take = [&](std::span<const float> logits) {
      expected.push_back(
          static_cast<int32_t>(std::max_element(logits.begin(), logits.end()) - logits.begin()));
    };
    session.prefill(prompt, false, [&](int, std::span<const float> logits) { take(logits); });
    while (expected.size() < 300) take(session.decode(expected.back()));

    Result<LoadedEngine> loaded = load_engine(config_, nullptr);
    ASSERT_TRUE(loaded.is_ok()) << loaded.status().message();
    struct Collect : EventSink {
      void on_event(RequestId, EngineEvent event) override {
        const std::lock_guard lock(mutex);
        if (const auto* token = std::get_if<TokenEvent>(&event)) {
          tokens.push_back(token->sampled.token);
          done |= token->finish.has_value();
        }
        done |= std::holds_alternative<ErrorEvent>(event);
        changed.notify_all();
      }
      std::mutex mutex;
      std::condition_variable changed;
      std::vector<int32_t> tokens;
      bool done = false;
    };
    const auto sink = std::make_shared<Collect>();
    EngineRequest request;
    request.id = loaded->engine->next_request_id();
    request.prompt = prompt;
    request.sampling.temperature = 0;
    request.stop.max_tokens = 300;
    request.stop.ignore_eos = true;
    request.sink = sink;
    ASSERT_TRUE(loaded->engine->submit(std::move(request)).is_ok());
    std::unique_lock lock(sink->mutex);
    sink->changed.wait(lock, [&] { return sink->done; });
    EXPECT_EQ(sink->tokens, expected) << format;
  }
}

TEST(KvQualityTest, EqualLogitsHaveNoDivergenceAndFullAgreement) {
  const std::vector<float> logits = {1.f, 2.f, 3.f};
  KvQuality quality;
  quality.add(logits, logits, 2);
  EXPECT_EQ(quality.mean_kl(), 0);
  EXPECT_EQ(quality.top1_agreement(), 1);
  const double p = std::exp(3.) / (std::exp(1.) + std::exp(2.) + std::exp(3.));
  EXPECT_NEAR(quality.perplexity(), 1 / p, 1e-12);
  EXPECT_EQ(quality.perplexity(), quality.reference_perplexity());
}

TEST(KvQualityTest, DivergenceIsThatOfTheDefinition) {
  const std::vector<float> p_logits = {std::log(0.5f), std::log(0.25f), std::log(0.25f)};
  const std::vector<float> q_logits = {std::log(0.25f), std::log(0.5f), std::log(0.25f)};
  KvQuality quality;
  quality.add(p_logits, q_logits, -1);
  EXPECT_NEAR(quality.mean_kl(), 0.5 * std::log(2.) - 0.25 * std::log(2.), 1e-6);
  EXPECT_EQ(quality.top1_agreement(), 0);
}

TEST(NeedlesTest, SentencesEndAtAStopBeforeACapitalOrAtTheLineEnd) {
  const auto sentences = split_sentences("One. Two e.g. this! Three? four.\n\nFive\n");
  std::vector<std::string> texts;
  for (const Sentence& sentence : sentences) texts.push_back(sentence.text);
  EXPECT_THAT(texts, ::testing::ElementsAre("One.", "Two e.g. this!", "Three? four.", "Five"));
  EXPECT_TRUE(sentences[0].starts_paragraph);
  EXPECT_FALSE(sentences[1].starts_paragraph);
  EXPECT_TRUE(sentences[3].starts_paragraph);
}

class NeedleCaseTest : public ::testing::Test {
 protected:
  // One token a character: lengths are exact and the prompt can be read back.
  static Result<std::vector<int32_t>> render(const std::string& message) {
    return std::vector<int32_t>(message.begin(), message.end());
  }
  static std::string text_of(const NeedleCase& c) {
    return std::string(c.prompt.begin(), c.prompt.end());
  }
  NeedlePatterns patterns_ = *load_needles(KVARN_SOURCE_DIR "/assets/demo-model/eval/needles.json");
  std::vector<Sentence> filler_ = split_sentences(patterns_.filler_text);
};

TEST_F(NeedleCaseTest, FillsTheLengthAndHoldsTheNeedleTheDistractorsAndTheQuestion) {
  for (const int length : {4000, 20000}) {
    for (int i = 0; i < 11; ++i) {
      const auto made = make_needle_case(patterns_, filler_, render, length, i, 11, 1);
      ASSERT_TRUE(made.is_ok()) << made.status().message();
      const NeedleCase& c = *made;
      const std::string text = text_of(c);
      EXPECT_LE(text.size(), static_cast<size_t>(length));
      EXPECT_GE(text.size(), static_cast<size_t>(length) - 1200);  // within a long sentence
      EXPECT_THAT(text, HasSubstr(" is " + c.code + "."));
      size_t facts = 0;
      for (size_t at = text.find("The secret code"); at != std::string::npos;
           at = text.find("The secret code", at + 1)) {
        ++facts;
      }
      EXPECT_EQ(facts, 3u);
      const double at = static_cast<double>(text.find(c.code)) / static_cast<double>(length);
      EXPECT_NEAR(at, c.depth, length > 10000 ? 0.1 : 0.4) << length << " " << i;
    }
  }
}

TEST_F(NeedleCaseTest, IsTheSameForTheSameSeedAndAnotherForAnotherOne) {
  const auto a = make_needle_case(patterns_, filler_, render, 3000, 4, 10, 1);
  const auto b = make_needle_case(patterns_, filler_, render, 3000, 4, 10, 1);
  const auto c = make_needle_case(patterns_, filler_, render, 3000, 4, 10, 2);
  EXPECT_EQ((*a).prompt, (*b).prompt);
  EXPECT_NE((*a).prompt, (*c).prompt);
}

TEST_F(NeedleCaseTest, ALengthThatHoldsNoCaseIsAnError) {
  EXPECT_FALSE(make_needle_case(patterns_, filler_, render, 100, 0, 1, 1).is_ok());
}

TEST(NeedlesTest, ABadFileNamesItselfAndTheField) {
  test::TempDir dir;
  EXPECT_THAT(load_needles(dir.path() / "needles.json").status().message(),
              HasSubstr("needles.json"));
  test::write_file(dir.path() / "needles.json", R"({"sentence": 1})");
  EXPECT_THAT(load_needles(dir.path() / "needles.json").status().message(),
              HasSubstr("needles.json"));
  std::ifstream good(KVARN_SOURCE_DIR "/assets/demo-model/eval/needles.json");
  auto json = nlohmann::json::parse(good);
  json.erase("places");
  test::write_file(dir.path() / "needles.json", json.dump());
  EXPECT_THAT(load_needles(dir.path() / "needles.json").status().message(), HasSubstr("places"));
}

TEST(TableTest, AlignsColumnsAndNamesUnits) {
  Table table({"a", "value"});
  table.add({"long name", "1"});
  EXPECT_EQ(table.text(""), "a          value\nlong name      1\n");
  EXPECT_EQ(bytes_text(512), "512 B");
  EXPECT_EQ(bytes_text(uint64_t{8} << 30), "8.0 GiB");
  EXPECT_EQ(context_text(4096), "4K");
  EXPECT_EQ(context_text(1000), "1000");
}

}  // namespace
}  // namespace kvarn::commands
