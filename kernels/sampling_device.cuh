// Building blocks of the sampling kernel (sampling.cu): the order of tokens as integers, weights in
// fixed point, scans and a sort over a thread block.
//
// Invariant: everything that decides a token is an integer or one fp32 expression of one logit, so
// no result depends on the order of a sum: not on the number of thread blocks, nor on the batch.
#pragma once

#include <cstdint>

namespace kvarn::cuda {

constexpr unsigned kFullWarp = 0xffffffffu;

// Floats as integers in the same order; -0 counts as +0, which it equals.
__device__ inline uint32_t order_key(float x) {
  const uint32_t bits = __float_as_uint(x + 0.f);
  return bits ^ (bits >> 31 ? 0xffffffffu : 0x80000000u);
}
__device__ inline float key_logit(uint32_t key) {
  return __uint_as_float(key ^ (key >> 31 ? 0x80000000u : 0xffffffffu));
}
constexpr uint32_t kMinusInfKey = 0x007fffffu;        // order_key(-inf)
constexpr uint32_t kLowestKey = 0x00800000u;          // of the lowest finite number
constexpr uint32_t kPlusInfKey = 0xff800000u;         // order_key(+inf)
constexpr uint64_t kNaNRank = 0xffffffffffffffffull;  // above every number: wins each maximum

// A token's place in the order (logit descending, id ascending): larger comes first. Distinct ids
// have distinct ranks.
__device__ inline uint64_t rank_of(uint32_t key, int32_t token) {
  return uint64_t{key} << 32 | (0xffffffffu - static_cast<uint32_t>(token));
}
__device__ inline uint32_t rank_key(uint64_t rank) { return static_cast<uint32_t>(rank >> 32); }
__device__ inline int32_t rank_token(uint64_t rank) {
  return static_cast<int32_t>(0xffffffffu - static_cast<uint32_t>(rank));
}

// e^((logit - max) / temperature), in (0, 1].
struct WeightScale {
  float max, factor;  // factor: log2(e) / temperature
  static __device__ WeightScale of(float max, float inverse_temperature) {
    constexpr float kLog2E = 1.4426950408889634f;
    return {max, inverse_temperature * kLog2E};
  }
  __device__ float weight(float logit) const {
    float power;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(power) : "f"((logit - max) * factor));
    return power;
  }
};
// Weights as integers, in units of 2^-40: a row of 2^18 tokens sums to less than 2^58, and what is
// rounded away in a row is at most 2^18 * 2^-41, 1.2e-7 of the largest weight alone.
__device__ inline uint64_t fixed_point(float weight) { return __float2ull_rn(weight * 0x1p40f); }
// They are zero from (max - logit) / temperature = 41 ln 2 = 28.42 on.
constexpr float kLastWeight = 29.f;

__device__ inline uint32_t lanes_below() {
  uint32_t mask;
  asm("mov.u32 %0, %%lanemask_lt;" : "=r"(mask));
  return mask;
}
__device__ inline uint64_t warp_max(uint64_t v) {
  const uint32_t high = __reduce_max_sync(kFullWarp, static_cast<uint32_t>(v >> 32));
  const uint32_t low = static_cast<uint32_t>(v >> 32) == high ? static_cast<uint32_t>(v) : 0u;
  return uint64_t{high} << 32 | __reduce_max_sync(kFullWarp, low);
}
__device__ inline uint64_t warp_sum(uint64_t v) {
  for (int delta = 16; delta > 0; delta /= 2) v += __shfl_xor_sync(kFullWarp, v, delta);
  return v;
}
// Of values below 2^42.
__device__ inline uint64_t warp_sum_of_small(uint64_t v) {
  constexpr uint32_t kLow = (1u << 21) - 1;  // 32 of these add up to less than 2^26
  const uint32_t low = __reduce_add_sync(kFullWarp, static_cast<uint32_t>(v) & kLow);
  return low + (uint64_t{__reduce_add_sync(kFullWarp, static_cast<uint32_t>(v >> 21))} << 21);
}
template <typename T>
__device__ T warp_inclusive_sum(T v) {
  const int lane = static_cast<int>(threadIdx.x % 32);
  for (int delta = 1; delta < 32; delta *= 2) {
    const T below = __shfl_up_sync(kFullWarp, v, delta);
    if (lane >= delta) v += below;
  }
  return v;
}

// A whole thread block, or its first warp alone: who works on a list of candidates.
template <int kWarps>
struct BlockTeam {
  uint64_t* partials;  // shared memory, kWarps values
  static constexpr int kSize = kWarps * 32;

  __device__ void sync() const { __syncthreads(); }
  __device__ int count(bool predicate) const { return __syncthreads_count(predicate); }
  __device__ uint64_t inclusive_sum(uint64_t v) const {
    const int lane = static_cast<int>(threadIdx.x % 32), warp = static_cast<int>(threadIdx.x / 32);
    v = warp_inclusive_sum(v);
    __syncthreads();  // an earlier use of partials is over
    if (lane == 31) partials[warp] = v;
    __syncthreads();
    for (int w = 0; w < kWarps; ++w) v += w < warp ? partials[w] : 0;
    return v;
  }
};
struct WarpTeam {
  static constexpr int kSize = 32;
  __device__ void sync() const { __syncwarp(); }
  __device__ int count(bool predicate) const { return __popc(__ballot_sync(kFullWarp, predicate)); }
  __device__ uint64_t inclusive_sum(uint64_t v) const { return warp_inclusive_sum(v); }
};

// Bitonic sort of shared memory, descending; `size` is a power of two, at most twice the team.
// Ends with a barrier of the team.
template <typename Team>
__device__ void sort_descending(const Team& team, uint64_t* values, int size) {
  const int pair = static_cast<int>(threadIdx.x);
  for (int run = 2; run <= size; run *= 2) {
    for (int stride = run / 2; stride > 0; stride /= 2) {
      if (pair < size / 2) {
        const int at = 2 * pair - (pair & (stride - 1));
        const uint64_t a = values[at], b = values[at + stride];
        if ((a < b) == ((at & run) == 0)) {
          values[at] = b;
          values[at + stride] = a;
        }
      }
      // The 32 pairs of a warp stay within 64 values while neither this stride nor the next
      // exceeds 32.
      const int next = stride > 1 ? stride / 2 : run;
      if (stride > 32 || next > 32) {
        team.sync();
      } else {
        __syncwarp();
      }
    }
  }
  team.sync();
}

}  // namespace kvarn::cuda
