// One warp attends 8 query heads of one KV head to the tokens of one page in shared memory.
//
// Both products are mma.m16n8k16 with the cached side as A: S^T = K q^T (rows: tokens) and
// O^T += V^T p^T (rows: channels), heads as N = 8. A lane is 4 g + q (PTX ISA, "Matrix fragments").
// In results it holds rows g and g + 8 and heads 2q, 2q + 1.
//
// Codes enter the products as they are masked out of the page: the bits of a code at bit k of a
// half are the fp16 subnormal code * 2^(k-24), exact. Codes at other bits than the highest pair
// would weigh less, so the other operand is multiplied by the missing power of two. With
// KVarN's fields (kv_layout.h), x = q' of one head, sums over channels d or tokens t:
//   score[t] = k_token[t] * (sum_d (x[d] k_step[d]) code[d][t] + sum_d x[d] k_zero[d])
//   out[d]  += v_channel[d] * (sum_t (p[t] v_step[t]) code[t][d] + sum_t p[t] v_zero[t])
// where x k_step, p v_step and p are rounded to fp16. Sums over all lanes are MMAs as well: k_zero
// in every row of A gives every lane its start of the scores, and (1, v_zero) in rows (0-7, 8-15)
// gives it the sums of p and p v_zero.
//
// Range. x is q' / 8. A product 16 x k_step or 64 p v_step (16 with 4-bit values) above 65504 is
// infinite: |q'[d] k_step[d]| < 32752 and v_step[t] < 1023 are required. Steps are a value's range
// over 15 or 3, divided by a token's or channel's scale of 0.74 at least; keys and values of
// Qwen3 stay far below. x k_step below 6e-5 loses bits: an error of at most 2^-25 * 15 a channel.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <utility>

#include "kernels/kv_layout.h"

namespace kvarn::cuda {

constexpr int kTiles = kBlockTokens / 16;   // m16 tiles of a coded page, also of its channels
constexpr int kSteps = kCodedHeadDim / 16;  // k16 steps

__device__ __forceinline__ void mma(float (&c)[4], uint32_t a0, uint32_t a1, uint32_t a2,
                                    uint32_t a3, uint32_t b0, uint32_t b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
      "{%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

__device__ __forceinline__ uint32_t transpose_8x8(uint32_t row) {
  uint32_t column;
  asm("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(column) : "r"(row));
  return column;
}

// `volatile` and "memory": it stays behind the wait for the page.
__device__ __forceinline__ uint4 ldmatrix(uint32_t address) {
  uint4 v;
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "r"(address)
               : "memory");
  return v;
}
__device__ __forceinline__ uint4 ldmatrix_trans(uint32_t address) {
  uint4 v;
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "r"(address)
               : "memory");
  return v;
}

__device__ __forceinline__ uint32_t bits(__half2 x) {
  return *reinterpret_cast<const uint32_t*>(&x);
}
__device__ __forceinline__ __half2 as_half2(uint32_t x) {
  return *reinterpret_cast<const __half2*>(&x);
}
__device__ __forceinline__ uint32_t times(uint32_t x, uint32_t y) {
  return bits(__hmul2(as_half2(x), as_half2(y)));
}
__device__ __forceinline__ uint32_t times(uint32_t x, float y) {
  return bits(__hmul2(as_half2(x), __float2half2_rn(y)));
}
__device__ __forceinline__ float exp2_fast(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// f(0), ..., f(kN - 1) without a loop: where `#pragma unroll` comes too late in the compiler,
// arrays indexed by the counter stay in local memory.
template <int kN, typename F>
__device__ __forceinline__ void each(F f) {
  [&]<int... kI>(std::integer_sequence<int, kI...>) { (f(kI), ...); }
  (std::make_integer_sequence<int, kN>());
}

// kN words, 4 kN bytes aligned up to 16.
template <int kN>
__device__ __forceinline__ void load_words(const std::byte* from, uint32_t (&to)[kN]) {
  if constexpr (kN % 4 == 0) {
#pragma unroll
    for (int i = 0; i < kN; i += 4) {
      const uint4 v = *reinterpret_cast<const uint4*>(from + 4 * i);
      to[i] = v.x, to[i + 1] = v.y, to[i + 2] = v.z, to[i + 3] = v.w;
    }
  } else if constexpr (kN == 2) {
    const uint2 v = *reinterpret_cast<const uint2*>(from);
    to[0] = v.x, to[1] = v.y;
  } else {
    static_assert(kN == 1);
    to[0] = *reinterpret_cast<const uint32_t*>(from);
  }
}

// q' / 8 of 8 heads as B fragments: head g, channels 16 s + 2q (low) and 16 s + 8 + 2q (high).
struct Query {
  uint32_t low[kSteps], low16[kSteps], high[kSteps];  // low16 = 16 low
};

// What a warp knows of the tokens it has seen: maximum and sum of p, sums of p v in units of
// `unit` (below), of channels 16 tile + g (+ 8) and heads 2q, 2q + 1. Scores are logarithms to the
// base of 2.
struct AttendState {
  float m[2], l[2];
  float o[kTiles][4];
};

__device__ __forceinline__ void clear(AttendState& state) {
  for (int i = 0; i < 2; ++i) state.m[i] = -INFINITY, state.l[i] = 0;
  each<4 * kTiles>([&](int i) { state.o[i / 4][i % 4] = 0; });
}

// AttendState::o times this is the sum of p v: the weight of the codes at the highest bits.
constexpr float code_unit(int v_bits) { return v_bits == 2 ? 0x1p18f : 0x1p20f; }

// From scores[token tile][c] of kN m16 tiles to p as B fragments of tokens; rescales what came
// before. -infinity is a token that does not count; one at least must.
template <int kN>
__device__ __forceinline__ void softmax(float (&s)[kN][4], uint32_t (&p)[kN][2],
                                        AttendState& state) {
  float top0 = fmaxf(s[0][0], s[0][2]), top1 = fmaxf(s[0][1], s[0][3]);
  each<kN - 1>([&](int i) {
    top0 = fmaxf(top0, fmaxf(s[i + 1][0], s[i + 1][2]));
    top1 = fmaxf(top1, fmaxf(s[i + 1][1], s[i + 1][3]));
  });
#pragma unroll
  for (int bit = 2; bit < 5; ++bit) {
    top0 = fmaxf(top0, __shfl_xor_sync(~0u, top0, 1 << bit));
    top1 = fmaxf(top1, __shfl_xor_sync(~0u, top1, 1 << bit));
  }
  top0 = fmaxf(top0, state.m[0]);
  top1 = fmaxf(top1, state.m[1]);
  const float scale0 = exp2_fast(state.m[0] - top0), scale1 = exp2_fast(state.m[1] - top1);
  state.m[0] = top0;
  state.m[1] = top1;
  state.l[0] *= scale0;
  state.l[1] *= scale1;
  each<2 * kN>([&](int i) {
    const float p0 = exp2_fast(s[i / 2][i % 2 * 2] - top0);
    const float p1 = exp2_fast(s[i / 2][i % 2 * 2 + 1] - top1);
    p[i / 2][i % 2] = transpose_8x8(bits(__floats2half2_rn(p0, p1)));
  });
  each<kTiles>([&](int d) {
    state.o[d][0] *= scale0;
    state.o[d][1] *= scale1;
    state.o[d][2] *= scale0;
    state.o[d][3] *= scale1;
  });
}

constexpr uint32_t kOnes = 0x3c003c00;  // (1, 1)

// Tokens [16 * first, 16 * (first + kN)) of a coded page. `score_scale`: of q' k', times log2(e).
template <int kVBits, int kN>
__device__ __forceinline__ void attend_coded(const std::byte* page, int first, const Query& query,
                                             float score_scale, AttendState& state) {
  constexpr TileLayout layout = make_tile_layout(4, kVBits);
  static_assert(kN % 2 == 0, "steps and zeros are read for two tiles");
  const int lane = threadIdx.x % 32, g = lane / 4, q = lane % 4;
  float s[kN][4];
  {
    const auto* steps = reinterpret_cast<const uint4*>(page + layout.k_step) + q;
    const auto* zeros = reinterpret_cast<const uint4*>(page + layout.k_zero) + q;
    uint32_t a[kSteps][2];
    float even[4] = {}, odd[4] = {};
#pragma unroll
    for (int i = 0; i < kSteps; i += 2) {
      const uint4 step = steps[2 * i], zero = zeros[2 * i];
      a[i][0] = times(step.x, query.low16[i]);
      a[i][1] = times(step.y, query.high[i]);
      a[i + 1][0] = times(step.z, query.low16[i + 1]);
      a[i + 1][1] = times(step.w, query.high[i + 1]);
      mma(even, zero.x, zero.x, zero.y, zero.y, query.low[i], query.high[i]);
      mma(odd, zero.z, zero.z, zero.w, zero.w, query.low[i + 1], query.high[i + 1]);
    }
    const float start0 = (even[0] + odd[0]) * 0x1p-20f, start1 = (even[1] + odd[1]) * 0x1p-20f;
    const auto* codes = reinterpret_cast<const uint4*>(page + layout.k_codes) + 64 * first + lane;
    each<kN>([&](int i) {
      s[i][0] = s[i][2] = start0;
      s[i][1] = s[i][3] = start1;
      each<2>([&](int half) {
        const uint4 v = codes[(2 * i + half) * 32];
        const uint32_t words[4] = {v.x, v.y, v.z, v.w};
        each<4>([&](int w) {
          const uint32_t x = words[w], y = x >> 8;
          mma(s[i], x & 0x000f000fu, y & 0x000f000fu, x & 0x00f000f0u, y & 0x00f000f0u,
              a[4 * half + w][0], a[4 * half + w][1]);
        });
      });
    });
    // [g 8][tile 8][r0 2] halves.
    uint32_t tokens[kN];
    load_words(page + layout.k_token + 32 * g + 4 * first, tokens);
    const float scale = score_scale * 0x1p23f;  // 2^20 of the codes, 8 of the query
    each<kN>([&](int i) {
      const float2 t = __half22float2(as_half2(tokens[i]));
      const float t0 = t.x * scale, t1 = t.y * scale;
      s[i][0] *= t0;
      s[i][1] *= t0;
      s[i][2] *= t1;
      s[i][3] *= t1;
    });
  }

  uint32_t p[kN][2];
  softmax<kN>(s, p, state);

  // (sum of p, sum of p v_zero), then w = p v_step in the place of p.
  float sums[4] = {};
  const auto* steps = reinterpret_cast<const uint4*>(page + layout.v_step) + 2 * first + q;
  const auto* zeros = reinterpret_cast<const uint4*>(page + layout.v_zero) + 2 * first + q;
  constexpr float kLow = kVBits == 2 ? 64.f : 16.f;  // missing powers of two, by place in the byte
#pragma unroll
  for (int i = 0; i < kN; i += 2) {
    const uint4 step = steps[2 * i], zero = zeros[2 * i];
    mma(sums, kOnes, zero.x, kOnes, zero.y, p[i][0], p[i][1]);
    p[i][0] = times(p[i][0], times(step.x, kLow));
    p[i][1] = times(p[i][1], kVBits == 2 ? times(step.y, 16.f) : step.y);
    mma(sums, kOnes, zero.z, kOnes, zero.w, p[i + 1][0], p[i + 1][1]);
    p[i + 1][0] = times(p[i + 1][0], times(step.z, kVBits == 2 ? 4.f : kLow));
    p[i + 1][1] = times(p[i + 1][1], step.w);
  }
  state.l[0] += sums[0];
  state.l[1] += sums[1];
  const float start0 = sums[2] / code_unit(kVBits), start1 = sums[3] / code_unit(kVBits);

  uint32_t c[kTiles];  // [g 8][tile 8][r0 2] halves
  load_words(page + layout.v_channel + 32 * g, c);
#pragma unroll
  for (int d = 0; d < kTiles; ++d) {
    float acc[4] = {start0, start1, start0, start1};
    if constexpr (kVBits == 2) {
      uint32_t v[kN / 2];  // two k-steps a word
      load_words(page + layout.v_codes + (32 * d + lane) * 16 + 2 * first, v);
#pragma unroll
      for (int j = 0; j < kN / 2; ++j) {
        const uint32_t x = v[j], y = x >> 8;
        mma(acc, x & 0x00030003u, y & 0x00030003u, x & 0x000c000cu, y & 0x000c000cu, p[2 * j][0],
            p[2 * j][1]);
        mma(acc, x & 0x00300030u, y & 0x00300030u, x & 0x00c000c0u, y & 0x00c000c0u,
            p[2 * j + 1][0], p[2 * j + 1][1]);
      }
    } else {
      constexpr int kWords = kN < 4 ? kN : 4;
#pragma unroll
      for (int i = 0; i < kN; i += kWords) {  // [channel tile][half 2][lane][4 words]
        const int step = first + i;
        uint32_t v[kWords];
        load_words(page + layout.v_codes + ((2 * d + step / 4) * 32 + lane) * 16 + step % 4 * 4, v);
#pragma unroll
        for (int w = 0; w < kWords; ++w) {
          const uint32_t x = v[w], y = x >> 8;
          mma(acc, x & 0x000f000fu, y & 0x000f000fu, x & 0x00f000f0u, y & 0x00f000f0u, p[i + w][0],
              p[i + w][1]);
        }
      }
    }
    const float2 channel = __half22float2(as_half2(c[d]));
    state.o[d][0] = fmaf(acc[0], channel.x, state.o[d][0]);
    state.o[d][1] = fmaf(acc[1], channel.x, state.o[d][1]);
    state.o[d][2] = fmaf(acc[2], channel.y, state.o[d][2]);
    state.o[d][3] = fmaf(acc[3], channel.y, state.o[d][3]);
  }
}

// Rows [16 * first, ...) of an exact page, kN m16 tiles of them; of its rows the first `rows` are
// in use, at least one of these here. Rows of a page lie 256 bytes apart, pieces permuted
// (kv_device_layout.h). Rows past the end are read as the last one: stale bytes may be NaN, and
// 0 * NaN is not 0. `unit`: code_unit() of the format's other pages.
template <int kN>
__device__ __forceinline__ void attend_exact(uint32_t k, uint32_t v, int first, int rows,
                                             const Query& query, float score_scale, float unit,
                                             AttendState& state) {
  const int lane = threadIdx.x % 32, g = lane / 4;
  float s[kN][4];
#pragma unroll
  for (int i = 0; i < kN; ++i) {
    s[i][0] = s[i][1] = s[i][2] = s[i][3] = 0;
    const int row = min(16 * (first + i) + lane % 16, rows - 1);
    const uint32_t at = k + 256 * row;
    const int twist = row & 7;
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
      const uint4 a = ldmatrix(at + ((2 * step + lane / 16) ^ twist) * 16);
      mma(s[i], a.x, a.y, a.z, a.w, query.low[step], query.high[step]);
    }
    const float scale = 8 * score_scale;
    const int token = 16 * (first + i) + g;
#pragma unroll
    for (int c = 0; c < 4; ++c) {
      s[i][c] = token + c / 2 * 8 < rows ? s[i][c] * scale : -INFINITY;
    }
  }

  uint32_t p[kN][2];
  softmax<kN>(s, p, state);

  float sums[4] = {};
#pragma unroll
  for (int i = 0; i < kN; ++i) mma(sums, kOnes, kOnes, kOnes, kOnes, p[i][0], p[i][1]);
  state.l[0] += sums[0];
  state.l[1] += sums[1];

  uint32_t at[kN];
  int twist[kN];
#pragma unroll
  for (int i = 0; i < kN; ++i) {
    const int row = min(16 * (first + i) + lane / 16 * 8 + lane % 8, rows - 1);
    at[i] = v + 256 * row;
    twist[i] = row & 7;
  }
#pragma unroll
  for (int d = 0; d < kTiles; ++d) {
    float acc[4] = {};
#pragma unroll
    for (int i = 0; i < kN; ++i) {
      const uint4 a = ldmatrix_trans(at[i] + ((2 * d + lane / 8 % 2) ^ twist[i]) * 16);
      mma(acc, a.x, a.y, a.z, a.w, p[i][0], p[i][1]);
    }
#pragma unroll
    for (int c = 0; c < 4; ++c) state.o[d][c] = fmaf(acc[c], 1 / unit, state.o[d][c]);
  }
}

}  // namespace kvarn::cuda
