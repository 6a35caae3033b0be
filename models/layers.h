// The parts of a decoder layer: what each computes, its weights by their checkpoint names, and
// nothing about sequences. All are views into a WeightStore. Worker thread only.
#pragma once

#include <string>
#include <vector>

#include "kernels/backend.h"
#include "kernels/core/arena.h"
#include "models/forward_input.h"
#include "models/model_config.h"
#include "models/weights.h"

namespace kvarn {

// Gives back on leaving a scope what was taken from the arena within it.
class ArenaScope {
 public:
  explicit ArenaScope(Arena& arena) : arena_(arena), used_(arena.used()) {}
  ~ArenaScope() { arena_.rewind(used_); }
  ArenaScope(const ArenaScope&) = delete;
  ArenaScope& operator=(const ArenaScope&) = delete;

 private:
  Arena& arena_;
  size_t used_;
};

// What every op of one forward() shares.
struct StepContext {
  Backend& backend;
  const StepInput& input;
  Arena& arena;

  int64_t num_rows() const { return static_cast<int64_t>(input.token_ids.size()); }
  Tensor activations(int64_t rows, int64_t columns) const {
    return arena.tensor(backend.activation_dtype(), {rows, columns});
  }
};

// y = x W^T, with one matrix or several stacked ones (QKV, gate/up).
class Linear {
 public:
  Linear() = default;
  // `out_features[i]` rows in the weight names[i]; all have `in_features` columns.
  static Result<Linear> load(WeightStore& weights, const std::vector<std::string>& names,
                             const std::vector<int64_t>& out_features, int64_t in_features);
  static Linear view(Tensor weight);  // of an embedding, for a tied head

  const LinearWeight& weight() const { return weight_; }

 private:
  LinearWeight weight_;
};

class RmsNorm {
 public:
  RmsNorm() = default;
  static Result<RmsNorm> load(WeightStore& weights, const std::string& name,
                              const ModelConfig& config);

  // The residual stream on its way into a matrix; takes room for the normed rows from the arena.
  NormedInput normed(const StepContext& step, Tensor x) const {
    return {x, weight_, eps_, step.activations(x.dim(0), x.dim(1))};
  }

 private:
  Tensor weight_;  // [hidden]
  float eps_ = 0;
};

// Causal self-attention over the KV pages of one layer.
class Attention {
 public:
  static Result<Attention> load(WeightStore& weights, const std::string& prefix,
                                const ModelConfig& config);

  // QKV, QK-norm, RoPE, pages, attention: x f32 [rows, hidden] -> heads [rows, q_heads * head_dim].
  void forward(const StepContext& step, const RmsNorm& norm, const RopeTable& rope,
               const KvLayerView& pages, Tensor x, Tensor heads) const;
  // The output projection: x += heads W_o^T.
  void project(const StepContext& step, Tensor heads, Tensor x) const;

 private:
  void store(const StepContext& step, const KvLayerView& pages, Tensor k, Tensor v) const;

  Linear qkv_, o_;
  Tensor q_norm_, k_norm_;  // [head_dim]
  int q_heads_ = 0, kv_heads_ = 0, head_dim_ = 0;
  float eps_ = 0;
};

// SwiGLU: x += down(silu(gate(norm(x))) * up(norm(x))).
class Mlp {
 public:
  static Result<Mlp> load(WeightStore& weights, const std::string& prefix,
                          const ModelConfig& config);
  void forward(const StepContext& step, const RmsNorm& norm, Tensor x) const;  // f32 [rows, hidden]

 private:
  Linear gate_up_, down_;
  int64_t ffn_ = 0;
};

}  // namespace kvarn
