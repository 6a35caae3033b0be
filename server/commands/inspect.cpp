// `kvarn inspect`: config, tensors, and what fits a KV memory size. The page arithmetic is the
// engine's own (engine/kv_capacity), and the pool is cut into pages as the runner cuts it.
#include <algorithm>
#include <array>
#include <cctype>
#include <cstdio>
#include <map>

#include <fmt/format.h>
#include <nlohmann/json.hpp>

#include "engine/config.h"
#include "engine/host_memory.h"
#include "engine/kv_capacity.h"
#include "engine/kv_pool.h"
#include "models/model.h"
#include "models/safetensors.h"
#include "server/commands/commands.h"
#include "server/commands/table.h"
#include "server/engine_factory.h"

namespace kvarn::commands {
namespace {

using Json = nlohmann::ordered_json;

const CommandSpec kInspect = {
    "inspect",
    "Prints a model's config and tensors, and how many tokens and sequences a KV memory size holds "
    "in each KV cache format. Loads no weights.",
    "  kvarn inspect --model DIR\n"
    "  kvarn inspect --shape qwen3-8b --kv-memory 8GiB           a public shape, without files\n"
    "  kvarn inspect --model DIR --kv-cache-dtype fp16 --json    one format, for machines\n"};

struct InspectOptions {
  std::string model, shape;
  std::string kv_memory;
  std::string kv_cache_dtype = "all";
  int max_model_len = 0;
  bool tensors = true;
  bool json = false;

  static void visit(auto& self, auto&& field) {
    field("model", self.model, "directory with config.json and *.safetensors");
    field("shape", self.shape,
          "public shape instead of a model: qwen3-0.6b, 1.7b, 4b, 8b, 14b or 32b");
    field("kv-memory", self.kv_memory,
          "size of the KV pool, as 8GiB (default: a quarter of free memory, as serve takes)");
    field("kv-cache-dtype", self.kv_cache_dtype,
          "all, or one of auto, fp16, kvarn_k4v2_g128, kvarn_k4v4_g128");
    field("max-model-len", self.max_model_len, "longest context shown; 0: the model's");
    field("tensors", self.tensors, "list the tensors of the files");
    field("json", self.json, "one JSON object on stdout");
  }
};

Json config_json(const ModelConfig& config) {
  Json out = {{"architecture", config.architecture},
              {"num_parameters", config.num_parameters()},
              {"weights_dtype", dtype_name(config.weights_dtype)},
              {"num_layers", config.num_layers},
              {"hidden_size", config.hidden_size},
              {"intermediate_size", config.intermediate_size},
              {"num_q_heads", config.num_q_heads},
              {"num_kv_heads", config.num_kv_heads},
              {"head_dim", config.head_dim},
              {"vocab_size", config.vocab_size},
              {"max_position_embeddings", config.max_position_embeddings},
              {"rope_theta", config.rope_theta},
              {"yarn_factor", nullptr},
              {"tied_embeddings", config.tied_embeddings},
              {"rms_norm_eps", config.rms_norm_eps},
              {"eos_token_ids", config.eos_token_ids}};
  if (config.yarn) out["yarn_factor"] = config.yarn->factor;
  return out;
}

// model.layers.17.mlp.up_proj.weight -> model.layers.*.mlp.up_proj.weight
std::string pattern_of(const std::string& name) {
  std::string out;
  for (size_t i = 0; i < name.size();) {
    size_t end = std::min(name.find('.', i), name.size());
    const std::string part = name.substr(i, end - i);
    const bool number = !part.empty() && std::all_of(part.begin(), part.end(), [](char c) {
      return std::isdigit(static_cast<unsigned char>(c)) != 0;
    });
    out += number ? "*" : part;
    if (end < name.size()) out += '.';
    i = end + 1;
  }
  return out;
}

struct TensorGroup {
  std::string dtype, shape;
  int64_t count = 0;
  uint64_t bytes = 0;
};

// Tensors that differ in nothing but the layer's number are one line.
std::map<std::string, TensorGroup> group_tensors(const Safetensors& files) {
  std::map<std::string, TensorGroup> groups;
  for (const auto& [name, entry] : files.entries()) {
    const std::string shape = shape_text(entry.shape);
    std::string key = pattern_of(name);
    if (const auto it = groups.find(key);
        it != groups.end() && (it->second.shape != shape || it->second.dtype != entry.dtype)) {
      key = name;  // an odd one out
    }
    TensorGroup& group = groups[key];
    group.dtype = entry.dtype;
    group.shape = shape;
    ++group.count;
    group.bytes += entry.bytes;
  }
  return groups;
}

std::vector<int64_t> contexts_up_to(int64_t longest) {
  std::vector<int64_t> contexts;
  for (const int64_t tokens : {1024, 2048, 4096, 8192, 16384, 32768, 65536, 131072}) {
    if (tokens < longest) contexts.push_back(tokens);
  }
  contexts.push_back(longest);
  return contexts;
}

Result<std::vector<KvFormat>> formats_to_show(const InspectOptions& options, int head_dim) {
  if (options.kv_cache_dtype == "all") {
    std::vector<KvFormat> formats = {KvFormat::kFp16};
    if (head_dim == kCodedHeadDim) {
      formats.insert(formats.begin(), {KvFormat::kKvarnK4V2, KvFormat::kKvarnK4V4});
    }
    return formats;
  }
  KVARN_ASSIGN_OR_RETURN(const KvFormat format,
                         resolve_kv_format(options.kv_cache_dtype, head_dim));
  return std::vector<KvFormat>{format};
}

Json kv_json(const ModelConfig& config, const std::vector<KvFormat>& formats, uint64_t memory,
             int64_t longest) {
  Json out = {{"memory_bytes", memory}, {"formats", Json::array()}};
  for (const KvFormat format : formats) {
    const KvLayout layout = make_kv_layout(format, config.head_dim);
    const size_t page_id_bytes =
        KvPool::page_id_bytes(layout, config.num_layers, config.num_kv_heads);
    const auto num_pages = static_cast<int64_t>(memory / page_id_bytes);
    Json rows = Json::array();
    for (const int64_t tokens : contexts_up_to(longest)) {
      const int64_t pages = pages_after_decode(layout, tokens);
      const int64_t peak = peak_pages(layout, tokens);
      const double bytes_per_token = static_cast<double>(pages) *
                                     static_cast<double>(page_id_bytes) /
                                     static_cast<double>(tokens);
      const double dense = 4.0 * config.head_dim * config.num_kv_heads * config.num_layers;
      rows.push_back({{"context", tokens},
                      {"pages", pages},
                      {"peak_pages", peak},
                      {"sequences", num_pages / peak},
                      {"tokens", num_pages / peak * tokens},
                      {"bytes_per_token", bytes_per_token},
                      {"ratio_to_dense_fp16", dense / bytes_per_token}});
    }
    out["formats"].push_back({{"format", kv_format_name(format)},
                              {"page_bytes", layout.page_bytes},
                              {"exact_tokens_per_page", layout.exact_rows},
                              {"page_id_bytes", page_id_bytes},
                              {"num_pages", num_pages},
                              {"pool_bytes", static_cast<uint64_t>(num_pages) * page_id_bytes},
                              {"longest_sequence", longest_sequence(layout, num_pages)},
                              {"rows", std::move(rows)}});
  }
  return out;
}

void print_config(const ModelConfig& config) {
  std::fputs(fmt::format("{}, {:.3f} B parameters, {}\n"
                         "  {} layers, hidden {}, ffn {}, {} query and {} KV heads of {}\n"
                         "  vocabulary {}, context {}, rope theta {}{}, {} head\n",
                         config.architecture, static_cast<double>(config.num_parameters()) / 1e9,
                         dtype_name(config.weights_dtype), config.num_layers, config.hidden_size,
                         config.intermediate_size, config.num_q_heads, config.num_kv_heads,
                         config.head_dim, config.vocab_size, config.max_position_embeddings,
                         config.rope_theta,
                         config.yarn ? fmt::format(", YaRN factor {}", config.yarn->factor) : "",
                         config.tied_embeddings ? "tied" : "untied")
                 .c_str(),
             stdout);
}

void print_tensors(const std::map<std::string, TensorGroup>& groups) {
  Table table({"tensor", "dtype", "shape", "count", "bytes"});
  uint64_t bytes = 0;
  int64_t count = 0;
  for (const auto& [name, group] : groups) {
    table.add(
        {name, group.dtype, group.shape, fmt::format("{}", group.count), bytes_text(group.bytes)});
    bytes += group.bytes;
    count += group.count;
  }
  table.add({"all", "", "", fmt::format("{}", count), bytes_text(bytes)});
  std::fputs(("\nTensors:\n" + table.text()).c_str(), stdout);
}

void print_kv(const Json& kv) {
  std::fputs(
      fmt::format("\nKV memory {}:\n", bytes_text(kv["memory_bytes"].get<uint64_t>())).c_str(),
      stdout);
  for (const Json& format : kv["formats"]) {
    std::fputs(
        fmt::format("\n  {}: {} pages of {} ({} B x layers x KV heads); longest sequence {} "
                    "tokens\n",
                    format["format"].get<std::string>(), format["num_pages"].get<int64_t>(),
                    bytes_text(format["page_id_bytes"].get<uint64_t>()),
                    format["page_bytes"].get<int64_t>(), format["longest_sequence"].get<int64_t>())
            .c_str(),
        stdout);
    Table table({"context", "pages", "at most", "sequences", "tokens", "bytes/token", "vs fp16"});
    for (const Json& row : format["rows"]) {
      table.add({context_text(row["context"].get<int64_t>()),
                 fmt::format("{}", row["pages"].get<int64_t>()),
                 fmt::format("{}", row["peak_pages"].get<int64_t>()),
                 fmt::format("{}", row["sequences"].get<int64_t>()),
                 fmt::format("{}", row["tokens"].get<int64_t>()),
                 fmt::format("{:.0f}", row["bytes_per_token"].get<double>()),
                 fmt::format("{:.2f}x", row["ratio_to_dense_fp16"].get<double>())});
    }
    std::fputs(table.text("    ").c_str(), stdout);
  }
  std::fputs(
      "\n  pages: held by one sequence of that length; at most: its peak on the way there, with "
      "the\n"
      "  page in reserve for the next block to be coded; sequences: of that length side by side.\n",
      stdout);
}

Result<ModelConfig> read_config(const InspectOptions& options) {
  if (options.model.empty() == options.shape.empty()) {
    return Status::invalid_argument("give either --model DIR or --shape, such as --shape qwen3-8b");
  }
  if (!options.shape.empty()) return public_shape(options.shape);
  ModelSource source;
  source.path = options.model;
  return read_model_config(source);
}

Status inspect(const InspectOptions& options) {
  KVARN_ASSIGN_OR_RETURN(const ModelConfig config, read_config(options));
  KVARN_ASSIGN_OR_RETURN(const std::vector<KvFormat> formats,
                         formats_to_show(options, config.head_dim));
  uint64_t memory = available_host_memory() / 4;
  if (!options.kv_memory.empty()) {
    const Result<uint64_t> bytes = parse_bytes(options.kv_memory);
    if (!bytes.is_ok()) {
      return Status::invalid_argument("--kv-memory: " + bytes.status().message());
    }
    memory = *bytes;
  }
  const int64_t longest =
      options.max_model_len > 0 ? options.max_model_len : config.max_position_embeddings;
  const Json kv = kv_json(config, formats, memory, longest);

  std::map<std::string, TensorGroup> groups;
  if (options.tensors && !options.model.empty()) {
    KVARN_ASSIGN_OR_RETURN(const Safetensors files, Safetensors::open_directory(options.model));
    groups = group_tensors(files);
  }
  if (options.json) {
    Json tensors = Json::array();
    for (const auto& [name, group] : groups) {
      tensors.push_back({{"name", name},
                         {"dtype", group.dtype},
                         {"shape", group.shape},
                         {"count", group.count},
                         {"bytes", group.bytes}});
    }
    std::puts(Json({{"model", config_json(config)}, {"tensors", std::move(tensors)}, {"kv", kv}})
                  .dump()
                  .c_str());
    return Status::ok();
  }
  print_config(config);
  if (!groups.empty()) print_tensors(groups);
  print_kv(kv);
  return Status::ok();
}

}  // namespace

int run_inspect(const Invocation& invocation) {
  InspectOptions options;
  Settings settings;
  settings.add(options, "Flags");
  if (const auto exit_code = prepare(kInspect, settings, invocation)) return *exit_code;
  const Status status = inspect(options);
  return status.is_ok() ? kExitOk : fail(kInspect.name, with_source(status, settings));
}

}  // namespace kvarn::commands
