#include "models/model.h"

#include <fmt/format.h>

#include <algorithm>
#include <fstream>
#include <new>
#include <optional>
#include <stdexcept>

#include "models/registry.h"
#include "models/weights.h"

namespace kvarn {
namespace {

constexpr size_t kMaxConfigBytes = 1 << 20;  // real ones have about 1 KB

Result<std::string> read_config_text(const std::filesystem::path& path) {
  std::ifstream in(path, std::ios::binary);
  if (!in) {
    return Status::not_found(
        fmt::format("{}: cannot be read; --model takes a directory that holds config.json, "
                    "tokenizer.json and *.safetensors",
                    path.string()));
  }
  std::string text(kMaxConfigBytes + 1, '\0');
  in.read(text.data(), static_cast<std::streamsize>(text.size()));
  text.resize(static_cast<size_t>(std::max<std::streamsize>(in.gcount(), 0)));
  if (text.size() > kMaxConfigBytes) {
    return Status::invalid_argument(
        fmt::format("{}: above {} bytes, no model's config.json", path.string(), kMaxConfigBytes));
  }
  return text;
}

std::string gib(size_t bytes) {
  return fmt::format("{:.2f} GiB", static_cast<double>(bytes) / (1 << 30));
}

// What the GPU kernels of this version do not do, and what cannot fit, before gigabytes are read.
Status check_device(const ModelConfig& config, const DeviceMemory& memory) {
  if (config.head_dim != kCodedHeadDim) {
    return Status::invalid_argument(
        fmt::format("this model has head_dim {}; the GPU kernels of this version need {}: use "
                    "--device cpu",
                    config.head_dim, kCodedHeadDim));
  }
  const size_t weights = static_cast<size_t>(config.num_parameters()) * dtype_bytes(DType::kBF16);
  if (weights > memory.free_bytes) {
    return Status::resource_exhausted(fmt::format(
        "the weights take {} in bf16, the GPU has {} free of {}; take a smaller model, a larger "
        "GPU, or --device cpu",
        gib(weights), gib(memory.free_bytes), gib(memory.total_bytes)));
  }
  return {};
}

}  // namespace

StepLimits make_step_limits(const ModelConfig& config, const KvLayout& layout, int max_model_len,
                            int max_rows, int max_sequences, int max_logit_rows) {
  StepLimits limits;
  limits.max_rows = max_rows;
  limits.max_logit_rows = max_logit_rows;
  limits.max_sequences = max_sequences;
  limits.max_blocks = int64_t{(max_model_len + kBlockTokens - 1) / kBlockTokens} * max_sequences;
  // Before the layers one of each sequence and as many of ended ones (Scheduler); in them those of
  // the chunks.
  limits.max_encode_tiles = int64_t{2} * max_sequences + max_rows / kBlockTokens;
  limits.max_model_len = max_model_len;
  limits.hidden = config.hidden_size;
  limits.q_heads = config.num_q_heads;
  limits.kv_heads = config.num_kv_heads;
  limits.head_dim = config.head_dim;
  limits.ffn = config.intermediate_size;
  limits.vocab = config.vocab_size;
  limits.layout = layout;
  return limits;
}

Result<ModelConfig> read_model_config(const ModelSource& source) {
  if (!source.shape.empty()) return public_shape(source.shape);
  if (source.path.empty()) {
    return Status::invalid_argument(
        "no model named: give --model DIRECTORY, or --load-format dummy with --shape");
  }
  const std::filesystem::path path = source.path / "config.json";
  KVARN_ASSIGN_OR_RETURN(const std::string text, read_config_text(path));
  return parse_model_config(text, path.string());
}

Result<std::unique_ptr<Model>> load_model(const ModelSource& source, Backend& backend) {
  if (!source.shape.empty() && source.format != LoadFormat::kDummy) {
    return Status::invalid_argument(
        fmt::format("--shape {} has no weights: add --load-format dummy, or name a model directory "
                    "instead",
                    source.shape));
  }
  KVARN_ASSIGN_OR_RETURN(const ModelConfig config, read_model_config(source));
  if (source.max_model_len > config.max_position_embeddings) {
    return Status::invalid_argument(
        fmt::format("--max-model-len {} is above the {} positions of this model; lower it, or set "
                    "rope_scaling (yarn) in its config.json",
                    source.max_model_len, config.max_position_embeddings));
  }
  const std::optional<DeviceMemory> device = backend.device_memory();
  if (device) KVARN_RETURN_IF_ERROR(check_device(config, *device));
  std::unique_ptr<WeightStore> weights;
  if (source.format == LoadFormat::kDummy) {
    weights = WeightStore::random(source.dummy_seed, backend);
  } else {
    KVARN_ASSIGN_OR_RETURN(weights, WeightStore::from_directory(source.path, backend));
  }
  const ModelFactory factory = find_model_factory(config.architecture);
  CHECK(factory != nullptr, "parse_model_config() lets only known architectures pass");
  const int positions =
      source.max_model_len > 0 ? source.max_model_len : config.max_position_embeddings;
  try {
    return factory(config, std::move(weights), positions, backend);
  } catch (const std::bad_alloc&) {
    const size_t free_bytes = device ? backend.device_memory()->free_bytes : 0;
    return Status::resource_exhausted(fmt::format(
        "no memory for a part of the weights (bf16: {} in all){}; take a smaller model",
        gib(static_cast<size_t>(config.num_parameters()) * 2),
        device ? fmt::format(", {} left of the GPU's {}", gib(free_bytes), gib(device->total_bytes))
               : std::string()));
  } catch (const std::runtime_error& error) {  // of the device
    return Status::internal(fmt::format("the weights could not be loaded: {}", error.what()));
  }
}

}  // namespace kvarn
