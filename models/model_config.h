// config.json of a Qwen3-family model as a checked struct, and the public shapes for dummy weights.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "kernels/core/dtype.h"
#include "kernels/core/status.h"

namespace kvarn {

struct YarnScaling {
  double factor = 1.0;
  int original_max_position_embeddings = 0;
  double beta_fast = 32.0, beta_slow = 1.0;
  std::optional<double> attention_factor;  // unset: 0.1 ln(factor) + 1
};

struct ModelConfig {
  std::string architecture;  // "Qwen3ForCausalLM"
  int vocab_size = 0;
  int hidden_size = 0;
  int intermediate_size = 0;
  int num_layers = 0;
  int num_q_heads = 0;
  int num_kv_heads = 0;
  int head_dim = 0;
  int max_position_embeddings = 0;
  double rope_theta = 10000.0;
  std::optional<YarnScaling> yarn;
  double rms_norm_eps = 1e-6;
  bool tied_embeddings = false;
  bool attention_bias = false;
  DType weights_dtype = DType::kBF16;
  std::vector<int32_t> eos_token_ids;  // of config.json

  int64_t num_parameters() const;
};

// Every error names the key, what is allowed and what was found. `origin` is the file's name for
// messages.
Result<ModelConfig> parse_model_config(std::string_view json, std::string_view origin);
// "qwen3-0.6b", "1.7b", "4b", "8b", "14b", "32b" with that prefix; an error lists them.
Result<ModelConfig> public_shape(std::string_view name);

}  // namespace kvarn
