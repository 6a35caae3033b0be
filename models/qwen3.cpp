#include "models/qwen3.h"

#include <algorithm>
#include <string>

#include "models/rope.h"

namespace kvarn {

void Qwen3::forward(const StepInput& input, const KvCacheView& kv, Arena& arena, Tensor logits,
                    ForwardProgress* progress) {
  const ArenaScope scope(arena);
  const StepContext step{backend_, input, arena};
  const int64_t rows = step.num_rows(), hidden = config_.hidden_size;
  Tensor x = arena.tensor(DType::kF32, {rows, hidden});  // the residual stream
  Tensor heads = step.activations(rows, int64_t{config_.num_q_heads} * config_.head_dim);

  // Blocks that a decode outgrew are coded first: this step's rows may go to the pages they give
  // back.
  backend_.kv_encode({.k = {}, .v = {}, .tiles = input.encode_before, .layers = kv.layers});
  backend_.embed(input.token_ids.data(), embedding_, x);
  for (size_t l = 0; l < layers_.size(); ++l) {
    const Layer& layer = layers_[l];
    layer.attention.forward(step, layer.input_norm, rope_, kv.layers[l], x, heads);
    if (l + 1 == layers_.size()) {  // nothing reads the other rows any more
      x = gather(step, x);
      heads = gather(step, heads);
    }
    layer.attention.project(step, heads, x);
    layer.mlp.forward(step, layer.post_attention_norm, x);
    if (progress != nullptr) progress->layer_done();
  }
  backend_.norm_linear(final_norm_.normed(step, x), head_.weight(), logits);
}

Tensor Qwen3::gather(const StepContext& step, Tensor x) const {
  const Tensor kept =
      step.arena.tensor(x.dtype(), {static_cast<int64_t>(step.input.logit_rows.size()), x.dim(1)});
  backend_.gather_rows(x, step.input.logit_rows, kept);
  return kept;
}

// Mirrors forward(): what lives for the whole step, and the larger of an attention and the last MLP
// with the gathered rows that it works on (the head takes less than the MLP).
size_t Qwen3::workspace_bytes(int max_rows, int max_logit_rows) const {
  const size_t act = dtype_bytes(backend_.activation_dtype());
  const size_t q_bytes = act == 4 ? 4 : 2, kv_bytes = dtype_bytes(DType::kF16);
  const auto size = [](int64_t rows, int64_t columns, size_t bytes) {
    return (static_cast<size_t>(rows) * static_cast<size_t>(columns) * bytes + 63) / 64 * 64;
  };
  const int64_t rows = max_rows, hidden = config_.hidden_size, ffn = config_.intermediate_size;
  const int64_t q = int64_t{config_.num_q_heads} * config_.head_dim;
  const int64_t kv = int64_t{config_.num_kv_heads} * config_.head_dim;
  const size_t f32 = dtype_bytes(DType::kF32);  // the residual stream
  const size_t step = size(rows, hidden, f32) + size(rows, q, act);
  const size_t attention = size(rows, hidden, act) + size(rows, q + 2 * kv, act) +
                           size(rows, q, q_bytes) + 2 * size(rows, kv, kv_bytes);
  const size_t mlp = size(rows, hidden, act) + size(rows, 2 * ffn, act) + size(rows, ffn, act);
  const size_t gathered = size(max_logit_rows, hidden, f32) + size(max_logit_rows, q, act);
  return step + std::max(attention, gathered + mlp);
}

Result<std::unique_ptr<Model>> Qwen3::create(const ModelConfig& config,
                                             std::unique_ptr<WeightStore> weights,
                                             int max_positions, Backend& backend) {
  std::unique_ptr<Qwen3> model(new Qwen3(config, std::move(weights), backend));
  KVARN_RETURN_IF_ERROR(model->load(max_positions));
  return std::unique_ptr<Model>(std::move(model));
}

Status Qwen3::load(int max_positions) {
  const int64_t vocab = config_.vocab_size, hidden = config_.hidden_size;
  KVARN_ASSIGN_OR_RETURN(embedding_, weights_->get("model.embed_tokens.weight", {vocab, hidden}));
  for (int l = 0; l < config_.num_layers; ++l) {
    KVARN_ASSIGN_OR_RETURN(Layer layer, load_layer(l));
    layers_.push_back(std::move(layer));
  }
  KVARN_ASSIGN_OR_RETURN(final_norm_, RmsNorm::load(*weights_, "model.norm.weight", config_));
  if (config_.tied_embeddings) {
    head_ = Linear::view(embedding_);
  } else {
    KVARN_ASSIGN_OR_RETURN(head_, Linear::load(*weights_, {"lm_head.weight"}, {vocab}, hidden));
  }
  KVARN_RETURN_IF_ERROR(weights_->check_all_used());

  RopeArrays tables = make_rope_arrays(config_, max_positions);
  const int64_t pairs = config_.head_dim / 2;
  rope_.cos = weights_->adopt(std::move(tables.cos), DType::kF32, {max_positions, pairs});
  rope_.sin = weights_->adopt(std::move(tables.sin), DType::kF32, {max_positions, pairs});
  return Status::ok();
}

Result<Qwen3::Layer> Qwen3::load_layer(int index) {
  const std::string prefix = "model.layers." + std::to_string(index) + ".";
  Layer layer;
  KVARN_ASSIGN_OR_RETURN(layer.input_norm,
                         RmsNorm::load(*weights_, prefix + "input_layernorm.weight", config_));
  KVARN_ASSIGN_OR_RETURN(layer.attention,
                         Attention::load(*weights_, prefix + "self_attn.", config_));
  KVARN_ASSIGN_OR_RETURN(
      layer.post_attention_norm,
      RmsNorm::load(*weights_, prefix + "post_attention_layernorm.weight", config_));
  KVARN_ASSIGN_OR_RETURN(layer.mlp, Mlp::load(*weights_, prefix + "mlp.", config_));
  return layer;
}

}  // namespace kvarn
