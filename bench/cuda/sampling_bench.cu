// Times the GPU sampler over rows of 151,936 logits, against a plain read of them. Logits are as a
// language model's (sixty tokens stand out of a normal bulk) or flat (uniform, the worst case for
// the search of a nucleus); they rotate through memory, though in a step the head has just written
// them and a small batch's are in the L2 cache.
#include <cuda_runtime.h>

#include <cstdio>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "bench/cuda/timing.h"
#include "kernels/cuda_check.h"
#include "kernels/sampling_cuda.h"

namespace kvarn::bench {
namespace {

constexpr int kVocab = 151'936;

__device__ uint32_t hash(uint64_t x) {  // splitmix64
  x += 0x9e3779b97f4a7c15ull;
  x = (x ^ x >> 30) * 0xbf58476d1ce4e5b9ull;
  x = (x ^ x >> 27) * 0x94d049bb133111ebull;
  return static_cast<uint32_t>((x ^ x >> 31) >> 32);
}

__global__ void fill_logits(float* logits, int64_t count, bool flat) {
  const int64_t i = int64_t{blockIdx.x} * blockDim.x + threadIdx.x;
  if (i >= count) return;
  const float a = (static_cast<float>(hash(2 * i)) + 1.f) * 0x1p-32f;
  const float b = static_cast<float>(hash(2 * i + 1)) * 0x1p-32f;
  if (flat) {
    logits[i] = 16.f * b - 8.f;
    return;
  }
  logits[i] = 2.3f * sqrtf(-2.f * logf(a)) * cospif(2.f * b);
  // One token in 2,532, at a pseudo-random place: from 20 down.
  const uint32_t place = hash(~i) % 2532;
  if (place == 0) logits[i] = 20.f - 12.f * b;
}

struct Setting {
  std::string name;
  std::function<void(SamplingRow&)> change;
  bool flat = false;
};

void run(Report& report, const Setting& setting, int rows, double read_us) {
  const size_t bytes = static_cast<size_t>(rows) * kVocab * sizeof(float);
  const int variants = variants_for(bytes);
  DeviceBytes memory(bytes * static_cast<size_t>(variants));
  auto* logits = reinterpret_cast<float*>(memory.data());
  const int64_t count = int64_t{rows} * kVocab * variants;
  fill_logits<<<static_cast<unsigned>((count + 255) / 256), 256>>>(logits, count, setting.flat);
  CUDA_CHECK(cudaGetLastError());

  std::vector<int32_t> prompt, output;
  for (int i = 0; i < 2048; ++i) prompt.push_back(i * 7919 % kVocab);
  for (int i = 0; i < 1024; ++i) output.push_back((i % 600) * 104729 % kVocab);
  std::vector<SamplingRow> staged(static_cast<size_t>(rows));
  for (size_t i = 0; i < staged.size(); ++i) {
    staged[i].seed = i;
    staged[i].prompt_tokens = prompt;
    staged[i].output_tokens = output;
    setting.change(staged[i]);
  }
  StepLimits limits;
  limits.max_logit_rows = rows;
  limits.vocab = kVocab;
  limits.max_model_len = 4096;
  cuda::Sampler sampler(limits);
  sampler.stage(nullptr, staged);
  CUDA_CHECK(cudaDeviceSynchronize());

  const double us = time_us(variants, [&](cudaStream_t stream, int variant) {
    sampler.run(stream, Tensor::of(logits + int64_t{variant} * rows * kVocab,
                                   {int64_t{rows}, int64_t{kVocab}}));
  });
  std::vector<SampledToken> tokens(staged.size());
  sampler.collect(tokens);
  for (const SampledToken& token : tokens) {
    if (token.token < 0 || token.token >= kVocab) std::printf("no token was chosen\n");
  }
  Row row;
  row.name = "sampling-" + setting.name + "-rows" + std::to_string(rows);
  row.value = us;
  row.against = "plain read of the logits";
  row.against_value = read_us;
  row.ratio = us / read_us;
  report.add(row);
}

}  // namespace
}  // namespace kvarn::bench

int main(int argc, char** argv) {
  using namespace kvarn;
  using namespace kvarn::bench;
  Report report(argc, argv);
  const auto qwen = [](SamplingRow& row) {
    row.temperature = 0.6f;
    row.top_k = 20;
    row.top_p = 0.95f;
  };
  const std::vector<Setting> settings = {
      {"greedy", [](SamplingRow& row) { row.temperature = 0.f; }},
      {"temperature", [](SamplingRow&) {}},
      {"topk20-topp", qwen},
      {"topp", [](SamplingRow& row) { row.top_p = 0.95f; }},
      {"topk1000", [](SamplingRow& row) { row.top_k = 1000; }},
      {"minp", [](SamplingRow& row) { row.min_p = 0.05f; }},
      {"penalties",
       [&](SamplingRow& row) {
         qwen(row);
         row.repetition_penalty = 1.1f;
         row.presence_penalty = 0.5f;
         row.frequency_penalty = 0.1f;
       }},
      {"logprobs20",
       [&](SamplingRow& row) {
         qwen(row);
         row.num_logprobs = 20;
       }},
      {"flat-temperature", [](SamplingRow&) {}, true},
      {"flat-topk20-topp", qwen, true},
      {"flat-topp", [](SamplingRow& row) { row.top_p = 0.95f; }, true},
  };
  for (const int rows : {1, 8, 32, 128, 256}) {
    const double read_us = read_limit_us(static_cast<size_t>(rows) * kVocab * sizeof(float));
    for (const Setting& setting : settings) run(report, setting, rows, read_us);
  }
  return 0;
}
