#include "models/model_config.h"

#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <nlohmann/json.hpp>

#include "models/registry.h"

namespace kvarn {
namespace {

using Json = nlohmann::json;

constexpr int kMaxHeadDim = 256;
constexpr int64_t kMaxCount = int64_t{1} << 30;  // keeps every product of two counts inside int64

// Shortens what a hostile file may make long, for messages.
std::string shown(const Json& value) {
  std::string text = value.dump(-1, ' ', false, Json::error_handler_t::replace);
  if (text.size() > 80) text = text.substr(0, 77) + "...";
  return text;
}

// Reads typed keys of one object; the first failure is kept and every message names file and key.
class KeyReader {
 public:
  KeyReader(const Json& object, std::string_view origin, std::string prefix = {})
      : object_(object), origin_(origin), prefix_(std::move(prefix)) {}

  bool has(const char* key) const { return object_.contains(key) && !object_.at(key).is_null(); }
  const Json* find(const char* key) const { return has(key) ? &object_.at(key) : nullptr; }

  int count(const char* key, int64_t low, int64_t high) {
    const Json* value = require(key);
    if (value == nullptr) return 0;
    if (!value->is_number_integer() || value->get<double>() < static_cast<double>(low) ||
        value->get<double>() > static_cast<double>(high)) {
      fail(key,
           fmt::format("must be an integer from {} to {}, found {}", low, high, shown(*value)));
      return 0;
    }
    return static_cast<int>(value->get<int64_t>());
  }
  double positive(const char* key) {
    const Json* value = require(key);
    if (value == nullptr) return 0;
    const double number = value->is_number() ? value->get<double>() : 0;
    if (!(number > 0) || !std::isfinite(number)) {
      fail(key, fmt::format("must be a number above 0, found {}", shown(*value)));
      return 0;
    }
    return number;
  }
  double positive_or(const char* key, double fallback) {
    return has(key) ? positive(key) : fallback;
  }
  bool flag_or(const char* key, bool fallback) {
    const Json* value = find(key);
    if (value == nullptr) return fallback;
    if (!value->is_boolean()) {
      fail(key, fmt::format("must be true or false, found {}", shown(*value)));
      return fallback;
    }
    return value->get<bool>();
  }
  void fail(const char* key, const std::string& what) {
    if (status_) {
      status_ =
          Status::invalid_argument(fmt::format("{}: \"{}{}\" {}", origin_, prefix_, key, what));
    }
  }
  const Status& status() const { return status_; }

 private:
  const Json* require(const char* key) {
    const Json* value = find(key);
    if (value == nullptr) {
      fail(key, "is missing; take the config.json that came with the weights");
    }
    return value;
  }

  const Json& object_;
  std::string_view origin_;
  std::string prefix_;
  Status status_;
};

Status parse_architecture(KeyReader& reader, ModelConfig& config) {
  const Json* names = reader.find("architectures");
  if (names == nullptr || !names->is_array() || names->size() != 1 || !names->front().is_string()) {
    reader.fail("architectures",
                fmt::format("must be a list of one name, such as [\"Qwen3ForCausalLM\"], found {}",
                            names == nullptr ? "nothing" : shown(*names)));
    return reader.status();
  }
  config.architecture = names->front().get<std::string>();
  return Status::ok();
}

// Refuses what would change the result if it were ignored.
void refuse_unsupported(KeyReader& reader) {
  if (reader.has("quantization_config")) {
    reader.fail("quantization_config",
                "is set: quantised weights are not supported in this version; take the bf16, fp16 "
                "or fp32 weights of this model");
  }
  if (const Json* act = reader.find("hidden_act"); act != nullptr && *act != "silu") {
    reader.fail("hidden_act", fmt::format("must be \"silu\", found {}", shown(*act)));
  }
  if (reader.flag_or("attention_bias", false)) {
    reader.fail("attention_bias",
                "is true: attention biases are not supported in this version; Qwen3 dense models "
                "have none");
  }
  if (reader.flag_or("use_sliding_window", false)) {
    reader.fail("use_sliding_window",
                "is true: sliding-window attention is not supported in this version; full "
                "attention (false) is what Qwen3 models ship with");
  }
  if (const Json* types = reader.find("layer_types"); types != nullptr) {
    const bool all_full =
        types->is_array() && std::all_of(types->begin(), types->end(),
                                         [](const Json& type) { return type == "full_attention"; });
    if (!all_full) {
      reader.fail("layer_types",
                  fmt::format("may only hold \"full_attention\", found {}", shown(*types)));
    }
  }
}

// rope_scaling of transformers 4, or the rope_parameters (with rope_theta inside) of version 5.
Status parse_rope(KeyReader& reader, std::string_view origin, ModelConfig& config) {
  const char* key = reader.has("rope_parameters") ? "rope_parameters" : "rope_scaling";
  const Json* scaling = reader.find(key);
  if (scaling != nullptr && !scaling->is_object()) {
    reader.fail(key, fmt::format("must be null or an object, found {}", shown(*scaling)));
    return reader.status();
  }
  const Json none = Json::object();
  KeyReader rope(scaling != nullptr ? *scaling : none, origin, std::string(key) + ".");
  config.rope_theta =
      rope.has("rope_theta") ? rope.positive("rope_theta") : reader.positive("rope_theta");
  if (config.rope_theta == 1.0) reader.fail("rope_theta", "must not be 1");
  if (rope.has("partial_rotary_factor") && rope.positive("partial_rotary_factor") != 1.0) {
    rope.fail("partial_rotary_factor", "must be 1: Qwen3 rotates whole heads");
  }

  const char* type_key = rope.has("rope_type") ? "rope_type" : "type";
  const Json* type = rope.find(type_key);
  if (type != nullptr && *type != "default") {
    if (*type != "yarn") {
      rope.fail(type_key, fmt::format("must be \"default\" or \"yarn\", found {}; remove {} to run "
                                      "at the model's trained context",
                                      shown(*type), key));
      return rope.status();
    }
    YarnScaling yarn;
    yarn.factor = rope.positive("factor");
    yarn.original_max_position_embeddings =
        rope.has("original_max_position_embeddings")
            ? rope.count("original_max_position_embeddings", 1, kMaxCount)
            : config.max_position_embeddings;
    yarn.beta_fast = rope.positive_or("beta_fast", yarn.beta_fast);
    yarn.beta_slow = rope.positive_or("beta_slow", yarn.beta_slow);
    if (rope.has("attention_factor")) yarn.attention_factor = rope.positive("attention_factor");
    if (yarn.factor < 1.0)
      rope.fail("factor", fmt::format("must be at least 1, found {}", yarn.factor));
    if (rope.has("mscale") || rope.has("mscale_all_dim")) {
      rope.fail(rope.has("mscale") ? "mscale" : "mscale_all_dim",
                "is not supported; set attention_factor instead");
    }
    if (!rope.flag_or("truncate", true)) rope.fail("truncate", "must be true");
    KVARN_RETURN_IF_ERROR(rope.status());
    // The scaling exists to reach this context, whatever the config says it was trained on.
    const double reach = yarn.factor * yarn.original_max_position_embeddings;
    if (reach > static_cast<double>(kMaxCount)) {
      rope.fail("factor", fmt::format("times original_max_position_embeddings is {}, above {}",
                                      reach, kMaxCount));
    }
    config.max_position_embeddings =
        std::max(config.max_position_embeddings, static_cast<int>(reach));
    config.yarn = yarn;
  }
  return rope.status();
}

void parse_weights_dtype(KeyReader& reader, ModelConfig& config) {
  const char* key = reader.has("dtype") ? "dtype" : "torch_dtype";
  const Json* dtype = reader.find(key);
  if (dtype == nullptr || *dtype == "bfloat16" || *dtype == "auto") {
    config.weights_dtype = DType::kBF16;
  } else if (*dtype == "float16") {
    config.weights_dtype = DType::kF16;
  } else if (*dtype == "float32") {
    config.weights_dtype = DType::kF32;
  } else {
    reader.fail(key, fmt::format("must be \"bfloat16\", \"float16\" or \"float32\", found {}",
                                 shown(*dtype)));
  }
}

void parse_eos(KeyReader& reader, ModelConfig& config) {
  const Json* eos = reader.find("eos_token_id");
  if (eos == nullptr) return;
  const Json list = eos->is_array() ? *eos : Json::array({*eos});
  for (const Json& id : list) {
    if (!id.is_number_integer() || id.get<double>() < 0 || id.get<double>() >= config.vocab_size) {
      reader.fail("eos_token_id", fmt::format("must be token ids from 0 to {}, found {}",
                                              config.vocab_size - 1, shown(id)));
      return;
    }
    config.eos_token_ids.push_back(id.get<int32_t>());
  }
}

}  // namespace

int64_t ModelConfig::num_parameters() const {
  const int64_t hidden = hidden_size, heads = num_q_heads + 2 * int64_t{num_kv_heads};
  const int64_t attention = hidden * heads * head_dim + int64_t{num_q_heads} * head_dim * hidden;
  const int64_t norms = 2 * hidden + 2 * int64_t{head_dim};
  const int64_t layer = attention + 3 * hidden * intermediate_size + norms;
  return (tied_embeddings ? 1 : 2) * int64_t{vocab_size} * hidden + num_layers * layer + hidden;
}

Result<ModelConfig> parse_model_config(std::string_view json, std::string_view origin) {
  const Json root = Json::parse(json, nullptr, /*allow_exceptions=*/false);
  if (!root.is_object()) {
    return Status::invalid_argument(fmt::format(
        "{}: not a JSON object; take the config.json that came with the weights", origin));
  }
  KeyReader reader(root, origin);
  ModelConfig config;
  KVARN_RETURN_IF_ERROR(parse_architecture(reader, config));
  if (find_model_factory(config.architecture) == nullptr) {
    return Status::invalid_argument(
        fmt::format("{}: \"architectures\" names {}; this version runs {}", origin,
                    shown(Json(config.architecture)), supported_architectures()));
  }
  refuse_unsupported(reader);
  config.vocab_size = reader.count("vocab_size", 1, 1 << 24);
  config.hidden_size = reader.count("hidden_size", 1, 1 << 20);
  config.intermediate_size = reader.count("intermediate_size", 1, 1 << 20);
  config.num_layers = reader.count("num_hidden_layers", 1, 1 << 10);
  config.num_q_heads = reader.count("num_attention_heads", 1, 1 << 10);
  config.num_kv_heads = reader.count("num_key_value_heads", 1, 1 << 10);
  config.head_dim = reader.count("head_dim", 1, kMaxHeadDim);
  config.max_position_embeddings = reader.count("max_position_embeddings", 1, kMaxCount);
  config.rms_norm_eps = reader.positive("rms_norm_eps");
  config.tied_embeddings = reader.flag_or("tie_word_embeddings", false);
  KVARN_RETURN_IF_ERROR(reader.status());

  if (config.num_q_heads % config.num_kv_heads != 0) {
    reader.fail("num_attention_heads",
                fmt::format("= {} must be a multiple of num_key_value_heads = {}",
                            config.num_q_heads, config.num_kv_heads));
  }
  if (config.head_dim % 8 != 0) {
    reader.fail("head_dim", fmt::format("must be a multiple of 8 up to {}, found {}", kMaxHeadDim,
                                        config.head_dim));
  }
  KVARN_RETURN_IF_ERROR(parse_rope(reader, origin, config));
  parse_weights_dtype(reader, config);
  parse_eos(reader, config);
  KVARN_RETURN_IF_ERROR(reader.status());
  return config;
}

namespace {

struct PublicShape {
  const char* name;
  int layers, q_heads, hidden, ffn;
  bool tied;
};
// From the public configurations; all: 8 KV heads, head_dim 128, vocabulary 151936, theta 1e6.
constexpr std::array<PublicShape, 6> kPublicShapes = {{
    {"qwen3-0.6b", 28, 16, 1024, 3072, true},
    {"qwen3-1.7b", 28, 16, 2048, 6144, true},
    {"qwen3-4b", 36, 32, 2560, 9728, true},
    {"qwen3-8b", 36, 32, 4096, 12288, false},
    {"qwen3-14b", 40, 40, 5120, 17408, false},
    {"qwen3-32b", 64, 64, 5120, 25600, false},
}};

}  // namespace

Result<ModelConfig> public_shape(std::string_view name) {
  std::string known;
  for (const PublicShape& shape : kPublicShapes) {
    if (name == shape.name) {
      ModelConfig config;
      config.architecture = "Qwen3ForCausalLM";
      config.vocab_size = 151936;
      config.hidden_size = shape.hidden;
      config.intermediate_size = shape.ffn;
      config.num_layers = shape.layers;
      config.num_q_heads = shape.q_heads;
      config.num_kv_heads = 8;
      config.head_dim = 128;
      config.max_position_embeddings = 40960;
      config.rope_theta = 1e6;
      config.rms_norm_eps = 1e-6;
      config.tied_embeddings = shape.tied;
      config.eos_token_ids = {151645};
      return config;
    }
    known += fmt::format("{}{}", known.empty() ? "" : ", ", shape.name);
  }
  return Status::invalid_argument(
      fmt::format("unknown --shape \"{}\"; known shapes are {}", name.substr(0, 80), known));
}

}  // namespace kvarn
