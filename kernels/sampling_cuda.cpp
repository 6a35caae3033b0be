// The host's half of the GPU sampler: packs a step's rows and token lists, and reads the results.
//
// A recorded launch holds fixed addresses: those of the step, the rows and the results. The lists
// are reached through a pointer in the step, so they alone may move. They start with room for every
// row's tokens or kInitialListBytes, whichever is less; a step that needs more gets it in stage(),
// once. Only lists that a penalty reads are copied.
#include "kernels/sampling_cuda.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <utility>
#include <vector>

#include "kernels/core/check.h"
#include "kernels/cuda_check.h"
#include "kernels/cuda_memory.h"
#include "kernels/sampling_step_cuda.h"

namespace kvarn::cuda {
namespace {

// 256 rows of 65,536 tokens; longer lists in all rows at once are rare enough to wait for memory.
constexpr size_t kInitialListBytes = size_t{64} << 20;
constexpr float kGreedyTemperature = 1e-5f;  // as in sampling_cpu.cpp

bool reads_prompt(const SamplingRow& row) { return row.repetition_penalty != 1.f; }
bool reads_output(const SamplingRow& row) {
  return reads_prompt(row) || row.presence_penalty != 0.f || row.frequency_penalty != 0.f;
}
size_t num_words(const SamplingRow& row) {
  return row.banned.size() + 2 * row.logit_bias.size() +
         (reads_prompt(row) ? row.prompt_tokens.size() : 0) +
         (reads_output(row) ? row.output_tokens.size() : 0);
}

}  // namespace

class Sampler::Impl {
 public:
  explicit Impl(const StepLimits& limits)
      : max_rows_(limits.max_logit_rows),
        vocab_(limits.vocab),
        device_head_(allocate_device(sizeof(DeviceSamplingStep) + rows_bytes())),
        pinned_head_(allocate_pinned(sizeof(DeviceSamplingStep) + rows_bytes())),
        results_(allocate_pinned(static_cast<size_t>(std::max(max_rows_, 1)) *
                                 sizeof(DeviceSampledToken))) {
    prepare_sampling(vocab_);
    std::memset(results_.data(), 0, results_.bytes());
    CUDA_CHECK(cudaEventCreateWithFlags(&copied_, cudaEventDisableTiming));
    try {
      const size_t all_tokens = static_cast<size_t>(std::max(max_rows_, 1)) *
                                static_cast<size_t>(std::max(limits.max_model_len, 1)) *
                                sizeof(uint32_t);
      grow_lists(std::min(all_tokens, kInitialListBytes));
      // A launch before the first stage() finds no rows.
      CUDA_CHECK(cudaMemset(device_head_.data(), 0, sizeof(DeviceSamplingStep)));
      CUDA_CHECK(cudaDeviceSynchronize());
    } catch (...) {
      cudaEventDestroy(copied_);
      throw;
    }
  }
  ~Impl() {
    cudaEventSynchronize(copied_);  // a copy may still read the pinned memory
    cudaEventDestroy(copied_);
  }
  Impl(const Impl&) = delete;
  Impl& operator=(const Impl&) = delete;

  void stage(cudaStream_t stream, std::span<const SamplingRow> rows) {
    CHECK(rows.size() <= static_cast<size_t>(max_rows_), "sampling: more rows than reserved for");
    CUDA_CHECK(cudaEventSynchronize(copied_));
    size_t words = 0;
    for (const SamplingRow& row : rows) words += num_words(row);
    CHECK(words <= std::numeric_limits<uint32_t>::max(), "sampling: lists of a step");
    if (words * sizeof(uint32_t) > list_bytes_) {
      CUDA_CHECK(cudaStreamSynchronize(stream));  // launches may still read the old lists
      grow_lists(std::max(words * sizeof(uint32_t), 2 * list_bytes_));
    }

    auto& step = *reinterpret_cast<DeviceSamplingStep*>(pinned_head_.data());
    step = {reinterpret_cast<const uint32_t*>(device_lists_.data()),
            static_cast<int32_t>(rows.size())};
    auto* staged = rows_of(pinned_head_);
    words_ = 0;
    for (size_t i = 0; i < rows.size(); ++i) staged[i] = pack(rows[i]);
    CHECK(words_ == words, "sampling: the lists were counted before they were packed");

    const size_t head_bytes = sizeof(DeviceSamplingStep) + rows.size() * sizeof(DeviceSamplingRow);
    CUDA_CHECK(cudaMemcpyAsync(device_head_.data(), pinned_head_.data(), head_bytes,
                               cudaMemcpyHostToDevice, stream));
    if (words > 0) {
      CUDA_CHECK(cudaMemcpyAsync(device_lists_.data(), pinned_lists_.data(),
                                 words * sizeof(uint32_t), cudaMemcpyHostToDevice, stream));
    }
    CUDA_CHECK(cudaEventRecord(copied_, stream));
    num_staged_ = rows.size();
  }

  void run(cudaStream_t stream, Tensor logits) {
    CHECK(logits.dims() == 2 && logits.dtype() == DType::kF32 && logits.dim(1) == vocab_,
          "sampling: logits are f32 [rows, vocab]");
    CHECK(reinterpret_cast<uintptr_t>(logits.raw()) % 16 == 0, "sampling: logits are aligned");
    launch_sampling(stream, {logits.data<float>(), static_cast<int32_t>(logits.dim(0)), vocab_,
                             reinterpret_cast<const DeviceSamplingStep*>(device_head_.data()),
                             rows_of(device_head_), results()});
  }

  void collect(std::span<SampledToken> tokens) const {
    CHECK(tokens.size() <= num_staged_, "sampling: more tokens asked for than rows were staged");
    for (size_t i = 0; i < tokens.size(); ++i) {
      const DeviceSampledToken& result = results()[i];
      SampledToken& token = tokens[i];
      token.token = result.token;
      token.logprob = result.logprob;
      token.non_finite = result.non_finite != 0;
      token.top_logprobs.clear();
      for (int j = 0; j < result.num_top; ++j) {
        token.top_logprobs.push_back({result.top_tokens[j], result.top_logprobs[j]});
      }
    }
  }

 private:
  size_t rows_bytes() const {
    return static_cast<size_t>(std::max(max_rows_, 1)) * sizeof(DeviceSamplingRow);
  }
  // The rows follow the step.
  static DeviceSamplingRow* rows_of(const Buffer& head) {
    static_assert(sizeof(DeviceSamplingStep) % alignof(DeviceSamplingRow) == 0);
    return reinterpret_cast<DeviceSamplingRow*>(head.data() + sizeof(DeviceSamplingStep));
  }
  DeviceSampledToken* results() const {
    return reinterpret_cast<DeviceSampledToken*>(results_.data());
  }

  void grow_lists(size_t bytes) {
    list_bytes_ = 0;
    pinned_lists_ = Buffer();
    device_lists_ = Buffer();  // before the new ones: memory may be short
    pinned_lists_ = allocate_pinned(bytes);
    device_lists_ = allocate_device(bytes);
    list_bytes_ = bytes;
  }

  DeviceSamplingRow pack(const SamplingRow& row) {
    CHECK(row.num_logprobs <= kMaxTopLogprobs, "sampling: more logprobs than the API allows");
    DeviceSamplingRow out{};
    out.seed = row.seed;
    out.choice = row.choice;
    out.output_position = row.output_position;
    out.temperature = row.temperature;
    out.inverse_temperature = 1.f / row.temperature;
    out.min_p_offset = row.min_p > 0.f ? row.temperature * std::log(row.min_p)
                                       : -std::numeric_limits<float>::infinity();
    out.top_p = row.top_p;
    out.top_k = row.top_k > 0 && row.top_k < vocab_ ? row.top_k : 0;
    out.greedy = row.temperature < kGreedyTemperature || row.top_k == 1 || row.top_p <= 0.f;
    out.num_logprobs = row.num_logprobs;
    out.repetition_penalty = row.repetition_penalty;
    out.presence_penalty = row.presence_penalty;
    out.frequency_penalty = row.frequency_penalty;
    out.banned = append(row.banned);
    out.bias = append_bias(row.logit_bias);
    if (reads_prompt(row)) out.prompt = append(row.prompt_tokens);
    if (reads_output(row)) out.output = append(row.output_tokens);
    return out;
  }

  WordRange append(std::span<const int32_t> tokens) {
    const WordRange range{static_cast<uint32_t>(words_), static_cast<uint32_t>(tokens.size())};
    if (!tokens.empty()) {
      std::memcpy(pinned_lists_.data() + words_ * sizeof(uint32_t), tokens.data(),
                  tokens.size_bytes());
    }
    words_ += tokens.size();
    return range;
  }
  WordRange append_bias(std::span<const LogitBias> bias) {
    const auto by_token = [](const LogitBias& a, const LogitBias& b) { return a.token < b.token; };
    if (!std::is_sorted(bias.begin(), bias.end(), by_token)) {
      sorted_bias_.assign(bias.begin(), bias.end());
      std::stable_sort(sorted_bias_.begin(), sorted_bias_.end(), by_token);
      bias = sorted_bias_;
    }
    static_assert(sizeof(LogitBias) == 2 * sizeof(uint32_t));
    const WordRange range{static_cast<uint32_t>(words_), static_cast<uint32_t>(2 * bias.size())};
    if (!bias.empty()) {
      std::memcpy(pinned_lists_.data() + words_ * sizeof(uint32_t), bias.data(), bias.size_bytes());
    }
    words_ += 2 * bias.size();
    return range;
  }

  const int max_rows_, vocab_;
  Buffer device_head_;  // DeviceSamplingStep, then max_rows_ of DeviceSamplingRow
  Buffer pinned_head_;
  Buffer results_;  // DeviceSampledToken, pinned: the kernel itself writes them
  Buffer device_lists_, pinned_lists_;
  size_t list_bytes_ = 0, words_ = 0;
  size_t num_staged_ = 0;
  std::vector<LogitBias> sorted_bias_;
  cudaEvent_t copied_ = nullptr;  // the pinned memory may be written again
};

Sampler::Sampler(const StepLimits& limits) : impl_(std::make_unique<Impl>(limits)) {}
Sampler::~Sampler() = default;

void Sampler::stage(cudaStream_t stream, std::span<const SamplingRow> rows) {
  impl_->stage(stream, rows);
}
void Sampler::run(cudaStream_t stream, Tensor logits) { impl_->run(stream, logits); }
void Sampler::collect(std::span<SampledToken> tokens) const { impl_->collect(tokens); }

}  // namespace kvarn::cuda
