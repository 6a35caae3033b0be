// QK norm, rotary embedding and the Hadamard rotation in one pass: each head is read once, stays in
// one warp's registers in fp32, and is written once as fp16. Twin: rope_cpu.cpp (the same order of
// operations but for the sum of squares). head_dim 128 has its own kernel; any other even head_dim
// up to 512 goes through the plain one, without rotation (coded pages exist for 128 only).
// Sources: RoFormer, arXiv 2104.09864 (rotary embedding); arXiv 2606.03458 (rotation).
#include <cuda_runtime.h>

#include "kernels/cuda_check.h"
#include "kernels/hadamard_device.cuh"
#include "kernels/kv_layout.h"
#include "kernels/ops_cuda.h"

namespace kvarn::cuda {
namespace {

constexpr int kThreads = 256, kWarps = kThreads / 32;
constexpr int kMaxHeadDim = 512;

struct RopeArgs {
  const bf16* qkv;           // [rows][q heads, k heads, v heads][head_dim]
  const int32_t* positions;  // [rows]
  const float* cos;          // [positions][head_dim / 2]
  const float* sin;
  const void* q_norm;  // [head_dim] bf16 or f32; nullptr: no norm
  const void* k_norm;
  half* q;  // [rows][q_heads][head_dim]
  half* k;  // [rows][kv_heads][head_dim]
  half* v;
  int64_t num_heads_in_all;  // rows * (q_heads + 2 kv_heads)
  int q_heads, kv_heads, head_dim;
  float eps;
};

// Where a head of the fused rows goes, and what is done to it.
struct Head {
  int64_t row;
  const void* norm;
  half* out;
  bool rope;
};
__device__ __forceinline__ Head head_of(const RopeArgs& args, int64_t at) {
  const int heads = args.q_heads + 2 * args.kv_heads;
  const int64_t row = at / heads;
  const int head = static_cast<int>(at - row * heads);
  const int kv = head - args.q_heads;
  if (kv < 0) {
    return {row, args.q_norm, args.q + (row * args.q_heads + head) * args.head_dim, true};
  }
  if (kv < args.kv_heads) {
    return {row, args.k_norm, args.k + (row * args.kv_heads + kv) * args.head_dim, true};
  }
  const int64_t value = row * args.kv_heads + kv - args.kv_heads;
  return {row, nullptr, args.v + value * args.head_dim, false};
}

__device__ __forceinline__ float warp_sum(float x) {
#pragma unroll
  for (int stride = 16; stride > 0; stride /= 2) x += __shfl_xor_sync(~0u, x, stride);
  return x;
}

__device__ __forceinline__ float widen(bf16 x) { return __uint_as_float(uint32_t{x.bits} << 16); }
__device__ __forceinline__ float widen(float x) { return x; }

// Rounds to fp16, to the largest finite one beyond it; NaN stays NaN (as to_half does).
__device__ __forceinline__ uint16_t half_bits(float x) {
  uint16_t bits;
  asm("{\n\t.reg .f32 t;\n\t"
      "min.NaN.f32 t, %1, 0f477FE000;\n\t"  // 65504
      "max.NaN.f32 t, t, 0fC77FE000;\n\t"
      "cvt.rn.f16.f32 %0, t;\n\t}"
      : "=h"(bits)
      : "f"(x));
  return bits;
}

__device__ __forceinline__ void load4(const bf16* p, float (&x)[4]) {
  const uint2 bits = *reinterpret_cast<const uint2*>(p);
  x[0] = __uint_as_float(bits.x << 16);
  x[1] = __uint_as_float(bits.x & 0xffff0000u);
  x[2] = __uint_as_float(bits.y << 16);
  x[3] = __uint_as_float(bits.y & 0xffff0000u);
}
__device__ __forceinline__ void load4(const float* p, float (&x)[4]) {
  const float4 v = *reinterpret_cast<const float4*>(p);
  x[0] = v.x;
  x[1] = v.y;
  x[2] = v.z;
  x[3] = v.w;
}

// One warp a head, values 4 * lane .. 4 * lane + 3 in each lane: 256 contiguous bytes in, 256 out.
template <typename Weight, bool kRotate>
__global__ void __launch_bounds__(kThreads) rope_128_kernel(RopeArgs args) {
  constexpr int kDim = 128, kHalfDim = kDim / 2;
  const int lane = threadIdx.x % 32;
  const int64_t at = int64_t{blockIdx.x} * kWarps + threadIdx.x / 32;
  if (at >= args.num_heads_in_all) return;  // whole warps leave
  float x[4];
  load4(args.qkv + at * kDim + 4 * lane, x);
  const Head head = head_of(args, at);
  if (head.rope) {
    const int64_t table = int64_t{args.positions[head.row]} * kHalfDim + 4 * (lane % 16);
    float c[4], s[4];
    load4(args.cos + table, c);
    load4(args.sin + table, s);
    if (head.norm != nullptr) {
      float weight[4];
      load4(static_cast<const Weight*>(head.norm) + 4 * lane, weight);
      const float squares = warp_sum((x[0] * x[0] + x[1] * x[1]) + (x[2] * x[2] + x[3] * x[3]));
      const float scale = 1.f / sqrtf(squares / kDim + args.eps);
#pragma unroll
      for (int i = 0; i < 4; ++i) x[i] = x[i] * scale * weight[i];
    }
    // The pair of value i is i + 64: lanes 16 apart. (a, b) -> (a c - b s, b c + a s).
    const float sign = lane < 16 ? -1.f : 1.f;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float other = __shfl_xor_sync(~0u, x[i], 16);
      x[i] = x[i] * c[i] + sign * (other * s[i]);
    }
  }
  if constexpr (kRotate) hadamard_rotate_128(x, lane);
  uint2 packed;
  packed.x = half_bits(x[0]) | uint32_t{half_bits(x[1])} << 16;
  packed.y = half_bits(x[2]) | uint32_t{half_bits(x[3])} << 16;
  *reinterpret_cast<uint2*>(head.out + 4 * lane) = packed;
}

// Any even head_dim up to kMaxHeadDim: lane l owns the pairs l, l + 32, ...
template <typename Weight>
__global__ void __launch_bounds__(kThreads) rope_any_kernel(RopeArgs args) {
  constexpr int kMaxPairs = kMaxHeadDim / 2 / 32;  // of a lane
  const int lane = threadIdx.x % 32, half_dim = args.head_dim / 2;
  const int64_t at = int64_t{blockIdx.x} * kWarps + threadIdx.x / 32;
  if (at >= args.num_heads_in_all) return;
  const bf16* source = args.qkv + at * args.head_dim;
  const Head head = head_of(args, at);
  float a[kMaxPairs], b[kMaxPairs];
  float squares = 0.f;
#pragma unroll
  for (int n = 0; n < kMaxPairs; ++n) {
    const int i = lane + 32 * n;
    a[n] = i < half_dim ? widen(source[i]) : 0.f;
    b[n] = i < half_dim ? widen(source[i + half_dim]) : 0.f;
    squares += a[n] * a[n] + b[n] * b[n];
  }
  if (head.norm != nullptr) {
    const auto* weight = static_cast<const Weight*>(head.norm);
    const float scale =
        1.f / sqrtf(warp_sum(squares) / static_cast<float>(args.head_dim) + args.eps);
#pragma unroll
    for (int n = 0; n < kMaxPairs; ++n) {
      const int i = lane + 32 * n;
      if (i >= half_dim) continue;
      a[n] = a[n] * scale * widen(weight[i]);
      b[n] = b[n] * scale * widen(weight[i + half_dim]);
    }
  }
  const int64_t table = int64_t{args.positions[head.row]} * half_dim;
#pragma unroll
  for (int n = 0; n < kMaxPairs; ++n) {
    const int i = lane + 32 * n;
    if (i >= half_dim) continue;
    float first = a[n], second = b[n];
    if (head.rope) {
      const float c = args.cos[table + i], s = args.sin[table + i];
      first = a[n] * c - b[n] * s;
      second = b[n] * c + a[n] * s;
    }
    head.out[i].bits = half_bits(first);
    head.out[i + half_dim].bits = half_bits(second);
  }
}

template <typename Weight>
void launch(cudaStream_t stream, const RopeArgs& args, bool rotate) {
  const auto blocks = static_cast<unsigned>((args.num_heads_in_all + kWarps - 1) / kWarps);
  if (args.head_dim != 128) {
    rope_any_kernel<Weight><<<blocks, kThreads, 0, stream>>>(args);
  } else if (rotate) {
    rope_128_kernel<Weight, true><<<blocks, kThreads, 0, stream>>>(args);
  } else {
    rope_128_kernel<Weight, false><<<blocks, kThreads, 0, stream>>>(args);
  }
  CUDA_CHECK(cudaGetLastError());
}

}  // namespace

void qk_norm_rope_rotate(cudaStream_t stream, const QkvParams& params) {
  const int64_t heads = params.q_heads + 2 * int64_t{params.kv_heads};
  const int64_t rows = params.qkv.dims() == 2 ? params.qkv.dim(0) : 0;
  CHECK(params.qkv.dims() == 2 && params.qkv.dtype() == DType::kBF16 &&
            params.qkv.dim(1) == heads * params.head_dim,
        "qk_norm_rope_rotate: qkv is bf16 [rows, (q_heads + 2 kv_heads) * head_dim]");
  CHECK(params.head_dim <= kMaxHeadDim && params.head_dim % 2 == 0,
        "qk_norm_rope_rotate: head_dim is even, at most 512");
  CHECK(!params.rotate || params.head_dim == kCodedHeadDim,
        "qk_norm_rope_rotate: only head_dim 128 is rotated on a GPU");
  const auto is_output = [&](const Tensor& t, int out_heads) {
    return t.dtype() == DType::kF16 && t.size() == rows * out_heads * params.head_dim;
  };
  CHECK(is_output(params.q, params.q_heads) && is_output(params.k, params.kv_heads) &&
            is_output(params.v, params.kv_heads),
        "qk_norm_rope_rotate: q, k and v are f16 [rows, heads, head_dim]");
  for (const Tensor& table : {params.rope.cos, params.rope.sin}) {
    CHECK(table.dtype() == DType::kF32 && table.dims() == 2 && table.dim(1) == params.head_dim / 2,
          "qk_norm_rope_rotate: RoPE tables are f32 [positions, head_dim / 2]");
  }
  DType weight = DType::kBF16;
  for (const Tensor& norm : {params.q_norm, params.k_norm}) {
    if (norm.empty()) continue;
    weight = norm.dtype();
    CHECK(norm.size() == params.head_dim && (weight == DType::kBF16 || weight == DType::kF32),
          "qk_norm_rope_rotate: norm weights are bf16 or f32 [head_dim]");
  }
  CHECK(params.q_norm.empty() || params.k_norm.empty() ||
            params.q_norm.dtype() == params.k_norm.dtype(),
        "qk_norm_rope_rotate: both norm weights have one dtype");
  if (rows == 0) return;
  RopeArgs args{};
  args.qkv = params.qkv.data<bf16>();
  args.positions = params.positions;
  args.cos = params.rope.cos.data<float>();
  args.sin = params.rope.sin.data<float>();
  args.q_norm = params.q_norm.empty() ? nullptr : params.q_norm.raw();
  args.k_norm = params.k_norm.empty() ? nullptr : params.k_norm.raw();
  args.q = params.q.data<half>();
  args.k = params.k.data<half>();
  args.v = params.v.data<half>();
  args.num_heads_in_all = rows * heads;
  args.q_heads = params.q_heads;
  args.kv_heads = params.kv_heads;
  args.head_dim = params.head_dim;
  args.eps = params.eps;
  if (weight == DType::kF32) {
    launch<float>(stream, args, params.rotate);
  } else {
    launch<bf16>(stream, args, params.rotate);
  }
}

}  // namespace kvarn::cuda
