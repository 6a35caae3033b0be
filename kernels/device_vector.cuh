// Eight elements at a time: one 16-byte access of a 16-bit type, two of f32, widened to f32 in
// registers. Addresses are multiples of 16 bytes. Also the sum over a thread block.
#pragma once

#include <cstdint>

#include "kernels/core/dtype.h"

namespace kvarn::cuda {

constexpr int kVector = 8;  // elements

struct Floats8 {
  float v[kVector];
};

__device__ inline uint32_t pack_bf16(float low, float high) {  // to nearest even
  uint32_t packed;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
  return packed;
}
__device__ inline float low_bf16(uint32_t packed) { return __uint_as_float(packed << 16); }
__device__ inline float high_bf16(uint32_t packed) { return __uint_as_float(packed & 0xffff0000u); }

__device__ inline float low_half(uint32_t packed) {
  float value;
  asm("{.reg .b16 l, h; mov.b32 {l, h}, %1; cvt.f32.f16 %0, l;}" : "=f"(value) : "r"(packed));
  return value;
}

__device__ inline Floats8 load8(const float* from) {
  const float4 a = reinterpret_cast<const float4*>(from)[0];
  const float4 b = reinterpret_cast<const float4*>(from)[1];
  return {{a.x, a.y, a.z, a.w, b.x, b.y, b.z, b.w}};
}
__device__ inline Floats8 load8(const bf16* from) {
  const uint4 a = *reinterpret_cast<const uint4*>(from);
  return {{low_bf16(a.x), high_bf16(a.x), low_bf16(a.y), high_bf16(a.y), low_bf16(a.z),
           high_bf16(a.z), low_bf16(a.w), high_bf16(a.w)}};
}
__device__ inline Floats8 load8(const half* from) {
  const uint4 a = *reinterpret_cast<const uint4*>(from);
  return {{low_half(a.x), low_half(a.x >> 16), low_half(a.y), low_half(a.y >> 16), low_half(a.z),
           low_half(a.z >> 16), low_half(a.w), low_half(a.w >> 16)}};
}

__device__ inline void store8(float* to, const Floats8& x) {
  reinterpret_cast<float4*>(to)[0] = make_float4(x.v[0], x.v[1], x.v[2], x.v[3]);
  reinterpret_cast<float4*>(to)[1] = make_float4(x.v[4], x.v[5], x.v[6], x.v[7]);
}
__device__ inline void store8(bf16* to, const Floats8& x) {
  *reinterpret_cast<uint4*>(to) = make_uint4(pack_bf16(x.v[0], x.v[1]), pack_bf16(x.v[2], x.v[3]),
                                             pack_bf16(x.v[4], x.v[5]), pack_bf16(x.v[6], x.v[7]));
}

// The sum over all threads of a block of whole warps, in every thread; an order that blockDim
// alone fixes. `shared` holds 32 floats and is free again after the caller's next __syncthreads().
__device__ inline float block_sum(float x, float* shared) {
  const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32;
  const int warps = static_cast<int>(blockDim.x) / 32;
  for (int offset = 16; offset > 0; offset /= 2) x += __shfl_xor_sync(~0u, x, offset);
  if (warps == 1) return x;
  if (lane == 0) shared[warp] = x;
  __syncthreads();
  x = lane < warps ? shared[lane] : 0.f;
  for (int offset = 16; offset > 0; offset /= 2) x += __shfl_xor_sync(~0u, x, offset);
  return x;
}

}  // namespace kvarn::cuda
