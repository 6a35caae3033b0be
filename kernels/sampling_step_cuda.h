// What the sampler's host and device halves share: the parameters of a row, where its token lists
// lie, and what comes back. Written by sampling_cuda.cpp, read by sampling.cu (and the other way
// round for results). Plain data.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

namespace kvarn::cuda {

// The API allows 20 (docs/api.md, "top_logprobs").
constexpr int kMaxTopLogprobs = 20;

// Entries [begin, begin + count) of the step's lists, in 32-bit words. A logit bias is two words.
struct WordRange {
  uint32_t begin, count;
};

struct DeviceSamplingRow {
  uint64_t seed;
  uint32_t choice, output_position;
  float temperature, inverse_temperature;
  float min_p_offset;  // temperature * log(min_p), as added to the largest logit; -inf: off
  float top_p;         // 1 or more: off
  int32_t top_k;       // 0: off
  int32_t greedy;
  int32_t num_logprobs;  // -1: none
  float repetition_penalty, presence_penalty, frequency_penalty;
  WordRange banned, bias;    // bias: sorted by token, equal tokens in the order given
  WordRange prompt, output;  // empty where no penalty reads them
};

// Lies at a fixed address of device memory, so that a recorded launch finds each step's rows.
struct DeviceSamplingStep {
  const uint32_t* words;  // the lists
  int32_t num_rows;
};

struct DeviceSampledToken {
  int32_t token;
  float logprob;
  int32_t non_finite;
  int32_t num_top;
  int32_t top_tokens[kMaxTopLogprobs];
  float top_logprobs[kMaxTopLogprobs];
};

struct SamplingLaunch {
  const float* logits;  // [num_rows, vocab]
  int32_t num_rows, vocab;
  const DeviceSamplingStep* step;
  const DeviceSamplingRow* rows;
  DeviceSampledToken* results;  // written for the step's rows only
};

// The largest vocabulary a row's shared memory holds on any GPU of compute capability 9.
constexpr int kMaxSamplingVocab = 262'144;

// Once per device, before the first launch. Throws where the device has no thread block clusters.
void prepare_sampling(int vocab);
void launch_sampling(cudaStream_t stream, const SamplingLaunch& launch);

}  // namespace kvarn::cuda
