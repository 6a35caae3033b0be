// QK norm, rotary embedding and the Hadamard rotation in one pass: each head is read once, stays in
// registers of one warp in fp32, and is written once as fp16. Twin: rope_cpu.cpp (the same order of
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

constexpr int kThreads = 128, kWarps = kThreads / 32;
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
  unsigned num_heads_in_all;  // rows * (q_heads + 2 kv_heads)
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
__device__ __forceinline__ Head head_of(const RopeArgs& args, unsigned at) {
  const auto heads = static_cast<unsigned>(args.q_heads + 2 * args.kv_heads);
  const int64_t row = at / heads;
  const auto head = static_cast<int>(at % heads);
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

// Two values rounded to fp16, to the largest finite one beyond it; NaN stays NaN (as to_half does).
__device__ __forceinline__ uint32_t half_pair(float low, float high) {
  uint32_t bits;
  asm("cvt.rn.satfinite.f16x2.f32 %0, %2, %1;" : "=r"(bits) : "f"(low), "f"(high));
  return bits;
}

__device__ __forceinline__ void load8(const bf16* p, float (&x)[8]) {
  const uint4 bits = *reinterpret_cast<const uint4*>(p);
  const uint32_t pairs[4] = {bits.x, bits.y, bits.z, bits.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    x[2 * i] = __uint_as_float(pairs[i] << 16);
    x[2 * i + 1] = __uint_as_float(pairs[i] & 0xffff0000u);
  }
}
__device__ __forceinline__ void load8(const float* p, float (&x)[8]) {
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const float4 v = reinterpret_cast<const float4*>(p)[i];
    x[4 * i] = v.x;
    x[4 * i + 1] = v.y;
    x[4 * i + 2] = v.z;
    x[4 * i + 3] = v.w;
  }
}
__device__ __forceinline__ void store8(half* p, const float (&x)[8]) {
  uint32_t pairs[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) pairs[i] = half_pair(x[2 * i], x[2 * i + 1]);
  *reinterpret_cast<uint4*>(p) = make_uint4(pairs[0], pairs[1], pairs[2], pairs[3]);
}

// Eight lanes a head. A lane holds values 8 j .. 8 j + 7 and their partners 64 further, 16 bytes
// each: the pairs of RoPE and four of the seven stages of the rotation meet in the lane (three of
// them as strides 1, 2, 4, the last as 64), three in shuffles.
template <typename Weight, bool kRotate>
__global__ void __launch_bounds__(kThreads) rope_128_kernel(RopeArgs args) {
  constexpr int kDim = 128, kHalfDim = kDim / 2, kLanes = 8, kOwn = 8;
  const int lane = threadIdx.x % 32, j = lane % kLanes;
  const unsigned wanted = blockIdx.x * (kThreads / kLanes) + threadIdx.x / kLanes;
  // Lanes beyond the last head repeat it, so that all lanes meet in the shuffles.
  const unsigned at = min(wanted, args.num_heads_in_all - 1);
  float a[kOwn], b[kOwn];
  const bf16* source = args.qkv + int64_t{at} * kDim + kOwn * j;
  load8(source, a);
  load8(source + kHalfDim, b);
  const Head head = head_of(args, at);
  if (head.rope) {
    const int64_t table = int64_t{args.positions[head.row]} * kHalfDim + kOwn * j;
    float c[kOwn], s[kOwn];
    load8(args.cos + table, c);
    load8(args.sin + table, s);
    if (head.norm != nullptr) {
      const auto* weight = static_cast<const Weight*>(head.norm) + kOwn * j;
      float wa[kOwn], wb[kOwn];
      load8(weight, wa);
      load8(weight + kHalfDim, wb);
      float squares = 0.f;
#pragma unroll
      for (int i = 0; i < kOwn; ++i) squares = fmaf(a[i], a[i], fmaf(b[i], b[i], squares));
      // Other heads of the warp may be values, which do not come here.
      const unsigned group = 0xffu << (lane & 24);
#pragma unroll
      for (int stride = kLanes / 2; stride > 0; stride /= 2)
        squares += __shfl_xor_sync(group, squares, stride);
      const float scale = rsqrtf(squares * (1.f / kDim) + args.eps);
#pragma unroll
      for (int i = 0; i < kOwn; ++i) {
        a[i] = a[i] * scale * wa[i];
        b[i] = b[i] * scale * wb[i];
      }
    }
#pragma unroll
    for (int i = 0; i < kOwn; ++i) {
      const float first = a[i], second = b[i];
      a[i] = first * c[i] - second * s[i];
      b[i] = second * c[i] + first * s[i];
    }
  }
  if constexpr (kRotate) {
    hadamard_stages_8(a, lane);
    hadamard_stages_8(b, lane);
#pragma unroll
    for (int i = 0; i < kOwn; ++i) {
      const float first = a[i], second = b[i];
      a[i] = (first + second) * kHadamardScale128;
      b[i] = (first - second) * kHadamardScale128;
    }
  }
  if (wanted >= args.num_heads_in_all) return;
  store8(head.out + kOwn * j, a);
  store8(head.out + kHalfDim + kOwn * j, b);
}

// Any even head_dim up to kMaxHeadDim: lane l owns the pairs l, l + 32, ...
template <typename Weight>
__global__ void __launch_bounds__(kThreads) rope_any_kernel(RopeArgs args) {
  constexpr int kMaxPairs = kMaxHeadDim / 2 / 32;  // of a lane
  const int lane = threadIdx.x % 32, half_dim = args.head_dim / 2;
  const unsigned at = blockIdx.x * kWarps + threadIdx.x / 32;
  if (at >= args.num_heads_in_all) return;  // whole warps leave
  const bf16* source = args.qkv + int64_t{at} * args.head_dim;
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
    const uint32_t bits = half_pair(first, second);
    head.out[i].bits = static_cast<uint16_t>(bits);
    head.out[i + half_dim].bits = static_cast<uint16_t>(bits >> 16);
  }
}

template <typename Weight>
void launch(cudaStream_t stream, const RopeArgs& args, bool rotate) {
  const unsigned per_block = args.head_dim == kCodedHeadDim ? kThreads / 8 : kWarps;
  const unsigned blocks = (args.num_heads_in_all + per_block - 1) / per_block;
  if (args.head_dim != kCodedHeadDim) {
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
  CHECK(rows * heads <= INT32_MAX, "qk_norm_rope_rotate: heads of one call");
  args.num_heads_in_all = static_cast<unsigned>(rows * heads);
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
