// `kvarn eval`: what a KV cache format costs. Perplexity, KL divergence and top-1 agreement against
// a reference format on a held-out text, and needle retrieval by length and depth; beside them the
// reading rule under which a prompt chunk reads its own tiles exact.
#include <algorithm>
#include <charconv>
#include <cstdio>
#include <ctime>
#include <fstream>
#include <sstream>

#include <fmt/chrono.h>
#include <fmt/format.h>
#include <nlohmann/json.hpp>

#include "engine/tokenizer/tokenizer.h"
#include "kernels/core/log.h"
#include "server/build_info.h"
#include "server/commands/commands.h"
#include "server/commands/eval_run.h"
#include "server/commands/table.h"
#include "server/engine_factory.h"
#include "server/model_files.h"

namespace kvarn::commands {
namespace {

using Json = nlohmann::ordered_json;

const CommandSpec kEval = {
    "eval",
    "Measures what a KV cache format costs in quality: perplexity, mean KL divergence and top-1 "
    "agreement against another format on a held-out text, and how often a planted fact is found "
    "again at several lengths. All formats see the same tokens and cases.",
    "  kvarn eval --model DIR --kv-cache-dtype kvarn_k4v2_g128 --against fp16\n"
    "  kvarn eval --model DIR --only perplexity --text my.txt --tokens 65536\n"
    "  kvarn eval --model DIR --only needles --lengths 4096,8192 --cases 100 --json\n"};

struct EvalOptions {
  std::string model;
  std::string kv_cache_dtype = "kvarn_k4v2_g128";
  std::string against = "fp16";
  std::string only = "all";
  std::string text, needles;
  int tokens = 32768;
  int window = 4096;
  std::string lengths = "1024,2048,4096,8192";
  int cases = 50;
  int chunk = 512;
  bool chunk_start = true;
  int seed = 1;
  std::string device = "auto";
  int threads = 0;
  std::string load_format = "auto";
  bool json = false;

  static void visit(auto& self, auto&& field) {
    field("model", self.model, "directory with config.json, tokenizer.json and *.safetensors");
    field("kv-cache-dtype", self.kv_cache_dtype,
          "format to measure: kvarn_k4v2_g128, kvarn_k4v4_g128 or fp16");
    field("against", self.against, "format to compare with");
    field("only", self.only, "all, perplexity or needles");
    field("text", self.text, "held-out text, UTF-8 (default: eval/heldout.txt of the model)");
    field("needles", self.needles, "needle patterns (default: eval/needles.json of the model)");
    field("tokens", self.tokens, "tokens of the text that are measured, from its beginning");
    field("window", self.window, "the text is read in windows of so many tokens");
    field("lengths", self.lengths, "prompt lengths of the needle cases, comma-separated");
    field("cases", self.cases, "needle cases per length, at depths spread evenly");
    field("chunk", self.chunk, "tokens of a prompt chunk, a multiple of 128");
    field("chunk-start", self.chunk_start,
          "also measure the reading rule in which a chunk reads its own tiles exact");
    field("seed", self.seed, "of the needle cases");
    field("device", self.device, "auto, cpu or cuda");
    field("threads", self.threads, "CPU threads; 0: one per physical core");
    field("load-format", self.load_format, "auto: read the weights; dummy: random weights");
    field("json", self.json, "one JSON object on stdout");
  }
};

struct EvalPlan {
  std::vector<Variant> variants;
  std::vector<int> lengths;
  std::filesystem::path text, needles;
  bool do_text = true, do_needles = true;
};

Result<std::vector<int>> parse_lengths(const std::string& list) {
  std::vector<int> lengths;
  std::istringstream items(list);
  for (std::string item; std::getline(items, item, ',');) {
    int length = 0;
    const auto [end, error] = std::from_chars(item.data(), item.data() + item.size(), length);
    if (error != std::errc() || end != item.data() + item.size() || length < kBlockTokens) {
      return Status::invalid_argument(
          fmt::format("--lengths must be numbers of at least {} with commas between, got '{}'",
                      kBlockTokens, list));
    }
    lengths.push_back(length);
  }
  if (lengths.empty()) return Status::invalid_argument("--lengths must not be empty");
  return lengths;
}

Result<std::filesystem::path> input_file(const char* flag, const std::string& given,
                                         const EvalOptions& options, const char* usual) {
  const std::filesystem::path path = given.empty()
                                         ? std::filesystem::path(options.model) / "eval" / usual
                                         : std::filesystem::path(given);
  std::error_code error;
  if (std::filesystem::is_regular_file(path, error)) return path;
  return Status::invalid_argument(fmt::format("--{}: there is no file {}{}", flag, path.string(),
                                              given.empty() ? "; name one" : ""));
}

Result<EvalPlan> make_plan(const EvalOptions& options, const ModelConfig& config) {
  EvalPlan plan;
  KVARN_ASSIGN_OR_RETURN(const KvFormat reference,
                         resolve_kv_format(options.against, config.head_dim));
  KVARN_ASSIGN_OR_RETURN(const KvFormat format,
                         resolve_kv_format(options.kv_cache_dtype, config.head_dim));
  plan.variants.push_back({kv_format_name(reference), reference, ReadingRule::kPosition});
  plan.variants.push_back({kv_format_name(format), format, ReadingRule::kPosition});
  if (options.chunk_start && format != KvFormat::kFp16) {
    plan.variants.push_back({fmt::format("{}, rule chunk_start", kv_format_name(format)), format,
                             ReadingRule::kChunkStart});
  }
  if (options.only != "all" && options.only != "perplexity" && options.only != "needles") {
    return Status::invalid_argument(
        fmt::format("--only must be all, perplexity or needles, got '{}'", options.only));
  }
  plan.do_text = options.only != "needles";
  plan.do_needles = options.only != "perplexity";
  if (plan.do_text) {
    KVARN_ASSIGN_OR_RETURN(plan.text, input_file("text", options.text, options, "heldout.txt"));
  }
  if (plan.do_needles) {
    KVARN_ASSIGN_OR_RETURN(plan.needles,
                           input_file("needles", options.needles, options, "needles.json"));
  }
  KVARN_ASSIGN_OR_RETURN(plan.lengths, parse_lengths(options.lengths));
  const int longest = config.max_position_embeddings;
  const auto within = [](const char* flag, int value, int low, int high) {
    return value >= low && value <= high
               ? Status::ok()
               : Status::invalid_argument(
                     fmt::format("--{} must be {}..{}, got {}", flag, low, high, value));
  };
  KVARN_RETURN_IF_ERROR(within("window", options.window, 2, longest));
  KVARN_RETURN_IF_ERROR(within("tokens", options.tokens, 2, 1 << 30));
  KVARN_RETURN_IF_ERROR(within("cases", options.cases, 1, 1 << 20));
  KVARN_RETURN_IF_ERROR(within("chunk", options.chunk, kBlockTokens, 1 << 16));
  if (options.chunk % kBlockTokens != 0) {
    return Status::invalid_argument(
        fmt::format("--chunk must be a multiple of {}, got {}", kBlockTokens, options.chunk));
  }
  return plan;
}

Result<std::string> read_text(const std::filesystem::path& path) {
  std::ifstream file(path, std::ios::binary);
  std::ostringstream text;
  if (!file || !(text << file.rdbuf())) {
    return Status::invalid_argument(fmt::format("--text {} cannot be read", path.string()));
  }
  return text.str();
}

const char* rule_name(ReadingRule rule) {
  return rule == ReadingRule::kPosition ? "position" : "chunk_start";
}

Json text_json(const EvalPlan& plan, const EvalOptions& options, const TextResult& result) {
  Json rows = Json::array();
  for (size_t v = 0; v < plan.variants.size(); ++v) {
    const KvQuality& quality = result.quality[v];
    rows.push_back({{"kv_cache_dtype", kv_format_name(plan.variants[v].format)},
                    {"reading_rule", rule_name(plan.variants[v].rule)},
                    {"perplexity", quality.perplexity()},
                    {"mean_kl", quality.mean_kl()},
                    {"top1_agreement", quality.top1_agreement()}});
  }
  return {{"text", plan.text.filename().string()},
          {"tokens", result.tokens},
          {"window", options.window},
          {"chunk", options.chunk},
          {"rows", std::move(rows)}};
}

Json needles_json(const EvalPlan& plan, const EvalOptions& options,
                  const std::vector<NeedleResult>& results) {
  Json rows = Json::array();
  for (size_t v = 0; v < plan.variants.size(); ++v) {
    for (const NeedleResult& result : results) {
      rows.push_back({{"kv_cache_dtype", kv_format_name(plan.variants[v].format)},
                      {"reading_rule", rule_name(plan.variants[v].rule)},
                      {"length", result.length},
                      {"hits", result.hits[v]},
                      {"cases", result.cases},
                      {"hits_by_depth_fifth", result.hits_by_depth[v]},
                      {"cases_by_depth_fifth", result.cases_by_depth}});
    }
  }
  return {{"needles", plan.needles.filename().string()},
          {"seed", options.seed},
          {"chunk", options.chunk},
          {"rows", std::move(rows)}};
}

void print_text(const EvalPlan& plan, const EvalOptions& options, const TextResult& result) {
  std::fputs(fmt::format("\nHeld-out text: {} tokens in {} windows of {}\n", result.tokens,
                         result.windows, options.window)
                 .c_str(),
             stdout);
  Table table({"KV cache", "perplexity", "mean KL", "top-1 agreement"});
  for (size_t v = 0; v < plan.variants.size(); ++v) {
    const KvQuality& quality = result.quality[v];
    table.add({plan.variants[v].name, fmt::format("{:.4f}", quality.perplexity()),
               v == 0 ? "-" : fmt::format("{:.6f}", quality.mean_kl()),
               v == 0 ? "-" : fmt::format("{:.2f} %", 100 * quality.top1_agreement())});
  }
  std::fputs(table.text().c_str(), stdout);
}

void print_needles(const EvalPlan& plan, const std::vector<NeedleResult>& results) {
  std::fputs(fmt::format("\nNeedles found, of {} at each length\n", results.front().cases).c_str(),
             stdout);
  std::vector<std::string> header = {"KV cache"};
  for (const NeedleResult& result : results) header.push_back(context_text(result.length));
  Table table(std::move(header));
  for (size_t v = 0; v < plan.variants.size(); ++v) {
    std::vector<std::string> row = {plan.variants[v].name};
    for (const NeedleResult& result : results) {
      row.push_back(
          fmt::format("{} ({:.0f} %)", result.hits[v], 100.0 * result.hits[v] / result.cases));
    }
    table.add(std::move(row));
  }
  std::fputs(table.text().c_str(), stdout);
}

Status run(const EvalOptions& options, const std::string& command) {
  EngineConfig config;
  config.model = options.model;
  config.device = options.device;
  config.threads = options.threads;
  config.load_format = options.load_format;
  if (config.model.empty()) {
    return Status::invalid_argument(
        "--model is required: a directory with config.json, tokenizer.json and *.safetensors");
  }
  KVARN_RETURN_IF_ERROR(config.validate());
  KVARN_ASSIGN_OR_RETURN(const ModelConfig model_config, read_model_config(model_source(config)));
  KVARN_ASSIGN_OR_RETURN(const EvalPlan plan, make_plan(options, model_config));
  KVARN_ASSIGN_OR_RETURN(const std::unique_ptr<Tokenizer> tokenizer,
                         Tokenizer::load(std::filesystem::path(options.model) / "tokenizer.json"));
  std::unique_ptr<ChatTemplate> chat_template;
  NeedlePatterns patterns;
  if (plan.do_needles) {
    KVARN_ASSIGN_OR_RETURN(chat_template, load_chat_template(options.model));
    if (chat_template == nullptr) {
      return Status::invalid_argument(
          fmt::format("{} has no chat template, which needle prompts are rendered with; use --only "
                      "perplexity",
                      options.model));
    }
    KVARN_ASSIGN_OR_RETURN(patterns, load_needles(plan.needles));
  }
  KVARN_ASSIGN_OR_RETURN(const std::unique_ptr<Backend> backend, choose_backend(config));
  KVARN_ASSIGN_OR_RETURN(const std::unique_ptr<Model> model,
                         load_model(model_source(config), *backend));

  Evaluation evaluation(plan.variants, options.chunk, *backend, *model, *tokenizer);
  Json out = {{"device", backend->name()},
              {"date", fmt::format("{:%Y-%m-%d}", fmt::gmtime(std::time(nullptr)))},
              {"commit", build_info().commit},
              {"command", command},
              {"kv_cache_dtype", plan.variants[1].name},
              {"against", plan.variants[0].name}};
  if (!options.json) {
    std::fputs(fmt::format("{} against {} on {}\n", plan.variants[1].name, plan.variants[0].name,
                           backend->name())
                   .c_str(),
               stdout);
  }
  if (plan.do_text) {
    KVARN_ASSIGN_OR_RETURN(const std::string text, read_text(plan.text));
    KVARN_ASSIGN_OR_RETURN(const TextResult result,
                           evaluation.run_text(text, options.tokens, options.window));
    out["perplexity"] = text_json(plan, options, result);
    if (!options.json) print_text(plan, options, result);
  }
  if (plan.do_needles) {
    KVARN_ASSIGN_OR_RETURN(
        const std::vector<NeedleResult> results,
        evaluation.run_needles(*chat_template, patterns, plan.lengths, options.cases,
                               static_cast<uint64_t>(options.seed)));
    out["needles"] = needles_json(plan, options, results);
    if (!options.json) print_needles(plan, results);
  }
  if (options.json) std::puts(out.dump().c_str());
  return Status::ok();
}

}  // namespace

int run_eval(const Invocation& invocation) {
  EvalOptions options;
  Settings settings;
  settings.add(options, "Flags");
  if (const auto exit_code = prepare(kEval, settings, invocation)) return *exit_code;
  set_log_level(LogLevel::kWarning);
  std::string command = "kvarn eval";
  for (const std::string& argument : invocation.arguments) {
    command += ' ';
    command += argument;
  }
  const Status status = run(options, command);
  return status.is_ok() ? kExitOk : fail(kEval.name, with_source(status, settings));
}

}  // namespace kvarn::commands
