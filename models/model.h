// A model as the engine sees it. Worker thread only after load.
#pragma once

#include <filesystem>
#include <memory>
#include <string>

#include "kernels/core/arena.h"
#include "models/forward_input.h"
#include "models/model_config.h"

namespace kvarn {

class Model {
 public:
  virtual ~Model() = default;
  virtual const ModelConfig& config() const = 0;
  // Activation bytes that one forward() of at most `max_rows` rows and `max_logit_rows` logits
  // takes from the arena.
  virtual size_t workspace_bytes(int max_rows, int max_logit_rows) const = 0;
  // Runs the step and writes `logits` f32 [logit_rows, vocab], both in the backend's memory;
  // `input` is what Backend::begin_step() returned. Throws on a device failure; input is trusted.
  // `progress` may be null.
  virtual void forward(const StepInput& input, const KvCacheView& kv, Arena& arena, Tensor logits,
                       ForwardProgress* progress) = 0;
  virtual size_t weight_bytes() const = 0;
};

enum class LoadFormat { kAuto, kDummy };

struct ModelSource {
  std::filesystem::path
      path;  // directory with config.json and *.safetensors; unused for kDummy with a shape
  LoadFormat format = LoadFormat::kAuto;
  std::string shape;      // "qwen3-0.6b" ... "qwen3-32b", for kDummy
  int max_model_len = 0;  // positions the RoPE table must cover; 0: the config's
  uint64_t dummy_seed = 0;
};

// What Backend::reserve() sizes buffers by, for steps of at most `max_rows` rows of at most
// `max_sequences` sequences of `max_model_len` tokens, `max_logit_rows` of them with logits.
StepLimits make_step_limits(const ModelConfig& config, const KvLayout& layout, int max_model_len,
                            int max_rows, int max_sequences, int max_logit_rows);

// Reads only config.json (or the public shape).
Result<ModelConfig> read_model_config(const ModelSource& source);
// Loads or generates the weights and makes the model. The backend must outlive it.
Result<std::unique_ptr<Model>> load_model(const ModelSource& source, Backend& backend);

}  // namespace kvarn
