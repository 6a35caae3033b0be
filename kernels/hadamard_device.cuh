// The rotation of KVarN over one warp: the fast Walsh-Hadamard transform of 128 values, 4 a lane,
// in natural order (the order of butterflies of hadamard.h, so the same fp32 bits). Two stages meet
// in the lane, five by shuffles. The matrix / sqrt(128) is symmetric and orthonormal: the same
// routine rotates and rotates back. Source: arXiv 2606.03458. Device code only.
#pragma once

namespace kvarn::cuda {

constexpr float kHadamardScale128 = 0.088388347648318447f;  // 1 / sqrt(128)

// Value 4 * lane + i of the vector is x[i]; all 32 lanes take part. Without the factor 1/sqrt(128).
__device__ __forceinline__ void hadamard_128_unscaled(float (&x)[4], int lane) {
  const float a = x[0] + x[1], b = x[0] - x[1], c = x[2] + x[3], d = x[2] - x[3];
  x[0] = a + c;
  x[1] = b + d;
  x[2] = a - c;
  x[3] = b - d;
#pragma unroll
  for (int stride = 1; stride < 32; stride *= 2) {
    const float sign = (lane & stride) != 0 ? -1.f : 1.f;  // the upper lane takes the difference
#pragma unroll
    for (float& v : x) v = fmaf(v, sign, __shfl_xor_sync(~0u, v, stride));
  }
}

// x <- x H / sqrt(128).
__device__ __forceinline__ void hadamard_rotate_128(float (&x)[4], int lane) {
  hadamard_128_unscaled(x, lane);
#pragma unroll
  for (float& v : x) v *= kHadamardScale128;
}

// The stages of strides 1 to 32 of 64 values, 8 a lane: value 8 * (lane % 8) + i of a vector is
// x[i]. With the butterfly of two such vectors, 64 apart, that is the transform of 128 values in
// natural order, which 8 lanes do with 24 shuffles a lane for 16 values (4 values a lane: 20 for
// 4).
__device__ __forceinline__ void hadamard_stages_8(float (&x)[8], int lane) {
#pragma unroll
  for (int stride = 1; stride < 8; stride *= 2) {
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      if ((i & stride) != 0) continue;
      const float a = x[i], b = x[i + stride];
      x[i] = a + b;
      x[i + stride] = a - b;
    }
  }
#pragma unroll
  for (int stride = 1; stride < 8; stride *= 2) {
    const float sign = (lane & stride) != 0 ? -1.f : 1.f;
#pragma unroll
    for (float& v : x) v = fmaf(v, sign, __shfl_xor_sync(~0u, v, stride));
  }
}

}  // namespace kvarn::cuda
