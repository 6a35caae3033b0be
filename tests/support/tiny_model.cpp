#include "tests/support/tiny_model.h"

#include <fmt/format.h>
#include <unistd.h>

#include <cmath>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <iterator>
#include <stdexcept>

namespace kvarn::test {
namespace {

namespace fs = std::filesystem;

uint64_t hash_name(const std::string& name) {  // FNV-1a
  uint64_t hash = 0xcbf29ce484222325u;
  for (const char c : name) hash = (hash ^ static_cast<unsigned char>(c)) * 0x100000001b3u;
  return hash;
}

uint64_t mix(uint64_t x) {  // splitmix64
  x += 0x9e3779b97f4a7c15u;
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9u;
  x = (x ^ (x >> 27)) * 0x94d049bb133111ebu;
  return x ^ (x >> 31);
}

// Amplitudes that keep activations near 1 through the layers and logits within a few units. The
// embedding is small, so that what the layers add decides the logits and an error in them shows.
double amplitude(const std::string& name, const std::vector<int64_t>& shape) {
  if (name.ends_with("embed_tokens.weight") || name == "lm_head.weight") return 0.5;
  return std::sqrt(3.0 / static_cast<double>(shape.back()));
}

double element(const std::string& name, const std::vector<int64_t>& shape, uint64_t seed,
               uint64_t index) {
  const uint64_t bits = mix((hash_name(name) ^ seed) + index) >> 40;
  const double unit = static_cast<double>(bits) * 0x1p-23 - 1.0;                // [-1, 1)
  return shape.size() > 1 ? unit * amplitude(name, shape) : 1.0 + 0.25 * unit;  // norm gains
}

RawTensor make_tensor(const std::string& name, const std::vector<int64_t>& shape, uint64_t seed,
                      DType dtype) {
  RawTensor tensor{name,
                   dtype == DType::kBF16  ? "BF16"
                   : dtype == DType::kF16 ? "F16"
                                          : "F32",
                   shape,
                   {}};
  uint64_t count = 1;
  for (const int64_t extent : shape) count *= static_cast<uint64_t>(extent);
  tensor.bytes.resize(count * dtype_bytes(dtype));
  for (uint64_t i = 0; i < count; ++i) {
    // Always a bf16 value, so that models of every dtype hold the same numbers (fp16 has them
    // all above 2^-14; smaller ones move by less than 2^-25).
    const bf16 value = to_bf16(static_cast<float>(element(name, shape, seed, i)));
    const float wide = to_float(value);
    const half narrow = to_half(wide);
    const void* source = dtype == DType::kBF16  ? static_cast<const void*>(&value)
                         : dtype == DType::kF16 ? static_cast<const void*>(&narrow)
                                                : static_cast<const void*>(&wide);
    std::memcpy(tensor.bytes.data() + i * dtype_bytes(dtype), source, dtype_bytes(dtype));
  }
  return tensor;
}

}  // namespace

TempDir::TempDir() {
  std::string pattern = (fs::temp_directory_path() / "kvarn_test_XXXXXX").string();
  if (mkdtemp(pattern.data()) == nullptr) throw std::runtime_error("mkdtemp failed");
  path_ = pattern;
}

TempDir::~TempDir() {
  std::error_code ignored;
  fs::remove_all(path_, ignored);
}

void write_file(const fs::path& path, const std::string& bytes) {
  fs::remove(path);  // truncating a file makes some file systems flush it: slow in a loop
  std::ofstream out(path, std::ios::binary);
  out.write(bytes.data(), static_cast<std::streamsize>(bytes.size()));
  if (!out) throw std::runtime_error("cannot write " + path.string());
}

std::string read_file(const fs::path& path) {
  std::ifstream in(path, std::ios::binary);
  if (!in) throw std::runtime_error("cannot read " + path.string());
  return {std::istreambuf_iterator<char>(in), {}};
}

std::string safetensors_bytes(const std::string& header_json, const std::string& data) {
  std::string file(sizeof(uint64_t), '\0');
  const uint64_t length = header_json.size();
  std::memcpy(file.data(), &length, sizeof(length));
  return file + header_json + data;
}

std::string safetensors_bytes(const std::vector<RawTensor>& tensors) {
  std::string header = R"({"__metadata__":{"format":"pt"})";
  std::string data;
  for (const RawTensor& tensor : tensors) {
    header += fmt::format(R"(,"{}":{{"dtype":"{}","shape":[{}],"data_offsets":[{},{}]}})",
                          tensor.name, tensor.dtype, fmt::join(tensor.shape, ","), data.size(),
                          data.size() + tensor.bytes.size());
    data += tensor.bytes;
  }
  header += '}';
  while (header.size() % 8 != 0) header += ' ';
  return safetensors_bytes(header, data);
}

std::string tiny_config_json(const TinyModelOptions& o) {
  return fmt::format(
      R"({{"architectures":["Qwen3ForCausalLM"],"model_type":"qwen3","vocab_size":{},
"hidden_size":{},"intermediate_size":{},"num_hidden_layers":{},"num_attention_heads":{},
"num_key_value_heads":{},"head_dim":{},"hidden_act":"silu","max_position_embeddings":{},
"rope_theta":{},"rms_norm_eps":{},"tie_word_embeddings":{},"attention_bias":false,
"use_sliding_window":false,"rope_scaling":{},"torch_dtype":"bfloat16","eos_token_id":{}}}
)",
      o.vocab_size, o.hidden_size, o.intermediate_size, o.num_layers, o.num_q_heads, o.num_kv_heads,
      o.head_dim, o.max_position_embeddings, o.rope_theta, o.rms_norm_eps, o.tied_embeddings,
      o.rope_scaling, o.eos_token_id);
}

std::vector<RawTensor> tiny_tensors(const ModelConfig& config, uint64_t seed, DType dtype) {
  std::vector<RawTensor> tensors;
  const auto add = [&](const std::string& name, std::vector<int64_t> shape) {
    tensors.push_back(make_tensor(name, shape, seed, dtype));
  };
  const int64_t hidden = config.hidden_size, ffn = config.intermediate_size;
  const int64_t q = int64_t{config.num_q_heads} * config.head_dim;
  const int64_t kv = int64_t{config.num_kv_heads} * config.head_dim;
  add("model.embed_tokens.weight", {config.vocab_size, hidden});
  for (int l = 0; l < config.num_layers; ++l) {
    const std::string prefix = fmt::format("model.layers.{}.", l);
    add(prefix + "input_layernorm.weight", {hidden});
    add(prefix + "self_attn.q_proj.weight", {q, hidden});
    add(prefix + "self_attn.k_proj.weight", {kv, hidden});
    add(prefix + "self_attn.v_proj.weight", {kv, hidden});
    add(prefix + "self_attn.o_proj.weight", {hidden, q});
    add(prefix + "self_attn.q_norm.weight", {config.head_dim});
    add(prefix + "self_attn.k_norm.weight", {config.head_dim});
    add(prefix + "post_attention_layernorm.weight", {hidden});
    add(prefix + "mlp.gate_proj.weight", {ffn, hidden});
    add(prefix + "mlp.up_proj.weight", {ffn, hidden});
    add(prefix + "mlp.down_proj.weight", {hidden, ffn});
  }
  add("model.norm.weight", {hidden});
  if (!config.tied_embeddings) add("lm_head.weight", {config.vocab_size, hidden});
  return tensors;
}

void write_weights(const fs::path& directory, const ModelConfig& config, uint64_t seed, DType dtype,
                   int num_files) {
  const std::vector<RawTensor> tensors = tiny_tensors(config, seed, dtype);
  if (num_files == 1) {
    write_file(directory / "model.safetensors", safetensors_bytes(tensors));
    return;
  }
  std::string map;
  const auto files = static_cast<size_t>(num_files);
  for (size_t file = 0; file < files; ++file) {
    const std::string name = fmt::format("model-{:05}-of-{:05}.safetensors", file + 1, num_files);
    const std::vector<RawTensor> part(
        tensors.begin() + static_cast<std::ptrdiff_t>(tensors.size() * file / files),
        tensors.begin() + static_cast<std::ptrdiff_t>(tensors.size() * (file + 1) / files));
    write_file(directory / name, safetensors_bytes(part));
    for (const RawTensor& tensor : part) {
      map += fmt::format(R"({}"{}":"{}")", map.empty() ? "" : ",", tensor.name, name);
    }
  }
  write_file(directory / "model.safetensors.index.json",
             fmt::format(R"({{"metadata":{{}},"weight_map":{{{}}}}})", map));
}

void write_tiny_model(const fs::path& directory, const TinyModelOptions& options) {
  const std::string json = tiny_config_json(options);
  write_file(directory / "config.json", json);
  Result<ModelConfig> config = parse_model_config(json, "tiny_config_json()");
  if (!config) throw std::runtime_error(config.status().message());
  write_weights(directory, *config, options.seed, options.dtype, options.num_files);
}

}  // namespace kvarn::test
