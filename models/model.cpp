#include "models/model.h"

#include <fmt/format.h>

#include <algorithm>
#include <fstream>

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

}  // namespace

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
  return factory(config, std::move(weights), positions, backend);
}

}  // namespace kvarn
