// A backend that behaves as one on a device, computed by the CPU: memory of its own into which
// upload() copies, step arrays at fixed addresses, recordings that run the recorded calls again.
// What the models and the engine do for a GPU is tested with it on any machine; the kernels are
// not.
#pragma once

#include <cstring>
#include <memory>
#include <new>
#include <utility>
#include <vector>

#include "tests/support/forwarding_backend.h"

namespace kvarn::test {

struct DeviceLikeOptions {
  size_t total_bytes = size_t{1} << 30;
  int threads = 2;
};

class DeviceLikeBackend final : public ForwardingBackend {
 public:
  explicit DeviceLikeBackend(const DeviceLikeOptions& options = {})
      : ForwardingBackend(make_cpu_backend({.threads = options.threads})),
        total_(options.total_bytes) {
    used() = 0;
  }

  std::string name() const override { return "like a device, " + ForwardingBackend::name(); }
  int threads() const override { return 1; }
  std::optional<DeviceMemory> device_memory() const override {
    return DeviceMemory{total_ - used(), total_};
  }
  Buffer allocate(size_t bytes) override {
    ++counts->allocations;
    if (bytes == 0) return {};
    if (bytes > total_ - used()) throw std::bad_alloc();
    used() += bytes;
    auto* data = ::operator new (bytes, std::align_val_t{256});
    std::memset(data, 0xff, bytes);  // NaN: what is read before it is written shows
    return {data, bytes, [](void* p, size_t n) {
              used() -= n;
              ::operator delete (p, std::align_val_t{256});
            }};
  }
  void* upload(const void* host, size_t bytes, Buffer& into, size_t offset) override {
    CHECK(offset + bytes <= into.bytes(), "upload: the buffer is large enough");
    return std::memcpy(into.data() + offset, host, bytes);
  }
  void reserve(const StepLimits& limits) override {
    to().reserve(limits);
    const auto rows = static_cast<size_t>(limits.max_rows);
    token_ids_.reserve(rows);
    positions_.reserve(rows);
    slots_.reserve(rows);
    sequences_.reserve(static_cast<size_t>(limits.max_sequences));
    block_pages_.reserve(static_cast<size_t>(limits.max_blocks));
    tiles_.reserve(static_cast<size_t>(limits.max_encode_tiles));
    logit_rows_.reserve(static_cast<size_t>(limits.max_logit_rows));
  }
  StepInput begin_step(const StepInput& host, std::span<const SamplingRow> sampling) override {
    to().begin_step(host, sampling);
    num_sampled_ = sampling.size();
    ++counts->steps;
    StepInput input = host;
    input.token_ids = stage(host.token_ids, token_ids_);
    input.positions = stage(host.positions, positions_);
    input.slots = stage(host.slots, slots_);
    input.sequences = stage(host.sequences, sequences_);
    input.block_pages = stage(host.block_pages, block_pages_);
    input.logit_rows = stage(host.logit_rows, logit_rows_);
    std::vector<EncodeTile> all(host.encode_before.begin(), host.encode_before.end());
    all.insert(all.end(), host.encode_in_layer.begin(), host.encode_in_layer.end());
    const std::span<const EncodeTile> tiles = stage(std::span<const EncodeTile>(all), tiles_);
    input.encode_before = tiles.first(host.encode_before.size());
    input.encode_in_layer = tiles.subspan(host.encode_before.size());
    return input;
  }
  std::unique_ptr<Recording> record(const std::function<void()>& ops) override {
    ++counts->recordings;
    return std::make_unique<Calls>(ops, counts);
  }

  void sample(Tensor logits) override {
    to().sample(logits.rows(0, static_cast<int64_t>(num_sampled_)));
  }

  // Outlives the backend, for tests that give it away.
  struct Counts {
    int allocations = 0, steps = 0, recordings = 0, replays = 0;
  };
  const std::shared_ptr<Counts> counts = std::make_shared<Counts>();

 private:
  class Calls final : public Recording {
   public:
    Calls(std::function<void()> ops, std::shared_ptr<Counts> counts)
        : ops_(std::move(ops)), counts_(std::move(counts)) {}
    void replay() override {
      ++counts_->replays;
      ops_();
    }

   private:
    std::function<void()> ops_;
    std::shared_ptr<Counts> counts_;
  };

  static size_t& used() {  // of the one device; a Buffer's deleter knows no backend
    static size_t bytes = 0;
    return bytes;
  }
  template <typename T>
  static std::span<const T> stage(std::span<const T> from, std::vector<T>& to) {
    CHECK(from.size() <= to.capacity(), "the step is within the limits of reserve()");
    to.assign(from.begin(), from.end());
    return {to.data(), from.size()};
  }

  size_t total_;
  size_t num_sampled_ = 0;
  std::vector<int32_t> token_ids_, positions_, logit_rows_;
  std::vector<int64_t> slots_;
  std::vector<AttentionSequence> sequences_;
  std::vector<BlockPages> block_pages_;
  std::vector<EncodeTile> tiles_;
};

}  // namespace kvarn::test
