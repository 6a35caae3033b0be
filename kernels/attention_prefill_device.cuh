// Device code that both prefill attention kernels share: which key tile comes from where, and what
// happens to the accumulators at the end. Both keep them as mma.m16n8k16 does (PTX ISA, "Matrix
// fragments"): lane 4g + q holds columns 8j + 2q + {0, 1} of rows g and g + 8, j = 0..15.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "kernels/attention_prefill.h"

namespace kvarn::cuda::prefill {

__device__ inline int own_block(const QueryTile& tile) { return tile.position / kTile; }
// Index of the tile's first query within its block; not 0 only for a late row.
__device__ inline int first_in_block(const QueryTile& tile) { return tile.position % kTile; }

// Whether `block`, at most own_block(tile), is read from k_rows/v_rows.
__device__ inline bool from_rows(const QueryTile& tile, int block, bool chunk_exact) {
  if (first_in_block(tile) != 0) return false;
  return block == own_block(tile) ||
         (block >= tile.chunk_block && (chunk_exact || block < kSinkBlocks));
}
// First row of `block` in k_rows/v_rows, or in scratch.
__device__ inline int row_of_block(const QueryTile& tile, int block, bool rows) {
  return rows ? tile.first_row + kTile * (block - own_block(tile))
              : kTile * (tile.scratch_tile + block);
}

__device__ inline float exp2_approx(float x) {  // 2 ulp; 0 for -inf
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

__device__ inline float quad_max(float x) {
  x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, 1));
  return fmaxf(x, __shfl_xor_sync(0xffffffffu, x, 2));
}
__device__ inline float quad_sum(float x) {
  x += __shfl_xor_sync(0xffffffffu, x, 1);
  return x + __shfl_xor_sync(0xffffffffu, x, 2);
}

__device__ inline uint32_t pack_half2(float low, float high) {
  const __half2 pair = __floats2half2_rn(low, high);
  return *reinterpret_cast<const uint32_t*>(&pair);
}
__device__ inline uint32_t pack_bf162(float low, float high) {
  const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
  return *reinterpret_cast<const uint32_t*>(&pair);
}

// One row of accumulators, o[2j + c] = column 8j + 2q + c: multiplied by H_128 / sqrt(128), H in
// the order of Sylvester (butterflies over the bits of the column). Bit 0 is c, bits 1 and 2 are
// the lane's q, bits 3 to 6 are j.
__device__ inline void rotate_back(float (&o)[32], int q) {
#pragma unroll
  for (int stride = 1; stride < 32; stride *= 2) {
#pragma unroll
    for (int i = 0; i < 32; ++i) {
      if ((i & stride) != 0) continue;
      const float a = o[i], b = o[i + stride];
      o[i] = a + b;
      o[i + stride] = a - b;
    }
  }
#pragma unroll
  for (int bit = 1; bit <= 2; bit *= 2) {
    const float sign = (q & bit) != 0 ? -1.0f : 1.0f;
#pragma unroll
    for (int i = 0; i < 32; ++i) {
      o[i] = fmaf(sign, o[i], __shfl_xor_sync(0xffffffffu, o[i], bit));
    }
  }
}

}  // namespace kvarn::cuda::prefill
