#include "models/layers.h"

#include <cmath>

namespace kvarn {
Result<Linear> Linear::load(WeightStore& weights, const std::vector<std::string>& names,
                            const std::vector<int64_t>& out_features, int64_t in_features) {
  Linear linear;
  KVARN_ASSIGN_OR_RETURN(linear.weight_, weights.get_stacked(names, out_features, in_features));
  return linear;
}

Linear Linear::view(Tensor weight) {
  Linear linear;
  linear.weight_.parts[0] = weight;
  linear.weight_.num_parts = 1;
  return linear;
}

Result<RmsNorm> RmsNorm::load(WeightStore& weights, const std::string& name,
                              const ModelConfig& config) {
  RmsNorm norm;
  KVARN_ASSIGN_OR_RETURN(norm.weight_, weights.get(name, {config.hidden_size}));
  norm.eps_ = static_cast<float>(config.rms_norm_eps);
  return norm;
}

Result<Attention> Attention::load(WeightStore& weights, const std::string& prefix,
                                  const ModelConfig& config) {
  Attention attention;
  attention.q_heads_ = config.num_q_heads;
  attention.kv_heads_ = config.num_kv_heads;
  attention.head_dim_ = config.head_dim;
  attention.eps_ = static_cast<float>(config.rms_norm_eps);
  const int64_t q_size = int64_t{config.num_q_heads} * config.head_dim;
  const int64_t kv_size = int64_t{config.num_kv_heads} * config.head_dim;
  KVARN_ASSIGN_OR_RETURN(
      attention.qkv_,
      Linear::load(weights,
                   {prefix + "q_proj.weight", prefix + "k_proj.weight", prefix + "v_proj.weight"},
                   {q_size, kv_size, kv_size}, config.hidden_size));
  KVARN_ASSIGN_OR_RETURN(attention.o_, Linear::load(weights, {prefix + "o_proj.weight"},
                                                    {config.hidden_size}, q_size));
  KVARN_ASSIGN_OR_RETURN(attention.q_norm_,
                         weights.get(prefix + "q_norm.weight", {config.head_dim}));
  KVARN_ASSIGN_OR_RETURN(attention.k_norm_,
                         weights.get(prefix + "k_norm.weight", {config.head_dim}));
  return attention;
}

void Attention::forward(const StepContext& step, const RmsNorm& norm, const RopeTable& rope,
                        const KvLayerView& pages, Tensor x, Tensor heads) const {
  const ArenaScope scope(step.arena);
  const int64_t rows = step.num_rows();
  // q stays fp32 on the CPU; a 16-bit backend keeps it in fp16 like K and V.
  const DType q_dtype = step.backend.activation_dtype() == DType::kF32 ? DType::kF32 : DType::kF16;
  const Tensor qkv = step.activations(rows, int64_t{q_heads_ + 2 * kv_heads_} * head_dim_);
  const Tensor q = step.arena.tensor(q_dtype, {rows, q_heads_, head_dim_});
  const Tensor k = step.arena.tensor(DType::kF16, {rows, kv_heads_, head_dim_});
  const Tensor v = step.arena.tensor(DType::kF16, {rows, kv_heads_, head_dim_});

  step.backend.norm_linear(norm.normed(step, x), qkv_.weight(), qkv);
  step.backend.qk_norm_rope_rotate({.qkv = qkv,
                                    .positions = step.input.positions.data(),
                                    .rope = rope,
                                    .q_norm = q_norm_,
                                    .k_norm = k_norm_,
                                    .eps = eps_,
                                    .rotate = pages.layout.coded(),
                                    .q_heads = q_heads_,
                                    .kv_heads = kv_heads_,
                                    .head_dim = head_dim_,
                                    .q = q,
                                    .k = k,
                                    .v = v});
  store(step, pages, k, v);

  AttentionParams params{.q = q,
                         .k_rows = k,
                         .v_rows = v,
                         .sequences = {},
                         .block_pages = step.input.block_pages.data(),
                         .layer = pages,
                         .q_heads = q_heads_,
                         .scale = 1.f / std::sqrt(static_cast<float>(head_dim_)),
                         .rule = step.input.rule,
                         .out = heads};
  const auto num_decodes = static_cast<size_t>(step.input.num_decode_sequences);
  params.sequences = step.input.sequences.first(num_decodes);
  step.backend.attention_decode(params);
  params.sequences = step.input.sequences.subspan(num_decodes);
  step.backend.attention_prefill(params);
}

void Attention::project(const StepContext& step, Tensor heads, Tensor x) const {
  const ArenaScope scope(step.arena);
  step.backend.linear_add(heads, o_.weight(), step.activations(x.dim(0), x.dim(1)), x);
}

// Complete tiles of prefill chunks are coded before anything attends, because later rows of the
// same chunk read them coded.
void Attention::store(const StepContext& step, const KvLayerView& pages, Tensor k, Tensor v) const {
  step.backend.kv_encode(
      {.k = k, .v = v, .tiles = step.input.encode_in_layer, .layers = {&pages, 1}});
  step.backend.kv_write({.k = k, .v = v, .slots = step.input.slots.data(), .layer = pages});
}

Result<Mlp> Mlp::load(WeightStore& weights, const std::string& prefix, const ModelConfig& config) {
  Mlp mlp;
  mlp.ffn_ = config.intermediate_size;
  KVARN_ASSIGN_OR_RETURN(
      mlp.gate_up_, Linear::load(weights, {prefix + "gate_proj.weight", prefix + "up_proj.weight"},
                                 {mlp.ffn_, mlp.ffn_}, config.hidden_size));
  KVARN_ASSIGN_OR_RETURN(mlp.down_, Linear::load(weights, {prefix + "down_proj.weight"},
                                                 {config.hidden_size}, mlp.ffn_));
  return mlp;
}

void Mlp::forward(const StepContext& step, const RmsNorm& norm, Tensor x) const {
  const ArenaScope scope(step.arena);
  const NormedInput input = norm.normed(step, x);
  const Tensor gate_up = step.activations(x.dim(0), 2 * ffn_);
  const Tensor hidden = step.activations(x.dim(0), ffn_);
  step.backend.norm_gate_up(input, gate_up_.weight(), gate_up, hidden);
  step.backend.linear_add(hidden, down_.weight(), input.scratch, x);
}

}  // namespace kvarn
