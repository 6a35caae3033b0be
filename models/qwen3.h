// Qwen3 dense: a pre-norm decoder with grouped-query attention, an RMS norm on each head's q and k,
// rotary positions and SwiGLU. Worker thread only after create().
#pragma once

#include <memory>
#include <vector>

#include "models/layers.h"
#include "models/model.h"
#include "models/weights.h"

namespace kvarn {

class Qwen3 final : public Model {
 public:
  static Result<std::unique_ptr<Model>> create(const ModelConfig& config,
                                               std::unique_ptr<WeightStore> weights,
                                               int max_positions, Backend& backend);

  const ModelConfig& config() const override { return config_; }
  size_t workspace_bytes(int max_rows, int max_logit_rows) const override;
  void forward(const StepInput& input, const KvCacheView& kv, Arena& arena, Tensor logits,
               ForwardProgress* progress) override;
  size_t weight_bytes() const override { return weights_->bytes(); }

 private:
  struct Layer {
    RmsNorm input_norm, post_attention_norm;
    Attention attention;
    Mlp mlp;
  };

  Qwen3(const ModelConfig& config, std::unique_ptr<WeightStore> weights, Backend& backend)
      : config_(config), weights_(std::move(weights)), backend_(backend) {}
  Status load(int max_positions);
  Result<Layer> load_layer(int index);
  Tensor gather(const StepContext& step, Tensor x) const;  // the rows whose logits are wanted

  ModelConfig config_;
  std::unique_ptr<WeightStore> weights_;
  Backend& backend_;
  RopeTable rope_;
  Tensor embedding_;  // [vocab, hidden]
  std::vector<Layer> layers_;
  RmsNorm final_norm_;
  Linear head_;  // [vocab, hidden]; the embedding again when tied
};

}  // namespace kvarn
