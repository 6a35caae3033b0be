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

constexpr float kLastPower = 42.f;  // 2^-42 rounds to zero in fixed_point()

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
  // Logits below this have no weight in fixed point.
  __device__ float least() const { return max - __fdividef(kLastPower, factor); }
};
// Weights as integers, in units of 2^-40: a row of 2^18 tokens sums to less than 2^58, and what is
// rounded away in a row is at most 2^18 * 2^-41, 1.2e-7 of the largest weight alone.
__device__ inline uint64_t fixed_point(float weight) { return __float2ull_rn(weight * 0x1p40f); }
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
// Of values below 2^50: a lane's weights.
__device__ inline uint64_t warp_sum_of_small(uint64_t v) {
  constexpr uint32_t kLow = (1u << 23) - 1;  // 32 of these add up to less than 2^28
  const uint32_t low = __reduce_add_sync(kFullWarp, static_cast<uint32_t>(v) & kLow);
  return low + (uint64_t{__reduce_add_sync(kFullWarp, static_cast<uint32_t>(v >> 23))} << 23);
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

// Inclusive sums over the threads of a block of kWarps warps. `partials` is shared memory for
// kWarps values.
template <int kWarps>
__device__ uint64_t block_inclusive_sum(uint64_t v, uint64_t* partials) {
  const int lane = static_cast<int>(threadIdx.x % 32), warp = static_cast<int>(threadIdx.x / 32);
  v = warp_inclusive_sum(v);
  __syncthreads();  // an earlier use of partials is over
  if (lane == 31) partials[warp] = v;
  __syncthreads();
#pragma unroll 1
  for (int w = 0; w < kWarps; ++w) v += w < warp ? partials[w] : 0;
  return v;
}

// A barrier of the cluster that whole warps reach together. (The one of cooperative groups makes no
// such assumption, which costs a fifth of the kernel's code.)
__device__ inline void sync_cluster() {
  asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::
                   : "memory");
}
// Stores 16 bytes at the address that `place` has in block `cta` of the cluster.
__device__ inline void store_shared(void* place, int cta, uint64_t a, uint64_t b) {
  asm volatile(
      "{\n .reg .u32 there;\n mapa.shared::cluster.u32 there, %0, %1;\n"
      " st.shared::cluster.v2.u64 [there], {%2, %3};\n}" ::"r"(
          static_cast<uint32_t>(__cvta_generic_to_shared(place))),
      "r"(cta), "l"(a), "l"(b)
      : "memory");
}

// A barrier in shared memory that counts the bytes of bulk copies (PTX ISA, "mbarrier"), used once.
// start() is of one thread, wait() of any that saw it happen.
struct CopyBarrier {
  uint64_t state;

  __device__ static uint32_t address(const void* shared) {
    return static_cast<uint32_t>(__cvta_generic_to_shared(shared));
  }
  // `bytes` is a multiple of 16, or 0.
  __device__ void start(float* to, const float* from, uint32_t bytes) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(address(&state)) : "memory");
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(address(&state)),
                 "r"(bytes)
                 : "memory");
    if (bytes == 0) return;
    asm volatile(
        "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::
            "r"(address(to)),
        "l"(from), "r"(bytes), "r"(address(&state))
        : "memory");
  }
  __device__ void wait() {
    asm volatile(
        "{\n .reg .pred done;\nwait:\n mbarrier.try_wait.parity.shared::cta.b64 done, [%0], 0;\n"
        " @!done bra wait;\n}" ::"r"(address(&state))
        : "memory");
  }
};

}  // namespace kvarn::cuda
