// `kvarn bench`: prefill, decode and serving speed of an engine in this process.
#include <cmath>
#include <cstdio>
#include <ctime>
#include <string>

#include <fmt/chrono.h>
#include <fmt/format.h>
#include <nlohmann/json.hpp>

#include "engine/config.h"
#include "kernels/core/log.h"
#include "server/build_info.h"
#include "server/commands/bench_run.h"
#include "server/commands/commands.h"
#include "server/commands/table.h"
#include "server/engine_factory.h"

namespace kvarn::commands {
namespace {

const CommandSpec kBench = {
    "bench",
    "Measures an engine in this process with random prompts: prefill (one prompt), decode "
    "(--concurrency sequences together) and serving (a closed loop of --requests). Tokens are "
    "greedy and end-of-text is ignored, so every request has exactly --output-len of them.",
    "  kvarn bench --model DIR\n"
    "  kvarn bench --load-format dummy --shape qwen3-0.6b --kv-memory 2GiB --json\n"
    "  kvarn bench --model DIR --prompt-len 4096 --kv-cache-dtype fp16     one side of a "
    "comparison\n"
    "  kvarn bench --model DIR --concurrency 8 --requests 32 --only serving\n"};

struct BenchOptions {
  int prompt_len = 512;
  int output_len = 128;
  int concurrency = 1;
  int requests = 0;
  int repeat = 3;
  std::string only = "all";
  int seed = 0;
  bool json = false;

  static void visit(auto& self, auto&& field) {
    field("prompt-len", self.prompt_len, "tokens of each prompt");
    field("output-len", self.output_len, "tokens generated for each");
    field("concurrency", self.concurrency, "sequences at once, in decode and serving");
    field("requests", self.requests, "requests of the serving run; 0: 4 x concurrency");
    field("repeat", self.repeat, "prefill and decode are run so often; the median counts");
    field("only", self.only, "all, prefill, decode or serving");
    field("seed", self.seed, "of the random prompts");
    field("json", self.json, "one JSON object on stdout (rows of name, value, unit)");
  }

  Status validate() const {
    const auto at_least = [](const char* flag, int value, int low) {
      return value >= low ? Status::ok()
                          : Status::invalid_argument(
                                fmt::format("--{} must be at least {}, got {}", flag, low, value));
    };
    KVARN_RETURN_IF_ERROR(at_least("prompt-len", prompt_len, 1));
    KVARN_RETURN_IF_ERROR(at_least("output-len", output_len, 2));
    KVARN_RETURN_IF_ERROR(at_least("concurrency", concurrency, 1));
    KVARN_RETURN_IF_ERROR(at_least("requests", requests, 0));
    KVARN_RETURN_IF_ERROR(at_least("repeat", repeat, 1));
    for (const char* name : {"all", "prefill", "decode", "serving"}) {
      if (only == name) return Status::ok();
    }
    return Status::invalid_argument(
        fmt::format("--only must be all, prefill, decode or serving, got '{}'", only));
  }
};

struct Row {
  std::string name;
  double value = 0;
  std::string unit;
  bool lower_is_better = false;
};

class Bench {
 public:
  Bench(Engine& engine, const BenchOptions& options)
      : engine_(engine), options_(options), seed_(static_cast<uint64_t>(options.seed)) {}

  // One prompt, no output: how fast prompt tokens are computed.
  Status prefill() {
    std::vector<double> rates;
    for (int i = 0; i < options_.repeat; ++i) {
      KVARN_ASSIGN_OR_RETURN(const BenchResult run, load("prefill", 1, 1, /*output_len=*/0));
      rates.push_back(options_.prompt_len / run.seconds());
    }
    add(fmt::format("prefill-{}", options_.prompt_len), percentile(rates, 0.5), "tokens/s");
    return Status::ok();
  }

  // All sequences decode together after their prompts.
  Status decode() {
    std::vector<double> rates;
    for (int i = 0; i < options_.repeat; ++i) {
      KVARN_ASSIGN_OR_RETURN(
          const BenchResult run,
          load("decode", options_.concurrency, options_.concurrency, options_.output_len));
      rates.push_back(joint_decode_rate(run));
    }
    const std::string name =
        fmt::format("decode-b{}-l{}", options_.concurrency, options_.prompt_len);
    add(name, percentile(rates, 0.5), "tokens/s");
    return Status::ok();
  }

  Status serving() {
    const int requests = options_.requests > 0 ? options_.requests : 4 * options_.concurrency;
    KVARN_ASSIGN_OR_RETURN(const BenchResult run,
                           load("serving", requests, options_.concurrency, options_.output_len));
    std::vector<double> first, gaps, whole;
    for (const RequestTimes& times : run.requests) {
      first.push_back(ms(times.first_token - times.submitted));
      whole.push_back(ms(times.last_token - times.submitted));
      for (const float gap : times.gaps) gaps.push_back(1e3 * static_cast<double>(gap));
    }
    const std::string name = fmt::format("serving-c{}-{}/{}", options_.concurrency,
                                         options_.prompt_len, options_.output_len);
    const double tokens_out = static_cast<double>(requests) * options_.output_len;
    const double tokens_in = static_cast<double>(requests) * options_.prompt_len;
    add(name + "-requests", requests / run.seconds(), "requests/s");
    add(name + "-output", tokens_out / run.seconds(), "tokens/s");
    add(name + "-total", (tokens_in + tokens_out) / run.seconds(), "tokens/s");
    for (const auto& [label, values] :
         {std::pair{"ttft", first}, std::pair{"itl", gaps}, std::pair{"e2e", whole}}) {
      add(fmt::format("{}-{}-p50", name, label), percentile(values, 0.5), "ms", true);
      add(fmt::format("{}-{}-p99", name, label), percentile(values, 0.99), "ms", true);
    }
    return Status::ok();
  }

  const std::vector<Row>& rows() const { return rows_; }

 private:
  static double ms(BenchClock::duration duration) {
    return std::chrono::duration<double, std::milli>(duration).count();
  }
  void add(std::string name, double value, std::string unit, bool lower_is_better = false) {
    rows_.push_back({std::move(name), value, std::move(unit), lower_is_better});
  }
  Result<BenchResult> load(const char* what, int requests, int concurrency, int output_len) {
    BenchLoad load;
    load.requests = requests;
    load.concurrency = concurrency;
    load.prompt_len = options_.prompt_len;
    load.output_len = output_len;
    load.vocab_size = engine_.runner().vocab_size();
    load.seed = seed_++;  // no run finds its prompts in the prefix cache
    Progress progress(what, requests);
    return run_load(engine_, load, [&](int64_t done) { progress.update(done); });
  }

  Engine& engine_;
  const BenchOptions& options_;
  uint64_t seed_;
  std::vector<Row> rows_;
};

std::string join_command(const Invocation& invocation) {
  std::string command = "kvarn bench";
  for (const std::string& argument : invocation.arguments) {
    command += ' ';
    command += argument;
  }
  return command;
}

void print_json(const Bench& bench, const LoadedEngine& loaded, const std::string& command) {
  nlohmann::ordered_json rows = nlohmann::ordered_json::array();
  for (const Row& row : bench.rows()) {
    rows.push_back({{"name", row.name},
                    {"value", row.value},
                    {"unit", row.unit},
                    {"against", nullptr},
                    {"against_value", nullptr},
                    {"ratio", nullptr},
                    {"must", nullptr},
                    {"stretch", nullptr},
                    {"lower_is_better", row.lower_is_better}});
  }
  const nlohmann::ordered_json out = {
      {"device", loaded.backend_name},
      {"driver", nullptr},
      {"date", fmt::format("{:%Y-%m-%d}", fmt::gmtime(std::time(nullptr)))},
      {"commit", build_info().commit},
      {"command", command},
      {"kv_cache_dtype", kv_format_name(loaded.kv_layout.format)},
      {"kv_pages", loaded.memory_plan.num_pages},
      {"rows", std::move(rows)}};
  std::puts(out.dump().c_str());
}

void print_table(const Bench& bench, const LoadedEngine& loaded) {
  std::fputs(fmt::format("{}, {} layers, {:.2f} B parameters, KV {}, pool {} ({} pages)\n\n",
                         loaded.backend_name, loaded.model_config.num_layers,
                         static_cast<double>(loaded.model_config.num_parameters()) / 1e9,
                         kv_format_name(loaded.kv_layout.format),
                         bytes_text(loaded.memory_plan.pool_bytes), loaded.memory_plan.num_pages)
                 .c_str(),
             stdout);
  Table table({"measurement", "value", "unit"});
  for (const Row& row : bench.rows()) {
    table.add({row.name, fmt::format("{:.2f}", row.value), row.unit});
  }
  std::fputs(table.text().c_str(), stdout);
}

Status run(const EngineConfig& config, const BenchOptions& options, const std::string& command) {
  KVARN_ASSIGN_OR_RETURN(LoadedEngine loaded, load_engine(config, nullptr));
  Bench bench(*loaded.engine, options);
  if (options.only == "all" || options.only == "prefill") KVARN_RETURN_IF_ERROR(bench.prefill());
  if (options.only == "all" || options.only == "decode") KVARN_RETURN_IF_ERROR(bench.decode());
  if (options.only == "all" || options.only == "serving") KVARN_RETURN_IF_ERROR(bench.serving());
  if (options.json) {
    print_json(bench, loaded, command);
  } else {
    print_table(bench, loaded);
  }
  return Status::ok();
}

}  // namespace

int run_bench(const Invocation& invocation) {
  EngineConfig config;
  BenchOptions options;
  Settings settings;
  settings.add(options, "Measurement");
  settings.add(config, "Engine");
  if (const auto exit_code = prepare(kBench, settings, invocation)) return *exit_code;
  for (const Status& status : {options.validate(), config.validate()}) {
    if (!status.is_ok()) return fail(kBench.name, with_source(status, settings), kExitUsage);
  }
  set_log_level(LogLevel::kWarning);
  const Status status = run(config, options, join_command(invocation));
  return status.is_ok() ? kExitOk : fail(kBench.name, with_source(status, settings));
}

}  // namespace kvarn::commands
