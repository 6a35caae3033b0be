// Random Qwen3 model directories, made at test time: config.json and safetensors files. Weights
// come from an integer hash of (seed, tensor name, index), which tools/oracles/qwen3_logits.py
// computes too: golden logits need no weights in the repository.
#pragma once

#include <cstdint>
#include <filesystem>
#include <string>
#include <vector>

#include "models/model_config.h"

namespace kvarn::test {

// A directory that is gone when the object is.
class TempDir {
 public:
  TempDir();
  ~TempDir();
  TempDir(const TempDir&) = delete;
  TempDir& operator=(const TempDir&) = delete;
  const std::filesystem::path& path() const { return path_; }

 private:
  std::filesystem::path path_;
};

void write_file(const std::filesystem::path& path, const std::string& bytes);
std::string read_file(const std::filesystem::path& path);

// One tensor as it goes into a file. Tests bend the fields to make bad files.
struct RawTensor {
  std::string name;
  std::string dtype;  // "BF16", "F16", "F32", ...
  std::vector<int64_t> shape;
  std::string bytes;  // little-endian elements
};

// A safetensors file: header length, header, bytes in the order given.
std::string safetensors_bytes(const std::vector<RawTensor>& tensors);
// With a header of the caller's making.
std::string safetensors_bytes(const std::string& header_json, const std::string& data);

struct TinyModelOptions {
  int vocab_size = 512, hidden_size = 64, intermediate_size = 128, num_layers = 2;
  int num_q_heads = 4, num_kv_heads = 2, head_dim = 128;
  int max_position_embeddings = 4096;
  double rope_theta = 1e6, rms_norm_eps = 1e-6;
  bool tied_embeddings = true;
  std::string rope_scaling = "null";  // JSON
  int eos_token_id = 1;
  uint64_t seed = 1;
  DType dtype = DType::kBF16;
  int num_files = 1;  // above 1: split over so many files with an index
};

std::string tiny_config_json(const TinyModelOptions& options);
// The tensors of a dense Qwen3 of this shape, by checkpoint names.
std::vector<RawTensor> tiny_tensors(const ModelConfig& config, uint64_t seed, DType dtype);
// config.json and the weights, into an existing directory.
void write_tiny_model(const std::filesystem::path& directory, const TinyModelOptions& options = {});
// Weights alone, for the config.json that the directory already holds (golden tests).
void write_weights(const std::filesystem::path& directory, const ModelConfig& config, uint64_t seed,
                   DType dtype = DType::kBF16, int num_files = 1);

}  // namespace kvarn::test
