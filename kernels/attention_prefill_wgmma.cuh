// Copies and products of compute capability 9.0 as prefill attention uses them: mbarrier, TMA,
// named barriers and wgmma in thin wrappers (PTX ISA: "mbarrier", "cp.async.bulk.tensor",
// "Asynchronous Warpgroup Level Matrix Multiply-Accumulate"). Tiles lie in shared memory as halves
// of 64 columns: rows of 128 bytes in the 128-byte swizzle, at addresses that are multiples of
// 1024.
//
// Accumulators are written by products in flight: between commit_products() and wait_products()
// they must not be touched. Only for code of sm_90a.
#pragma once

#include <cuda.h>
#include <cuda_fp16.h>

#include <cstdint>

namespace kvarn::cuda::prefill {

__device__ inline uint32_t shared_address(const void* p) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}

__device__ inline void init_barrier(uint64_t& barrier, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(&barrier)),
               "r"(arrivals)
               : "memory");
}
__device__ inline void expect_bytes(uint64_t& barrier, uint32_t bytes) {
  asm volatile(
      "mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(&barrier)),
      "r"(bytes)
      : "memory");
}
__device__ inline void arrive(uint64_t& barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(&barrier))
               : "memory");
}
// Waits until the phase of this parity is over.
__device__ inline void wait(uint64_t& barrier, int parity) {
  asm volatile(
      "{\n.reg .pred done;\n"
      "again:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
      "@!done bra again;\n}" ::"r"(shared_address(&barrier)),
      "r"(parity)
      : "memory");
}

// A box of a map from (column, row); rows past its end arrive as zeros.
__device__ inline void copy_box(__half* to, const CUtensorMap& map, uint64_t& barrier, int column,
                                int row) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, "
      "%4}], [%2];" ::"r"(shared_address(to)),
      "l"(&map), "r"(shared_address(&barrier)), "r"(column), "r"(row)
      : "memory");
}
// Named barriers of some of the warps; 0 is __syncthreads().
__device__ inline void sync_warps(int barrier, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(barrier), "r"(threads) : "memory");
}
__device__ inline void arrive_warps(int barrier, int threads) {
  asm volatile("bar.arrive %0, %1;" ::"r"(barrier), "r"(threads) : "memory");
}
// Ordinary writes to shared memory before it are seen by wgmma and TMA after it.
__device__ inline void fence_async_proxy() {
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

// Matrix descriptor: 128-byte swizzle, groups of 8 rows 1024 bytes apart. `leading` is the distance
// of 64-column halves where columns are the long axis of the operand (V), else without meaning.
__device__ inline uint64_t descriptor(const __half* tile, uint32_t leading) {
  const uint64_t address = shared_address(tile);
  return (address & 0x3ffff) >> 4 | uint64_t{leading >> 4} << 16 | uint64_t{1024 >> 4} << 32 |
         uint64_t{1} << 62;
}

#define KVARN_D8(i)                                                                               \
  "+f"(d[8 * i]), "+f"(d[8 * i + 1]), "+f"(d[8 * i + 2]), "+f"(d[8 * i + 3]), "+f"(d[8 * i + 4]), \
      "+f"(d[8 * i + 5]), "+f"(d[8 * i + 6]), "+f"(d[8 * i + 7])
#define KVARN_D64                                                                            \
  KVARN_D8(0), KVARN_D8(1), KVARN_D8(2), KVARN_D8(3), KVARN_D8(4), KVARN_D8(5), KVARN_D8(6), \
      KVARN_D8(7)
#define KVARN_D_NAMES                                                                       \
  "{%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23," \
  "%24,%25,%26,%27,%28,%29,%30,%31,%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,"    \
  "%45,%46,%47,%48,%49,%50,%51,%52,%53,%54,%55,%56,%57,%58,%59,%60,%61,%62,%63}"

// d (64 x 128) = or += A (64 x 16, shared) B^T (128 rows of 16, shared).
__device__ inline void multiply_scores(float (&d)[64], uint64_t a, uint64_t b, bool add) {
  asm volatile(
      "{\n.reg .pred add;\nsetp.ne.b32 add, %66, 0;\n"
      "wgmma.mma_async.sync.aligned.m64n128k16.f32.f16.f16 " KVARN_D_NAMES
      ", %64, %65, add, 1, 1, 0, 0;\n}"
      : KVARN_D64
      : "l"(a), "l"(b), "r"(static_cast<int>(add)));
}
// d (64 x 128) += A (64 x 16, registers) B (16 rows of 128, shared).
__device__ inline void multiply_values(float (&d)[64], const uint32_t (&a)[4], uint64_t b) {
  asm volatile("wgmma.mma_async.sync.aligned.m64n128k16.f32.f16.f16 " KVARN_D_NAMES
               ", {%64,%65,%66,%67}, %68, 1, 1, 1, 1;"
               : KVARN_D64
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
}
#undef KVARN_D8
#undef KVARN_D64
#undef KVARN_D_NAMES

__device__ inline void begin_products() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ inline void commit_products() {
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}
template <int kLeft>
__device__ inline void wait_products(float (&d)[64]) {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kLeft) : "memory");
#pragma unroll
  for (int i = 0; i < 64; ++i) asm volatile("" : "+f"(d[i])::"memory");  // not read before
}

// For a launch that may start early (programmatic dependent launch): until the launch before it is
// over and its writes are visible.
__device__ inline void wait_for_launch_before() {
  asm volatile("griddepcontrol.wait;" ::: "memory");
}

// Slot and phase of a ring.
template <int kSlots>
struct Ring {
  int slot = 0, phase = 0;
  __device__ void advance() {
    if (++slot == kSlots) {
      slot = 0;
      phase ^= 1;
    }
  }
};

}  // namespace kvarn::cuda::prefill
