// The CPU behind the seam: checks shapes once, then hands each op to its twin. Holds the thread
// pool and the packed activations of linear(); every tensor is the caller's.
#include <algorithm>
#include <chrono>
#include <cstring>
#include <string>
#include <vector>

#include "kernels/backend.h"
#include "kernels/kv_cpu.h"
#include "kernels/linear_cpu.h"
#include "kernels/ops_cpu.h"

namespace kvarn {
namespace {

bool is_float(DType dtype) {
  return dtype == DType::kBF16 || dtype == DType::kF16 || dtype == DType::kF32;
}

void expect(const Tensor& t, DType dtype, std::initializer_list<int64_t> shape, const char* what) {
  CHECK(t.dtype() == dtype, what);
  CHECK(t.dims() == static_cast<int>(shape.size()), what);
  int i = 0;
  for (const int64_t extent : shape) CHECK(t.dim(i++) == extent, what);
}

void expect_weight(const Tensor& t, std::initializer_list<int64_t> shape, const char* what) {
  CHECK(is_float(t.dtype()), what);
  expect(t, t.dtype(), shape, what);
}

class CpuBackend final : public Backend {
 public:
  explicit CpuBackend(const CpuOptions& options)
      : isa_(options.isa),
        pool_(options.threads > 0 ? options.threads : cpu::physical_cores()),
        linear_(pool_, options.isa, options.fp32_activations) {
    CHECK(cpu_isa_supported(isa_), "this processor lacks the instruction set asked for");
  }

  std::string name() const override {
    return std::string("cpu (") + cpu_isa_name(isa_) + ", " + std::to_string(pool_.size()) +
           (pool_.size() == 1 ? " thread)" : " threads)");
  }
  int threads() const override { return pool_.size(); }
  DType activation_dtype() const override { return DType::kF32; }
  std::optional<DeviceMemory> device_memory() const override { return std::nullopt; }
  Buffer allocate(size_t bytes) override { return allocate_host(bytes); }
  void* upload(const void* host, size_t /*bytes*/, Buffer& /*into*/, size_t /*offset*/) override {
    return const_cast<void*>(host);
  }
  void download(const void* from, size_t bytes, void* host) override {
    if (bytes > 0) std::memcpy(host, from, bytes);
  }
  void fill_normal(Tensor out, float stddev, uint64_t seed) override {
    CHECK(out.dtype() == DType::kBF16, "fill_normal: bf16");
    cpu::fill_normal(out, stddev, seed, pool_);
  }

  void reserve(const StepLimits& limits) override {
    sampled_.resize(static_cast<size_t>(limits.max_logit_rows));
  }
  StepInput begin_step(const StepInput& host, std::span<const SamplingRow> sampling) override {
    sampling_ = sampling;
    encode_seconds_ = 0;
    return host;
  }
  StepTimes end_step(std::span<SampledToken> tokens) override {
    CHECK(tokens.size() <= sampled_.size(), "end_step: at most as many tokens as were sampled");
    std::move(sampled_.begin(), sampled_.begin() + static_cast<std::ptrdiff_t>(tokens.size()),
              tokens.begin());
    return {.encode_seconds = encode_seconds_};
  }
  std::unique_ptr<Recording> record(const std::function<void()>& /*ops*/) override {
    return nullptr;
  }

  void embed(const int32_t* token_ids, Tensor table, Tensor out) override {
    expect(out, DType::kF32, {out.dim(0), table.dim(1)}, "embed: out is f32 [rows, hidden]");
    cpu::embed(token_ids, table, out, pool_);
  }

  void rms_norm(Tensor x, Tensor weight, float eps, Tensor y) override {
    expect(x, DType::kF32, {x.dim(0), x.dim(1)}, "rms_norm: x is f32 [rows, hidden]");
    expect(y, DType::kF32, {x.dim(0), x.dim(1)}, "rms_norm: y is f32 [rows, hidden]");
    expect_weight(weight, {x.dim(1)}, "rms_norm: weight is [hidden]");
    cpu::rms_norm(x, weight, eps, y, pool_, isa_);
  }

  void add_rms_norm(Tensor residual, Tensor delta, Tensor weight, float eps, Tensor y) override {
    const int64_t rows = residual.dim(0), hidden = residual.dim(1);
    expect(residual, DType::kF32, {rows, hidden}, "add_rms_norm: residual is f32 [rows, hidden]");
    expect(delta, DType::kF32, {rows, hidden}, "add_rms_norm: delta is f32 [rows, hidden]");
    expect(y, DType::kF32, {rows, hidden}, "add_rms_norm: y is f32 [rows, hidden]");
    expect_weight(weight, {hidden}, "add_rms_norm: weight is [hidden]");
    cpu::add_rms_norm(residual, delta, weight, eps, y, pool_, isa_);
  }

  void add(Tensor residual, Tensor delta) override {
    CHECK(residual.dtype() == DType::kF32 && delta.dtype() == DType::kF32, "add: f32 tensors");
    CHECK(residual.size() == delta.size(), "add: equal shapes");
    cpu::add(residual, delta, pool_, isa_);
  }

  void linear(Tensor x, const LinearWeight& weight, Tensor y) override {
    CHECK(weight.num_parts >= 1, "linear: at least one row block");
    const int64_t k = weight.in_features();
    for (int i = 0; i < weight.num_parts; ++i) {
      const Tensor& part = weight.parts[static_cast<size_t>(i)];
      expect_weight(part, {part.dim(0), k}, "linear: row blocks are [n_i, k] of a float dtype");
    }
    expect(x, DType::kF32, {x.dim(0), k}, "linear: x is f32 [rows, k]");
    expect(y, DType::kF32, {x.dim(0), weight.out_features()}, "linear: y is f32 [rows, n]");
    linear_.run(x, weight, y);
  }

  void qk_norm_rope_rotate(const QkvParams& p) override {
    const int64_t rows = p.qkv.dim(0), d = p.head_dim;
    expect(p.qkv, DType::kF32, {rows, (p.q_heads + 2 * p.kv_heads) * d},
           "qkv is f32 [rows, (q_heads + 2 kv_heads) * head_dim]");
    expect(p.q, DType::kF32, {rows, p.q_heads, d}, "q is f32 [rows, q_heads, head_dim]");
    expect(p.k, DType::kF16, {rows, p.kv_heads, d}, "k is f16 [rows, kv_heads, head_dim]");
    expect(p.v, DType::kF16, {rows, p.kv_heads, d}, "v is f16 [rows, kv_heads, head_dim]");
    expect(p.rope.cos, DType::kF32, {p.rope.cos.dim(0), d / 2}, "cos is f32 [positions, d/2]");
    expect(p.rope.sin, DType::kF32, {p.rope.cos.dim(0), d / 2}, "sin is f32 [positions, d/2]");
    if (!p.q_norm.empty()) expect_weight(p.q_norm, {d}, "q_norm is [head_dim]");
    if (!p.k_norm.empty()) expect_weight(p.k_norm, {d}, "k_norm is [head_dim]");
    cpu::qk_norm_rope_rotate(p, pool_, isa_);
  }

  void kv_write(const KvWriteParams& params) override { cpu::kv_write(params, pool_); }
  void kv_encode(const KvEncodeParams& params) override {
    if (params.tiles.empty()) return;
    const auto start = std::chrono::steady_clock::now();
    cpu::kv_encode(params, pool_, isa_);
    encode_seconds_ +=
        std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
  }
  void attention_decode(const AttentionParams& params) override {
    cpu::attention(params, pool_, isa_);
  }
  void attention_prefill(const AttentionParams& params) override {
    cpu::attention(params, pool_, isa_);
  }

  void silu_mul(Tensor gate_up, Tensor y) override {
    expect(y, DType::kF32, {y.dim(0), y.dim(1)}, "silu_mul: y is f32 [rows, ffn]");
    expect(gate_up, DType::kF32, {y.dim(0), 2 * y.dim(1)},
           "silu_mul: gate_up is f32 [rows, 2*ffn]");
    cpu::silu_mul(gate_up, y, pool_, isa_);
  }

  void gather_rows(Tensor x, std::span<const int32_t> rows, Tensor y) override {
    expect(y, x.dtype(), {static_cast<int64_t>(rows.size()), x.dim(1)},
           "gather_rows: y is [rows, width]");
    cpu::gather_rows(x, rows, y, pool_);
  }

  void sample(Tensor logits) override {
    const auto count = static_cast<int64_t>(sampling_.size());
    expect(logits, DType::kF32, {count, logits.dim(1)}, "sample: logits are f32 [rows, vocab]");
    if (sampled_.size() < sampling_.size()) sampled_.resize(sampling_.size());
    cpu::sample(logits, sampling_, {sampled_.data(), sampling_.size()}, pool_);
  }

 private:
  CpuIsa isa_;
  ThreadPool pool_;
  cpu::Linear linear_;
  std::span<const SamplingRow> sampling_;  // of the step that is open
  std::vector<SampledToken> sampled_;
  double encode_seconds_ = 0;
};

}  // namespace

std::unique_ptr<Backend> make_cpu_backend(const CpuOptions& options) {
  return std::make_unique<CpuBackend>(options);
}

}  // namespace kvarn
