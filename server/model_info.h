// What the server knows about the model it serves: names, lengths, sampling defaults, features.
// Filled once after loading, immutable then. No paths of the host: all of it may be shown to
// clients.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "kernels/core/status.h"

namespace kvarn {

// `generation_config.json` of the model, or the API's defaults where it has none ("gc" of the
// docs).
struct SamplingDefaults {
  double temperature = 1.0, top_p = 1.0, min_p = 0.0, repetition_penalty = 1.0;
  int64_t top_k = 0;
  std::optional<int64_t> max_new_tokens;
};

struct FeatureInfo {
  std::string name;
  bool enabled = false;
  std::string reason;  // one sentence where it is off, else empty
};

struct ModelInfo {
  std::vector<std::string> served_names;  // never empty; the first is the default
  std::string architecture;
  int64_t num_parameters = 0;
  std::string weights_dtype;
  int32_t vocab_size = 0;
  int32_t max_model_len = 0;
  std::string rope_scaling_type;  // "yarn" or empty
  double rope_scaling_factor = 1.0;

  std::string kv_cache_dtype;  // "kvarn_k4v2_g128", "fp16", ...
  int32_t block_size = 128;
  int64_t kv_capacity_tokens = 0;  // of the pool filled with sequences of full length
  int64_t total_kv_blocks = 0;     // that / block_size
  double max_concurrency = 0;      // sequences of full length that fit
  int64_t kv_bytes_per_token_dense = 0;
  double kv_bytes_per_token_compressed = 0;
  double compression_at_context_length = 1;
  uint64_t page_id_bytes = 0;   // bytes of one page id over layers and heads
  int32_t page_bytes = 0;       // of one (layer, KV head)
  int32_t tile_code_bytes = 0;  // of a coded page: codes; the rest are scales. 0: not coded

  std::vector<int32_t> eos_token_ids;  // generation_config.json and the tokenizer's
  SamplingDefaults sampling;
  std::string reasoning_parser = "none";  // what auto resolved to
  std::string tool_call_parser = "none";
  std::vector<FeatureInfo> features;
  int32_t tensor_parallel_size = 1;
  int32_t max_num_seqs = 0, max_queued_requests = 0, max_num_batched_tokens = 0;
  bool enable_prefix_caching = true;
  double gpu_memory_utilization = 0.9;

  int64_t created = 0;             // seconds since the epoch: when loading ended
  std::string system_fingerprint;  // equal values: equal text from equal seeds
  std::string backend;             // "cpu (avx512_bf16, 2 threads)"

  bool serves(const std::string& name) const {
    for (const std::string& served : served_names) {
      if (served == name) return true;
    }
    return false;
  }
};

struct EngineConfig;
struct LoadedEngine;
struct ServerConfig;
class ChatTemplate;
class Tokenizer;

// --served-model-name, else the directory's name, else the shape's. Never empty.
std::vector<std::string> served_model_names(const EngineConfig& config);
// Reads generation_config.json and tokenizer_config.json beside the weights. Errors name the file,
// the key and what is allowed. `chat_template` may be null.
Result<ModelInfo> make_model_info(const EngineConfig& engine_config,
                                  const ServerConfig& server_config, const LoadedEngine& loaded,
                                  const Tokenizer& tokenizer, const ChatTemplate* chat_template);

// One source of sampling defaults and EOS ids: the text of a generation_config.json. `origin` is
// its name in errors. Members that mean nothing here are ignored.
struct GenerationConfig {
  SamplingDefaults sampling;
  std::vector<int32_t> eos_token_ids;
};
Result<GenerationConfig> parse_generation_config(const std::string& json,
                                                 const std::string& origin);

}  // namespace kvarn
