// A backend that hands every call to another one: the base of those that change a little.
#pragma once

#include <memory>
#include <utility>

#include "kernels/backend.h"

namespace kvarn::test {

class ForwardingBackend : public Backend {
 public:
  explicit ForwardingBackend(std::unique_ptr<Backend> to) : to_(std::move(to)) {}

  std::string name() const override { return to_->name(); }
  int threads() const override { return to_->threads(); }
  DType activation_dtype() const override { return to_->activation_dtype(); }
  std::optional<DeviceMemory> device_memory() const override { return to_->device_memory(); }
  Buffer allocate(size_t bytes) override { return to_->allocate(bytes); }
  void* upload(const void* host, size_t bytes, Buffer& into, size_t offset) override {
    return to_->upload(host, bytes, into, offset);
  }
  void download(const void* from, size_t bytes, void* host) override {
    to_->download(from, bytes, host);
  }
  void fill_normal(Tensor out, float stddev, uint64_t seed) override {
    to_->fill_normal(out, stddev, seed);
  }
  void reserve(const StepLimits& limits) override { to_->reserve(limits); }
  StepInput begin_step(const StepInput& host, std::span<const SamplingRow> sampling) override {
    return to_->begin_step(host, sampling);
  }
  StepTimes end_step(std::span<SampledToken> tokens) override { return to_->end_step(tokens); }
  std::unique_ptr<Recording> record(const std::function<void()>& ops) override {
    return to_->record(ops);
  }
  void embed(const int32_t* token_ids, Tensor table, Tensor out) override {
    to_->embed(token_ids, table, out);
  }
  void rms_norm(Tensor x, Tensor weight, float eps, Tensor y) override {
    to_->rms_norm(x, weight, eps, y);
  }
  void add_rms_norm(Tensor residual, Tensor delta, Tensor weight, float eps, Tensor y) override {
    to_->add_rms_norm(residual, delta, weight, eps, y);
  }
  void add(Tensor residual, Tensor delta) override { to_->add(residual, delta); }
  void linear(Tensor x, const LinearWeight& weight, Tensor y) override {
    to_->linear(x, weight, y);
  }
  void norm_linear(const NormedInput& input, const LinearWeight& weight, Tensor y) override {
    to_->norm_linear(input, weight, y);
  }
  void norm_gate_up(const NormedInput& input, const LinearWeight& gate_up, Tensor scratch,
                    Tensor y) override {
    to_->norm_gate_up(input, gate_up, scratch, y);
  }
  void linear_add(Tensor x, const LinearWeight& weight, Tensor scratch, Tensor residual) override {
    to_->linear_add(x, weight, scratch, residual);
  }
  void qk_norm_rope_rotate(const QkvParams& params) override { to_->qk_norm_rope_rotate(params); }
  void kv_write(const KvWriteParams& params) override { to_->kv_write(params); }
  void kv_encode(const KvEncodeParams& params) override { to_->kv_encode(params); }
  void attention_decode(const AttentionParams& params) override { to_->attention_decode(params); }
  void attention_prefill(const AttentionParams& params) override { to_->attention_prefill(params); }
  void silu_mul(Tensor gate_up, Tensor y) override { to_->silu_mul(gate_up, y); }
  void gather_rows(Tensor x, std::span<const int32_t> rows, Tensor y) override {
    to_->gather_rows(x, rows, y);
  }
  void sample(Tensor logits) override { to_->sample(logits); }

 protected:
  Backend& to() { return *to_; }

 private:
  std::unique_ptr<Backend> to_;
};

}  // namespace kvarn::test
