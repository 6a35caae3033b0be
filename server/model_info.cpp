#include "server/model_info.h"

#include <algorithm>
#include <chrono>
#include <filesystem>
#include <fstream>
#include <sstream>

#include <fmt/format.h>
#include <nlohmann/json.hpp>

#include "engine/config.h"
#include "engine/kv_capacity.h"
#include "engine/tokenizer/tokenizer.h"
#include "server/build_info.h"
#include "server/chat_template.h"
#include "server/engine_factory.h"
#include "server/server_config.h"

namespace kvarn {
namespace {

using Json = nlohmann::json;
namespace fs = std::filesystem;

Status file_error(const std::string& origin, const std::string& message) {
  return Status::invalid_argument(fmt::format("{}: {}", origin, message));
}

std::optional<std::string> read_file(const fs::path& path) {
  std::ifstream file(path, std::ios::binary);
  if (!file) return std::nullopt;
  std::ostringstream text;
  text << file.rdbuf();
  return text.str();
}

// A number within [low, high], or `otherwise` where the key is absent or null.
Result<double> number_or(const Json& json, const std::string& origin, const char* key,
                         double otherwise, double low, double high) {
  const auto member = json.find(key);
  if (member == json.end() || member->is_null()) return otherwise;
  if (!member->is_number()) {
    return file_error(origin,
                      fmt::format("'{}' must be a number, got {}", key, member->type_name()));
  }
  const double value = member->get<double>();
  if (value >= low && value <= high) return value;
  return file_error(origin, fmt::format("'{}' must be {}..{}, got {} (or start with "
                                        "--no-generation-config)",
                                        key, low, high, value));
}

Status read_eos(const Json& json, const std::string& origin, std::vector<int32_t>& ids) {
  const auto member = json.find("eos_token_id");
  if (member == json.end() || member->is_null()) return Status::ok();
  const Json list = member->is_array() ? *member : Json::array({*member});
  for (const Json& id : list) {
    if (!id.is_number_integer() || id.get<int64_t>() < 0 || id.get<int64_t>() > INT32_MAX) {
      return file_error(origin, "'eos_token_id' must be a token id or a list of them");
    }
    ids.push_back(id.get<int32_t>());
  }
  return Status::ok();
}

// The tokenizer's own EOS: tokenizer_config.json names it by text.
std::optional<int32_t> tokenizer_eos(const fs::path& model_dir, const Tokenizer& tokenizer) {
  const std::optional<std::string> text = read_file(model_dir / "tokenizer_config.json");
  if (!text.has_value()) return std::nullopt;
  const Json json = Json::parse(*text, nullptr, /*allow_exceptions=*/false);
  if (!json.is_object()) return std::nullopt;
  Json eos = json.value("eos_token", Json());
  if (eos.is_object()) eos = eos.value("content", Json());
  return eos.is_string() ? tokenizer.added_token_id(eos.get<std::string>()) : std::nullopt;
}

class Fnv {
 public:
  void add(std::string_view bytes) {
    for (const char byte : bytes) {
      hash_ = (hash_ ^ static_cast<unsigned char>(byte)) * 0x100000001b3u;
    }
  }
  uint64_t value() const { return hash_; }

 private:
  uint64_t hash_ = 0xcbf29ce484222325u;
};

// The weights by name, size and both ends of each file: the head of a safetensors file holds every
// tensor's name, dtype and place. Reading all of a large model would double its start-up time.
void add_weights(Fnv& hash, const fs::path& model_dir) {
  constexpr std::streamoff kEnd = 64 * 1024;
  std::vector<fs::path> files;
  std::error_code error;
  for (const auto& entry : fs::directory_iterator(model_dir, error)) {
    if (entry.path().extension() == ".safetensors") files.push_back(entry.path());
  }
  std::sort(files.begin(), files.end());
  for (const fs::path& path : files) {
    const uintmax_t size = fs::file_size(path, error);
    hash.add(fmt::format("{}:{}", path.filename().string(), size));
    std::ifstream file(path, std::ios::binary);
    std::string bytes(static_cast<size_t>(kEnd), '\0');
    for (const bool tail : {false, true}) {
      const auto from = tail ? std::max<std::streamoff>(0, static_cast<std::streamoff>(size) - kEnd)
                             : std::streamoff{0};
      file.clear();
      file.seekg(from);
      file.read(bytes.data(), kEnd);
      hash.add(std::string_view(bytes).substr(0, static_cast<size_t>(file.gcount())));
    }
  }
}

std::string fingerprint(const ModelInfo& info, const LoadedEngine& loaded) {
  Fnv hash;
  const ModelConfig& m = loaded.model_config;
  hash.add(fmt::format("{} {} {} {} {} {} {} {} {} {} {} {}", build_info().version, m.architecture,
                       m.vocab_size, m.hidden_size, m.intermediate_size, m.num_layers,
                       m.num_q_heads, m.num_kv_heads, m.head_dim, m.rope_theta, info.kv_cache_dtype,
                       info.tensor_parallel_size));
  if (!loaded.model_dir.empty()) add_weights(hash, loaded.model_dir);
  return fmt::format("kvarn-{}-{:08x}", build_info().version,
                     static_cast<uint32_t>(hash.value() ^ (hash.value() >> 32)));
}

void fill_capacity(ModelInfo& info, const LoadedEngine& loaded) {
  const KvLayout& layout = loaded.kv_layout;
  const ModelConfig& model = loaded.model_config;
  const int64_t heads = int64_t{model.num_layers} * model.num_kv_heads;
  const int64_t length = info.max_model_len;
  info.kv_cache_dtype = kv_format_name(layout.format);
  info.block_size = kBlockTokens;
  info.page_bytes = layout.page_bytes;
  info.page_id_bytes = static_cast<uint64_t>(heads) * static_cast<uint64_t>(layout.page_bytes);
  if (layout.coded()) {
    const TileLayout& tile = layout.tile();
    info.tile_code_bytes = kCodedHeadDim * kBlockTokens * (tile.k_bits + tile.v_bits) / 8;
  }
  const int64_t num_pages = loaded.memory_plan.num_pages;
  info.kv_capacity_tokens = loaded.engine->stats().capacity_tokens;
  info.total_kv_blocks = info.kv_capacity_tokens / kBlockTokens;
  info.max_concurrency =
      static_cast<double>(num_pages) / static_cast<double>(peak_pages(layout, length));
  info.kv_bytes_per_token_dense = 4 * int64_t{model.head_dim} * heads;
  info.kv_bytes_per_token_compressed = layout.coded()
                                           ? static_cast<double>(info.page_id_bytes) / kBlockTokens
                                           : static_cast<double>(info.kv_bytes_per_token_dense);
  info.compression_at_context_length = static_cast<double>(length * info.kv_bytes_per_token_dense) /
                                       (static_cast<double>(pages_after_prefill(layout, length)) *
                                        static_cast<double>(info.page_id_bytes));
}

std::vector<FeatureInfo> features_of(const EngineConfig& config, const LoadedEngine& loaded) {
  const bool coded = loaded.kv_layout.coded();
  const bool cached = config.enable_prefix_caching;
  const char* later = "It belongs to a later stage.";
  return {
      {"kv_compression", coded,
       coded ? "" : "The KV cache is fp16: --kv-cache-dtype says so, or head_dim is not 128."},
      {"prefix_cache", cached, cached ? "" : "Started with --no-enable-prefix-caching."},
      {"chunked_prefill", true, ""},
      {"cuda_graphs", loaded.on_gpu, loaded.on_gpu ? "" : "The backend is the CPU."},
      {"structured_output", false, later},
      {"strict_tools", false, later},
      {"logprobs", true, ""},
      {"speculative_decoding", false, later},
      {"lora", false, later},
  };
}

std::string reasoning_parser_of(const ServerConfig& config, const ChatTemplate* chat_template) {
  if (config.reasoning_parser != "auto") return config.reasoning_parser;
  const bool thinks =
      chat_template != nullptr && chat_template->source().find("<think>") != std::string_view::npos;
  return thinks ? "qwen3" : "none";
}

}  // namespace

std::vector<std::string> served_model_names(const EngineConfig& config) {
  std::vector<std::string> names;
  std::istringstream list(config.served_model_name);
  for (std::string name; std::getline(list, name, ',');) {
    if (!name.empty()) names.push_back(name);
  }
  if (!names.empty()) return names;
  std::error_code error;
  fs::path directory = fs::weakly_canonical(config.model, error);
  if (error || config.model.empty()) directory = config.model;
  if (!directory.has_filename()) directory = directory.parent_path();
  const std::string name = directory.filename().string();
  if (!name.empty()) return {name};
  return {config.shape.empty() ? "model" : config.shape};
}

Result<GenerationConfig> parse_generation_config(const std::string& text,
                                                 const std::string& origin) {
  const Json json = Json::parse(text, nullptr, /*allow_exceptions=*/false);
  if (!json.is_object()) return file_error(origin, "not a JSON object");
  GenerationConfig out;
  SamplingDefaults& sampling = out.sampling;
  KVARN_ASSIGN_OR_RETURN(sampling.temperature, number_or(json, origin, "temperature", 1, 0, 2));
  KVARN_ASSIGN_OR_RETURN(sampling.top_p, number_or(json, origin, "top_p", 1, 0, 1));
  KVARN_ASSIGN_OR_RETURN(sampling.min_p, number_or(json, origin, "min_p", 0, 0, 1));
  KVARN_ASSIGN_OR_RETURN(sampling.repetition_penalty,
                         number_or(json, origin, "repetition_penalty", 1, 1e-6, 10));
  KVARN_ASSIGN_OR_RETURN(const double top_k, number_or(json, origin, "top_k", 0, -1, 1e9));
  sampling.top_k = static_cast<int64_t>(top_k);
  KVARN_ASSIGN_OR_RETURN(const double limit, number_or(json, origin, "max_new_tokens", 0, 0, 1e9));
  if (limit >= 1) sampling.max_new_tokens = static_cast<int64_t>(limit);
  KVARN_RETURN_IF_ERROR(read_eos(json, origin, out.eos_token_ids));
  return out;
}

Result<ModelInfo> make_model_info(const EngineConfig& engine_config,
                                  const ServerConfig& server_config, const LoadedEngine& loaded,
                                  const Tokenizer& tokenizer, const ChatTemplate* chat_template) {
  ModelInfo info;
  const ModelConfig& model = loaded.model_config;
  info.served_names = served_model_names(engine_config);
  info.architecture = model.architecture;
  info.num_parameters = model.num_parameters();
  info.weights_dtype = dtype_name(model.weights_dtype);
  info.vocab_size = model.vocab_size;
  info.max_model_len = loaded.engine->max_model_len();
  if (model.yarn.has_value()) {
    info.rope_scaling_type = "yarn";
    info.rope_scaling_factor = model.yarn->factor;
  }
  fill_capacity(info, loaded);

  const fs::path generation_path = loaded.model_dir / "generation_config.json";
  if (const auto text = read_file(generation_path)) {
    KVARN_ASSIGN_OR_RETURN(GenerationConfig generation,
                           parse_generation_config(*text, generation_path.string()));
    if (server_config.generation_config) info.sampling = generation.sampling;
    info.eos_token_ids = std::move(generation.eos_token_ids);
  }
  if (info.eos_token_ids.empty()) info.eos_token_ids = model.eos_token_ids;
  if (const auto eos = tokenizer_eos(loaded.model_dir, tokenizer)) {
    info.eos_token_ids.push_back(*eos);
  }
  std::sort(info.eos_token_ids.begin(), info.eos_token_ids.end());
  info.eos_token_ids.erase(std::unique(info.eos_token_ids.begin(), info.eos_token_ids.end()),
                           info.eos_token_ids.end());
  for (const int32_t id : info.eos_token_ids) {
    if (id < model.vocab_size) continue;
    return Status::invalid_argument(fmt::format(
        "end-of-sequence id {} of {} is outside the vocabulary of {} tokens in config.json", id,
        loaded.model_dir.string(), model.vocab_size));
  }
  if (tokenizer.vocab_size() > model.vocab_size) {
    return Status::invalid_argument(fmt::format(
        "{} has {} tokens, the model only {} (vocab_size of config.json): they do not belong "
        "together",
        loaded.tokenizer_path.string(), tokenizer.vocab_size(), model.vocab_size));
  }

  info.reasoning_parser = reasoning_parser_of(server_config, chat_template);
  info.features = features_of(engine_config, loaded);
  info.tensor_parallel_size = engine_config.tensor_parallel_size;
  info.max_num_seqs = engine_config.max_num_seqs;
  info.max_queued_requests = engine_config.max_queued_requests;
  info.max_num_batched_tokens = token_budget(loaded.config);
  info.enable_prefix_caching = engine_config.enable_prefix_caching;
  info.gpu_memory_utilization = engine_config.gpu_memory_utilization;
  info.created = std::chrono::duration_cast<std::chrono::seconds>(
                     std::chrono::system_clock::now().time_since_epoch())
                     .count();
  info.backend = loaded.backend_name;
  info.system_fingerprint = fingerprint(info, loaded);
  return info;
}

}  // namespace kvarn
