// Encodes complete tiles into pages. The CPU twin (kv_encode_impl.h) is the specification: 8 passes
// of column and row normalisation, best imbalance kept for a gain above 1e-4, asymmetric rounding.
// Every sum has one fixed order, so a record depends on the rows alone: not on the batch, the
// layer, the source or the run. Source: KVarN, arXiv 2606.03458.
//
// One thread block encodes the 128 x 128 values of K or of V of one tile. They stay where they are
// (fp32 in registers, 64 a thread, and fp16 in shared memory) while their scales are sought: the
// deviations of X / column / row are those of X / row (or X / column) divided by the other scale.
//
// Both kinds are seen as [m][k]: k carries the rounding step (channels of K, tokens of V), m is the
// other axis, as in the MMA fragments that the codes are stored for (kv_device_layout.h). A "row"
// below is one k, a "column" one m, as in the twin. The thread of lane 4g + q in warp (half,
// quarter) owns the 8 columns m = 64 half + 16 T + 8 r0 + g and the 8 rows k = 32 quarter + 16 s +
// 8 r1 + 2q
// + c (T 0..3; r0, s, r1, c 0..1), which are whole 32-bit words of codes.
//
// A sweep takes the deviations of all rows (or columns): each warp the mean of its 64 (32) values
// by MMA, exactly enough because X is fp16 and the scales are split in two fp16 numbers, then the
// sum of squares about that mean in fp32 (2 FMA a value); parts of several warps are merged as
// Chan, Golub and LeVeque do ("Updating Formulae and a Pairwise Algorithm", 1979). So it is a
// two-pass variance at every step, without waiting between the passes.
//
// Scales are kept as base-2 logarithms, which makes an update two special-function instructions.
//
// Longer than other files: the sweeps share one division of the tile among threads.
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include "kernels/cuda_check.h"
#include "kernels/kv_device_layout.h"
#include "kernels/ops_cuda.h"

namespace kvarn::cuda {
namespace {

constexpr int kN = 128;  // tokens of a tile = head_dim
static_assert(kN == kBlockTokens && kN == kCodedHeadDim);
constexpr int kThreads = 256;    // 8 warps: 2 halves of m by 4 quarters of k
constexpr int kMaxLayers = 128;  // page pointers in the kernel's arguments

constexpr int kPasses = 8;
constexpr float kLog2E = 1.44269504f;
constexpr float kLogMin = -0.3f * kLog2E, kLogMax = 10.0f * kLog2E;  // of an accumulated log scale
constexpr float kLogStd = 9.96578428f;      // log2 of 1e3: a measured deviation is in [1e-3, 1e3]
constexpr float kLogMinStd = -26.5754248f;  // log2 of 1e-8: guard of a division
constexpr float kMinStep = 1e-10f;
constexpr float kGain = 1.0f - 1e-4f;  // a pass must be better by this to be kept
// Reciprocal scales, at most e^0.3, are multiplied by this before they are split in fp16 numbers,
// so that the smallest (e^-10) still keeps 20 bits.
constexpr float kSplitScale = 1024.0f;

// What a warp leaves of one row or column: of its values, the mean and the sum of squares about it.
struct Moments {
  float mean, squares;
};
// Logarithms of the least and largest deviation, as integers of the same order.
struct Spread {
  int low, high;
};

struct __align__(16) Shared {
  uint4 tile[kN * 16];  // fp16 tokens; 16-byte piece p of token t at p ^ (t & 7)
  // Reciprocal scales, where the threads that use them find them together.
  float column_inv[2][8][8];           // [half][g][2T + r0]
  float row_inv[4][4][8];              // [quarter][q][4s + 2r1 + c]
  __half column_split[2][4][4][4][2];  // [half][T][q][2r0 + low part][c]: m = 16T + 8r0 + 2q + c
  __half row_split[4][4][2][4][2];     // [quarter][q][low part][2s + r1][c]
  Moments column_parts[4][kN];         // [quarter][column entry]
  Moments row_parts[2][kN];            // [half][row entry]
  float2 row_range[2][kN];             // [half][row entry]: least and largest of X * column_inv
  Spread column_spread[4];             // of the four warps that keep the columns
  Spread row_spread[2][4];             // the same for the rows, of even and odd passes
  float row_low[4][4][8], row_steps[4][4][8];  // zero and 1/step, in the order of row_inv
};

// The place of a thread in the tile.
struct Place {
  int lane, g, q, half, quarter;
  __device__ explicit Place(int thread)
      : lane(thread % 32), g(lane / 4), q(lane % 4), half(thread / 32 % 2), quarter(thread / 64) {}
};

// Entries: 128 threads keep one column each, 128 one row each. Entry e of the columns is written by
// lane e % 32 of the warps of half e / 64, entry e of the rows by those of quarter e / 32.
__device__ __forceinline__ int column_of(int e) {
  return 64 * (e / 64) + 16 * (e % 4) + 8 * (e / 32 % 2) + e % 32 / 4;
}
__device__ __forceinline__ int row_of(int e) {
  const int g = e % 32 / 4;
  return 32 * (e / 32) + 16 * (g / 4) + 8 * (g / 2 % 2) + 2 * (e % 4) + g % 2;
}

__device__ __forceinline__ float log2_of(float x) {
  float y;
  asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
__device__ __forceinline__ float exp2_of(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// Integers in the order of floats, and back.
__device__ __forceinline__ int ordered(float x) {
  const int bits = __float_as_int(x);
  return bits ^ ((bits >> 31) & 0x7fffffff);
}
__device__ __forceinline__ float from_ordered(int x) {
  return __int_as_float(x ^ ((x >> 31) & 0x7fffffff));
}

// Four 8 x 8 matrices of halves: lane 4g + q gets entries (g, 2q), (g, 2q + 1) of each, or, where
// kTranspose, (2q, g), (2q + 1, g). Lanes 8i .. 8i + 7 give the addresses of the rows of matrix i.
template <bool kTranspose>
__device__ __forceinline__ void load_matrices(uint32_t address, uint32_t (&r)[4]) {
  if constexpr (kTranspose) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(address));
  } else {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(address));
  }
}

// d += a b, fp32 += fp16 x fp16, 16 x 8 x 16 (PTX ISA, "Matrix fragments for mma.m16n8k16").
__device__ __forceinline__ void multiply_add(float (&d)[4], uint32_t a0, uint32_t a1, uint32_t a2,
                                             uint32_t a3, uint32_t b0, uint32_t b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
      "{%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

// The tile in shared memory through the eyes of one thread. Memory has a row for each token; the
// tokens of K are its m, those of V its k.
template <bool kKeys>
class TileView {
 public:
  __device__ TileView(const Shared& s, const Place& at) {
    const int matrix = at.lane / 8, i = at.lane % 8;
    const int m_block = 8 * at.half + matrix % 2, k_block = 4 * at.quarter + matrix / 2;
    const int token = 8 * (kKeys ? m_block : k_block) + i;
    const int piece = (kKeys ? k_block : m_block) ^ i;
    base_ = static_cast<uint32_t>(__cvta_generic_to_shared(s.tile + token * 16 + piece));
  }
  // Of the m16 x k16 block (T, s): pairs along k of (r0, r1) = (0,0), (1,0), (0,1), (1,1) at m = g:
  // an A fragment of [m][k].
  __device__ void pairs_along_k(int t, int s, uint32_t (&r)[4]) const {
    load_matrices<!kKeys>(address(t, s), r);
  }
  // The same blocks as pairs along m at k = g: two B fragments of [m][k].
  __device__ void pairs_along_m(int t, int s, uint32_t (&r)[4]) const {
    load_matrices<kKeys>(address(t, s), r);
  }

 private:
  // 16 tokens further, or two pieces further within the XORed row.
  __device__ uint32_t address(int t, int s) const {
    return kKeys ? (base_ + t * 4096) ^ (s * 32) : (base_ ^ (t * 32)) + s * 4096;
  }
  uint32_t base_;
};

// Combines 8 values over the lanes that differ in `kLevels` bits, `bit` and those below it. Each
// level halves the values a lane keeps: those whose index has the bit that the lane has.
template <int kLevels, class Combine>
__device__ __forceinline__ void scatter(float (&value)[8], int lane, int bit, Combine combine) {
#pragma unroll
  for (int level = 0, count = 4; level < kLevels; ++level, count /= 2, bit /= 2) {
    const bool upper = (lane & bit) != 0;
#pragma unroll
    for (int i = 0; i < count; ++i) {
      const float send = upper ? value[i] : value[i + count];
      const float keep = upper ? value[i + count] : value[i];
      value[i] = combine(keep, __shfl_xor_sync(~0u, send, bit));
    }
  }
}
// Keeps the same values as scatter(), of some that are equal in all these lanes.
template <int kLevels>
__device__ __forceinline__ void select(float (&value)[8], int lane, int bit) {
#pragma unroll
  for (int level = 0, count = 4; level < kLevels; ++level, count /= 2, bit /= 2) {
#pragma unroll
    for (int i = 0; i < count; ++i) value[i] = (lane & bit) != 0 ? value[i + count] : value[i];
  }
}
struct Add {
  __device__ float operator()(float a, float b) const { return a + b; }
};

__device__ __forceinline__ void load8(const float* p, float (&x)[8]) {
  const float4 a = reinterpret_cast<const float4*>(p)[0];
  const float4 b = reinterpret_cast<const float4*>(p)[1];
  x[0] = a.x;
  x[1] = a.y;
  x[2] = a.z;
  x[3] = a.w;
  x[4] = b.x;
  x[5] = b.y;
  x[6] = b.z;
  x[7] = b.w;
}

// x[2T + r0][4s + 2r1 + c]
using Values = float[8][8];

// Moments of the rows of X * column_inv: those of a warp's 64 columns.
template <bool kKeys>
__device__ __forceinline__ void sweep_rows(Shared& s, const TileView<kKeys>& tile, const Values& x,
                                           const Place& at) {
  float sums[4][4] = {};  // [2s + r1][2 (low part) + c], the same in every g
#pragma unroll
  for (int t = 0; t < 4; ++t) {
    const uint4 a = *reinterpret_cast<const uint4*>(s.column_split[at.half][t][at.q]);
#pragma unroll
    for (int pair = 0; pair < 2; ++pair) {
      uint32_t b[4];
      tile.pairs_along_m(t, pair, b);
      multiply_add(sums[2 * pair], a.x, a.y, a.z, a.w, b[0], b[1]);
      multiply_add(sums[2 * pair + 1], a.x, a.y, a.z, a.w, b[2], b[3]);
    }
  }
  float mean[8], squares[8], scale[8];
  load8(s.column_inv[at.half][at.g], scale);
#pragma unroll
  for (int k = 0; k < 8; ++k) {
    mean[k] = (sums[k / 2][k % 2] + sums[k / 2][2 + k % 2]) * (1.0f / (64 * kSplitScale));
    squares[k] = 0.f;
  }
#pragma unroll
  for (int m = 0; m < 8; ++m) {
#pragma unroll
    for (int k = 0; k < 8; ++k) {
      const float d = fmaf(x[m][k], scale[m], -mean[k]);
      squares[k] = fmaf(d, d, squares[k]);
    }
  }
  scatter<3>(squares, at.lane, 16, Add{});
  select<3>(mean, at.lane, 16);
  s.row_parts[at.half][32 * at.quarter + at.lane] = {mean[0], squares[0]};
}

// Moments of the columns of X * row_inv: those of a warp's 32 rows.
template <bool kKeys>
__device__ __forceinline__ void sweep_columns(Shared& s, const TileView<kKeys>& tile,
                                              const Values& x, const Place& at) {
  // Even columns of the B fragment take the high part, odd ones the low part.
  const uint4 b = *reinterpret_cast<const uint4*>(s.row_split[at.quarter][at.q][at.g % 2]);
  float mean[8], squares[8], scale[8];
#pragma unroll
  for (int t = 0; t < 4; ++t) {
    float sums[4] = {};  // m = g: high, low; m = g + 8: high, low
    uint32_t a[4];
    tile.pairs_along_k(t, 0, a);
    multiply_add(sums, a[0], a[1], a[2], a[3], b.x, b.y);
    tile.pairs_along_k(t, 1, a);
    multiply_add(sums, a[0], a[1], a[2], a[3], b.z, b.w);
    mean[2 * t] = (sums[0] + sums[1]) * (1.0f / (32 * kSplitScale));
    mean[2 * t + 1] = (sums[2] + sums[3]) * (1.0f / (32 * kSplitScale));
  }
  load8(s.row_inv[at.quarter][at.q], scale);
#pragma unroll
  for (int m = 0; m < 8; ++m) {
    squares[m] = 0.f;
#pragma unroll
    for (int k = 0; k < 8; ++k) {
      const float d = fmaf(x[m][k], scale[k], -mean[m]);
      squares[m] = fmaf(d, d, squares[m]);
    }
  }
  scatter<2>(squares, at.lane, 2, Add{});
  select<2>(mean, at.lane, 2);
#pragma unroll
  for (int r0 = 0; r0 < 2; ++r0) {
    s.column_parts[at.quarter][64 * at.half + 32 * r0 + at.lane] = {mean[r0], squares[r0]};
  }
}

// Base-2 logarithm of the sample deviation of all 128 values.
__device__ __forceinline__ float log_deviation_of_column(const Shared& s, int e) {
  float mean = 0.f, squares = 0.f, between = 0.f;
  Moments part[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    part[i] = s.column_parts[i][e];
    mean += part[i].mean;
    squares += part[i].squares;
  }
  mean *= 0.25f;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const float d = part[i].mean - mean;
    between = fmaf(d, d, between);
  }
  return 0.5f * log2_of((squares + 32.0f * between) * (1.0f / (kN - 1)));
}
__device__ __forceinline__ float log_deviation_of_row(const Shared& s, int e) {
  const Moments a = s.row_parts[0][e], b = s.row_parts[1][e];
  const float d = a.mean - b.mean;
  return 0.5f * log2_of((a.squares + b.squares + 32.0f * (d * d)) * (1.0f / (kN - 1)));
}

// Adds the logarithm of the present deviation to that of the scale.
__device__ __forceinline__ float updated(float log_scale, float log_deviation) {
  const float step = fminf(fmaxf(log_deviation - log_scale, -kLogStd), kLogStd);
  return fminf(fmaxf(log_scale + step, kLogMin), kLogMax);
}

struct Split {
  __half high, low;
};
__device__ __forceinline__ Split split(float inv) {
  const float scaled = inv * kSplitScale;
  const __half high = __float2half_rn(scaled);
  return {high, __float2half_rn(scaled - __half2float(high))};
}
__device__ __forceinline__ void store_column_inv(Shared& s, int e, float inv) {
  const int half = e / 64, t = e % 4, r0 = e / 32 % 2, g = e % 32 / 4;
  const Split parts = split(inv);
  s.column_inv[half][g][2 * t + r0] = inv;
  s.column_split[half][t][g / 2][2 * r0][g % 2] = parts.high;
  s.column_split[half][t][g / 2][2 * r0 + 1][g % 2] = parts.low;
}
__device__ __forceinline__ void store_row_inv(Shared& s, int e, float inv) {
  const int quarter = e / 32, q = e % 4, g = e % 32 / 4;  // g = 4s + 2r1 + c
  const Split parts = split(inv);
  s.row_inv[quarter][q][g] = inv;
  s.row_split[quarter][q][0][g / 2][g % 2] = parts.high;
  s.row_split[quarter][q][1][g / 2][g % 2] = parts.low;
}

// Of 32 entries of a warp.
__device__ __forceinline__ void store_spread(Spread& to, float log_deviation, int lane) {
  const int x = ordered(log_deviation);
  const int low = __reduce_min_sync(~0u, x), high = __reduce_max_sync(~0u, x);
  if (lane == 0) to = {low, high};
}
// The largest deviation over the smallest.
__device__ __forceinline__ float spread_of(const Spread (&parts)[4]) {
  int low = parts[0].low, high = parts[0].high;
#pragma unroll
  for (int i = 1; i < 4; ++i) {
    low = min(low, parts[i].low);
    high = max(high, parts[i].high);
  }
  return exp2_of(from_ordered(high) - fmaxf(from_ordered(low), kLogMinStd));
}

__device__ __forceinline__ __half saturated_half(float x) {
  return __float2half_rn(fminf(fmaxf(x, -65504.f), 65504.f));
}

// Chooses the scales. Threads 0..127 keep one column each, the others one row each: returns the
// logarithm of the scale of the thread's own entry.
template <bool kKeys>
__device__ __forceinline__ float normalise(Shared& s, const TileView<kKeys>& tile, const Values& x,
                                           const Place& at) {
  const bool keeps_column = threadIdx.x < kN;
  const int e = threadIdx.x % kN, warp = e / 32;
  float best = 0.f, best_log = 0.f, log_scale = 0.f, previous = 0.f;
  sweep_rows(s, tile, x, at);
  sweep_columns(s, tile, x, at);
  __syncthreads();
  if (!keeps_column) store_spread(s.row_spread[1][warp], log_deviation_of_row(s, e), at.lane);
  // A pass is judged when its columns are known, which is in the middle of the next one.
  for (int pass = 0;; ++pass) {
    if (keeps_column) {
      const float log_deviation = log_deviation_of_column(s, e);
      store_spread(s.column_spread[warp], log_deviation - log_scale, at.lane);
      previous = log_scale;
      if (pass < kPasses) {
        log_scale = updated(log_scale, log_deviation);
        store_column_inv(s, e, exp2_of(-log_scale));
      }
    }
    __syncthreads();
    if (pass < kPasses) {
      sweep_rows(s, tile, x, at);
      __syncthreads();
    }
    const float now = spread_of(s.column_spread) + spread_of(s.row_spread[(pass + 1) % 2]);
    if (pass == 0) {
      best = now;
    } else if (now < best * kGain) {
      best = now;
      best_log = keeps_column ? previous : log_scale;
    }
    if (pass == kPasses) break;
    bool changed = log_scale != previous;
    if (!keeps_column) {
      const float log_deviation = log_deviation_of_row(s, e);
      previous = log_scale;
      log_scale = updated(log_scale, log_deviation);
      changed = log_scale != previous;
      store_spread(s.row_spread[pass % 2][warp], log_deviation - log_scale, at.lane);
      store_row_inv(s, e, exp2_of(-log_scale));
    }
    // Where no scale has changed this pass and all later ones repeat the last, which has been
    // judged: the result is that of all passes. Common where every scale is at its floor.
    if (__syncthreads_or(changed) == 0) break;
    sweep_columns(s, tile, x, at);
    __syncthreads();
  }
  return best_log;
}

// The fields of a record that one block writes, in the tile's [m][k] view.
struct Record {
  std::byte* codes;
  __half* step;    // along k
  __half* zero;    // along k
  __half* column;  // along m
};

// Codes of 4 bits: the two words (s = 0, 1) of one T are neighbours.
__device__ __forceinline__ void store_codes_4(std::byte* codes, const Place& at, int t,
                                              const uint32_t (&code)[2][8]) {
  uint2 words = {0, 0};
#pragma unroll
  for (int r0 = 0; r0 < 2; ++r0) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {  // 2 r1 + c
      const int shift = 16 * (i % 2) + 8 * r0 + 4 * (i / 2);
      words.x |= code[r0][i] << shift;
      words.y |= code[r0][4 + i] << shift;
    }
  }
  const int piece = ((4 * at.half + t) * 2 + at.quarter / 2) * 32 + at.lane;
  *reinterpret_cast<uint2*>(codes + 16 * piece + 8 * (at.quarter % 2)) = words;
}
// Codes of 2 bits: both s share a word.
__device__ __forceinline__ void store_codes_2(std::byte* codes, const Place& at, int t,
                                              const uint32_t (&code)[2][8]) {
  uint32_t word = 0;
#pragma unroll
  for (int r0 = 0; r0 < 2; ++r0) {
#pragma unroll
    for (int i = 0; i < 8; ++i) {  // 4 s + 2 r1 + c
      word |= code[r0][i] << (16 * (i % 2) + 8 * r0 + 4 * (i / 4) + 2 * (i / 2 % 2));
    }
  }
  const int piece = (4 * at.half + t) * 32 + at.lane;
  *reinterpret_cast<uint32_t*>(codes + 16 * piece + 4 * at.quarter) = word;
}

// Rounds with the scales whose logarithms the threads keep, and writes the record.
template <int kBits>
__device__ __forceinline__ void round_and_store(Shared& s, Values& x, const Place& at,
                                                float best_log, const Record& record) {
  constexpr float kTop = (1 << kBits) - 1;
  constexpr float kMagic = 12582912.f;  // 1.5 * 2^23: its low bits are a small integer added to it
  const bool keeps_column = threadIdx.x < kN;
  const int e = threadIdx.x % kN;
  const float best = exp2_of(best_log), best_inv = exp2_of(-best_log);
  if (keeps_column) {
    const int half = e / 64, t = e % 4, r0 = e / 32 % 2, g = e % 32 / 4;
    s.column_inv[half][g][2 * t + r0] = best_inv;
    record.column[device_row_scale(column_of(e))] = saturated_half(best);
  }
  __syncthreads();
  float scale[8], low[8], high[8];
  load8(s.column_inv[at.half][at.g], scale);
#pragma unroll
  for (int k = 0; k < 8; ++k) {
#pragma unroll
    for (int m = 0; m < 8; ++m) {
      x[m][k] *= scale[m];
      low[k] = m == 0 ? x[m][k] : fminf(low[k], x[m][k]);
      high[k] = m == 0 ? x[m][k] : fmaxf(high[k], x[m][k]);
    }
  }
  scatter<3>(low, at.lane, 16, [](float a, float b) { return fminf(a, b); });
  scatter<3>(high, at.lane, 16, [](float a, float b) { return fmaxf(a, b); });
  s.row_range[at.half][32 * at.quarter + at.lane] = {low[0], high[0]};
  __syncthreads();
  if (!keeps_column) {
    // Scaling by a positive factor keeps the order, rounding included.
    const float2 a = s.row_range[0][e], b = s.row_range[1][e];
    const float lo = fminf(a.x, b.x) * best_inv, hi = fmaxf(a.y, b.y) * best_inv;
    const float width = (hi - lo) / kTop;
    const float step = width > kMinStep ? width : kMinStep;
    const int quarter = e / 32, q = e % 4, g = e % 32 / 4;
    s.row_inv[quarter][q][g] = best_inv;
    s.row_low[quarter][q][g] = lo;
    s.row_steps[quarter][q][g] = 1.0f / step;
    const int to = device_depth_scale(row_of(e));
    record.step[to] = saturated_half(best * step);
    record.zero[to] = saturated_half(best * lo);
  }
  __syncthreads();
  float steps[8];
  load8(s.row_inv[at.quarter][at.q], scale);
  load8(s.row_low[at.quarter][at.q], low);
  load8(s.row_steps[at.quarter][at.q], steps);
#pragma unroll
  for (int t = 0; t < 4; ++t) {
    uint32_t code[2][8];
#pragma unroll
    for (int r0 = 0; r0 < 2; ++r0) {
#pragma unroll
      for (int k = 0; k < 8; ++k) {
        // Not fused: the least value of a row must give exactly 0.
        const float y = __fmul_rn(x[2 * t + r0][k], scale[k]);
        const float scaled = __fmul_rn(__fsub_rn(y, low[k]), steps[k]);
        // Ties to even; NaN becomes code 0.
        const float sum = __fadd_rn(fminf(fmaxf(scaled, 0.f), kTop), kMagic);
        code[r0][k] = __float_as_uint(sum) & ((1u << kBits) - 1);
      }
    }
    if constexpr (kBits == 4) {
      store_codes_4(record.codes, at, t, code);
    } else {
      store_codes_2(record.codes, at, t, code);
    }
  }
}

struct EncodeArgs {
  const uint4* k;  // f16 [rows][kv_heads][128]; nullptr: every tile comes from pages
  const uint4* v;
  const EncodeTile* tiles;  // device memory
  int num_tiles, kv_heads;
  std::byte* pages[kMaxLayers];
};

// One tile of K (kKeys) or V of one KV head.
template <KvFormat kFormat, bool kKeys>
__device__ __forceinline__ void encode_tile(const EncodeArgs& args, std::byte* pages, int tile_idx,
                                            int head, Shared& s) {
  constexpr KvLayout kLayout = make_kv_layout(kFormat, kN);
  constexpr TileLayout kTile = kFormat == KvFormat::kKvarnK4V4 ? kTileK4V4 : kTileK4V2;
  const Place at(static_cast<int>(threadIdx.x));
  const EncodeTile& tile = args.tiles[tile_idx];
  const int first_row = tile.first_row;
  const auto page = [&](int id) {
    return pages + (int64_t{id} * args.kv_heads + head) * kLayout.page_bytes;
  };
  // 16 threads bring one token, 16 bytes each.
  constexpr int kTokensAtOnce = kThreads / 16;
  const int piece = threadIdx.x % 16;
#pragma unroll
  for (int i = 0; i < kN / kTokensAtOnce; ++i) {
    const int token = kTokensAtOnce * i + threadIdx.x / 16;
    const uint4* from;
    if (first_row >= 0) {
      from = (kKeys ? args.k : args.v) +
             ((int64_t{first_row} + token) * args.kv_heads + head) * 16 + piece;
    } else {
      const int row = token % kLayout.exact_rows;
      const std::byte* rows = page(tile.source_pages[token / kLayout.exact_rows]) +
                              (kKeys ? 0 : 2 * kN * kLayout.exact_rows) + 2 * kN * row;
      from = reinterpret_cast<const uint4*>(rows + device_exact_piece(row, piece));
    }
    const auto to = static_cast<uint32_t>(
        __cvta_generic_to_shared(s.tile + 16 * token + (piece ^ (token & 7))));
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to), "l"(from) : "memory");
  }
  asm volatile("cp.async.wait_all;" ::: "memory");
  if (threadIdx.x < kN) {
    store_column_inv(s, threadIdx.x, 1.0f);
  } else {
    store_row_inv(s, threadIdx.x - kN, 1.0f);
  }
  __syncthreads();

  const TileView<kKeys> view(s, at);
  Values x;
#pragma unroll
  for (int t = 0; t < 4; ++t) {
#pragma unroll
    for (int step = 0; step < 2; ++step) {
      uint32_t r[4];  // r0 + 2 r1
      view.pairs_along_k(t, step, r);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float2 pair = __half22float2(reinterpret_cast<const __half2&>(r[i]));
        x[2 * t + i % 2][4 * step + 2 * (i / 2)] = pair.x;
        x[2 * t + i % 2][4 * step + 2 * (i / 2) + 1] = pair.y;
      }
    }
  }
  const float best_log = normalise(s, view, x, at);

  std::byte* to = page(tile.target_page);
  const auto field = [&](int offset) { return reinterpret_cast<__half*>(to + offset); };
  if constexpr (kKeys) {
    round_and_store<kTile.k_bits>(
        s, x, at, best_log,
        {to + kTile.k_codes, field(kTile.k_step), field(kTile.k_zero), field(kTile.k_token)});
  } else {
    round_and_store<kTile.v_bits>(
        s, x, at, best_log,
        {to + kTile.v_codes, field(kTile.v_step), field(kTile.v_zero), field(kTile.v_channel)});
  }
}

// Grid: (layer, tile, head), heads innermost; y = 0 the keys, y = 1 the values.
template <KvFormat kFormat>
__global__ void __launch_bounds__(kThreads, 2)
    kv_encode_kernel(const __grid_constant__ EncodeArgs args) {
  __shared__ Shared s;
  const auto item = static_cast<int>(blockIdx.x);
  const int head = item % args.kv_heads;
  const int tile = item / args.kv_heads % args.num_tiles;
  std::byte* pages = args.pages[item / args.kv_heads / args.num_tiles];
  if (blockIdx.y == 0) {
    encode_tile<kFormat, true>(args, pages, tile, head, s);
  } else {
    encode_tile<kFormat, false>(args, pages, tile, head, s);
  }
}

}  // namespace

void kv_encode(cudaStream_t stream, const KvEncodeParams& params) {
  if (params.tiles.empty()) return;
  CHECK(!params.layers.empty() && params.layers.size() <= kMaxLayers,
        "kv_encode: one to 128 layers");
  const KvLayout& layout = params.layers[0].layout;
  CHECK(layout.coded() && layout.head_dim == kN, "kv_encode: the format has no coded pages");
  EncodeArgs args{};
  args.kv_heads = params.layers[0].kv_heads;
  for (size_t i = 0; i < params.layers.size(); ++i) {
    const KvLayerView& layer = params.layers[i];
    CHECK(layer.layout.format == layout.format && layer.kv_heads == args.kv_heads,
          "kv_encode: all layers have the same pages");
    args.pages[i] = layer.data;
  }
  if (!params.k.empty()) {
    CHECK(params.layers.size() == 1, "kv_encode: rows belong to one layer");
    for (const Tensor& rows : {params.k, params.v}) {
      CHECK(rows.dtype() == DType::kF16 && rows.dims() == 3 && rows.dim(0) == params.k.dim(0) &&
                rows.dim(1) == args.kv_heads && rows.dim(2) == kN,
            "kv_encode: k and v are f16 [rows, kv_heads, 128]");
    }
    args.k = static_cast<const uint4*>(params.k.raw());
    args.v = static_cast<const uint4*>(params.v.raw());
  }
  args.tiles = params.tiles.data();
  const auto items =
      static_cast<int64_t>(params.layers.size() * params.tiles.size()) * args.kv_heads;
  CHECK(items <= INT32_MAX, "kv_encode: tiles of one launch");
  args.num_tiles = static_cast<int>(params.tiles.size());
  const dim3 grid(static_cast<unsigned>(items), 2);
  if (layout.format == KvFormat::kKvarnK4V2) {
    kv_encode_kernel<KvFormat::kKvarnK4V2><<<grid, kThreads, 0, stream>>>(args);
  } else {
    kv_encode_kernel<KvFormat::kKvarnK4V4><<<grid, kThreads, 0, stream>>>(args);
  }
  CUDA_CHECK(cudaGetLastError());
}

}  // namespace kvarn::cuda
