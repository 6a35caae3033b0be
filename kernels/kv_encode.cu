// Encodes complete tiles into pages. The CPU twin (kv_encode_impl.h) is the specification: 8 passes
// of column and row normalisation, best imbalance kept for a gain above 1e-4, asymmetric rounding.
// Every sum has one fixed order, so a record depends on the rows alone: not on the batch, the
// layer, the source or the run. Source: KVarN, arXiv 2606.03458.
//
// One thread block encodes the 128 x 128 values of K or of V of one tile. They stay where they are
// (fp32 in registers, 128 a thread, and fp16 in shared memory) while their scales are sought: the
// deviations of X / column / row are those of X / row (or X / column) divided by the other scale.
//
// Both kinds are seen as [m][k]: k carries the rounding step (channels of K, tokens of V), m is the
// other axis, as in the MMA fragments that the codes are stored for (kv_device_layout.h). A "row"
// below is one k, a "column" one m, as in the twin. Lane 4g + q of warp w owns the 16 columns
// m = 16 T + 8 r0 + g and the 8 rows k = 32 w + 16 s + 8 r1 + 2q + c (T 0..7; r0, s, r1, c 0..1),
// which are whole 32-bit words of codes. A row lies within one warp, a column in all four.
//
// A sweep takes the deviations of all rows (or columns): each warp the means by MMA, exactly enough
// because X is fp16 and the scales are split in two fp16 numbers, then the sums of squares about
// them in fp32 (2 FMA a value). The four parts of a column are merged as Chan, Golub and LeVeque do
// ("Updating Formulae and a Pairwise Algorithm", 1979). So it is a two-pass variance at every step.
// Scales are kept as base-2 logarithms, which makes an update two special-function instructions.
// Which pass was best is found at the end, from what all passes left behind.
//
// Four warps with many registers rather than eight with few: what is not an FMA of the sweeps is
// done once a warp, and three tiles share a multiprocessor, each computing while others wait.
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
constexpr int kThreads = 128;    // 4 warps: quarters of k
constexpr int kMaxLayers = 128;  // page pointers in the kernel's arguments

constexpr int kPasses = 8;
constexpr float kLog2E = 1.44269504f;
constexpr float kLogMin = -0.3f * kLog2E, kLogMax = 10.0f * kLog2E;  // of an accumulated log scale
constexpr float kLogStd = 9.96578428f;      // log2 of 1e3: a measured deviation is in [1e-3, 1e3]
constexpr float kLogMinStd = -26.5754248f;  // log2 of 1e-8: guard of a division
constexpr float kMinStep = 1e-10f;
constexpr float kGain = 1.0f - 1e-4f;  // a pass must be better by this to be kept
// Reciprocal scales, at most e^0.3, are multiplied by this before they are split in fp16 numbers,
// so that the smallest (e^-10) still keeps 20 bits. As fp32 numbers they are larger by the values
// that a mean is of, 128 of a row or 32 of a part of a column: then the sum by MMA is the mean.
constexpr float kSplitScale = 1024.0f;
constexpr float kColumnScale = 128 * kSplitScale, kRowScale = 32 * kSplitScale;
constexpr float kLogColumnScale = 17.0f, kLogRowScale = 15.0f;  // their log2

// What a warp leaves of one column: of its 32 values, the mean and the sum of squares about it.
struct Moments {
  float mean, squares;
};
// Logarithms of the least and largest deviation, as integers of the same order.
struct Spread {
  int low, high;
};

// The scales of the rows of one warp, where its threads find them together.
struct RowScales {
  float inv[4][8];               // [q][4s + 2r1 + c]
  __half split[4][2][4][2];      // [q][low part][2s + r1][c]
  float low[4][8], steps[4][8];  // zero and 1/step, in the order of inv
};

struct __align__(16) Shared {
  uint4 tile[kN * 16];              // fp16 tokens; 16-byte piece p of token t at p ^ (t & 7)
  float column_inv[8][20];          // [g][2T + r0], rows of 16 spread over the banks
  __half column_split[8][4][4][2];  // [T][q][2r0 + low part][c]: m = 16T + 8r0 + 2q + c
  RowScales rows[4];                // of each warp
  Moments column_parts[4][kN];      // [warp][kept column]
  // What each pass leaves behind: state 0 is the start, state n follows n passes. Logarithms of the
  // scales that each thread keeps, and spreads of those of each warp.
  float column_log[kPasses + 1][kN], row_log[kPasses + 1][kN];
  Spread column_spread[kPasses + 1][4], row_spread[kPasses + 1][4];
};
static_assert(3 * sizeof(Shared) < size_t{224} * 1024, "three tiles share a multiprocessor");

// The place of a thread in the tile. Besides the 128 values that it owns, a thread keeps the scales
// of one column and of one row.
struct Place {
  int warp, lane, g, q;
  __device__ explicit Place(int thread)
      : warp(thread / 32), lane(thread % 32), g(lane / 4), q(lane % 4) {}
  __device__ int kept_row() const {
    return 32 * warp + 16 * (g / 4) + 8 * (g / 2 % 2) + 2 * q + g % 2;
  }
  // Column parts are numbered 32 (T / 2) + lane as sweep_columns() leaves them; a thread keeps the
  // one of its own number.
  __device__ int kept_t() const { return 2 * warp + q / 2; }
  __device__ int kept_r0() const { return q % 2; }
  __device__ int kept_column() const { return 16 * kept_t() + 8 * kept_r0() + g; }
};
// The same, made anew: what is computed from it is not kept in registers from sweep to sweep, where
// the values need them all.
__device__ __forceinline__ Place place_anew(int& thread) {
  asm volatile("" : "+r"(thread));
  return Place(thread);
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

// a b + c, fp32 <- fp16 x fp16, 16 x 8 x 16 (PTX ISA, "Matrix fragments for mma.m16n8k16").
struct Fragment {
  float v[4];
};
__device__ __forceinline__ Fragment multiply_add(uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3,
                                                 uint32_t b0, uint32_t b1, const Fragment& c) {
  Fragment d;
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
      "{%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%10,%11,%12,%13};"
      : "=f"(d.v[0]), "=f"(d.v[1]), "=f"(d.v[2]), "=f"(d.v[3])
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1), "f"(c.v[0]), "f"(c.v[1]), "f"(c.v[2]),
        "f"(c.v[3]));
  return d;
}

// The tile in shared memory through the eyes of one thread. Memory has a row for each token; the
// tokens of K are its m, those of V its k.
template <bool kKeys>
class TileView {
 public:
  __device__ TileView(const Shared& s, const Place& at) {
    const int matrix = at.lane / 8, i = at.lane % 8;
    const int m_block = matrix % 2, k_block = 4 * at.warp + matrix / 2;
    const int token = 8 * (kKeys ? m_block : k_block) + i;
    const int piece = (kKeys ? k_block : m_block) ^ i;
    base_ = static_cast<uint32_t>(__cvta_generic_to_shared(s.tile + token * 16 + piece));
  }
  // Keeps one address in registers from sweep to sweep, not one for each block.
  __device__ void forget_addresses() { asm volatile("" : "+r"(base_)); }
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
    return kKeys ? (base_ ^ (s * 32)) + t * 4096 : (base_ ^ (t * 32)) + s * 4096;
  }
  uint32_t base_;
};

// Combines `kValues` values over the lanes that differ in `kLevels` bits, `bit` and those below it.
// Each level halves the values a lane keeps: those whose index has the bit that the lane has.
template <int kValues, int kLevels, class Combine>
__device__ __forceinline__ void scatter(float (&value)[kValues], int lane, int bit,
                                        Combine combine) {
#pragma unroll
  for (int level = 0, count = kValues / 2; level < kLevels; ++level, count /= 2, bit /= 2) {
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
template <int kValues, int kLevels>
__device__ __forceinline__ void select(float (&value)[kValues], int lane, int bit) {
#pragma unroll
  for (int level = 0, count = kValues / 2; level < kLevels; ++level, count /= 2, bit /= 2) {
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
using Values = float[16][8];

// A sweep takes some rows (columns) at a time, as registers are few. Blocks of the tile are loaded
// ahead of the MMAs that use them, the first ones before the scales are known.

// Blocks (T, s) on their way to the MMAs.
template <int kBlocks>
struct Ahead {
  uint32_t block[kBlocks][4];
};

// Means of the rows 4 i + 2 r1 + c (r1, c 0, 1) of X / column: c 0, 1 of the high part, then of the
// low part; the same in every g.
struct RowSums {
  Fragment r1[2];
};
template <bool kKeys>
__device__ __forceinline__ void load_ahead(const TileView<kKeys>& tile, Ahead<2>& ahead) {
#pragma unroll
  for (int t = 0; t < 2; ++t) tile.pairs_along_m(t, 0, ahead.block[t]);
}
template <bool kKeys>
__device__ __forceinline__ RowSums row_sums(const Shared& s, const TileView<kKeys>& tile, int i,
                                            int q, Ahead<2>& ahead) {
  RowSums sums{};
#pragma unroll
  for (int t = 0; t < 8; ++t) {
    const uint4 a = *reinterpret_cast<const uint4*>(s.column_split[t][q]);
    uint32_t(&b)[4] = ahead.block[t % 2];
    sums.r1[0] = multiply_add(a.x, a.y, a.z, a.w, b[0], b[1], sums.r1[0]);
    sums.r1[1] = multiply_add(a.x, a.y, a.z, a.w, b[2], b[3], sums.r1[1]);
    const int next = 8 * i + t + 2;
    if (next < 16) tile.pairs_along_m(next % 8, next / 8, b);
  }
  return sums;
}
__device__ __forceinline__ void row_squares(const Shared& s, const Values& x, int i, int g,
                                            const RowSums& sums, float* mean, float* squares) {
#pragma unroll
  for (int k = 0; k < 4; ++k) mean[k] = sums.r1[k / 2].v[k % 2] + sums.r1[k / 2].v[2 + k % 2];
#pragma unroll
  for (int t = 0; t < 8; t += 2) {
    const float4 scale = *reinterpret_cast<const float4*>(s.column_inv[g] + 2 * t);
    const float scales[4] = {scale.x, scale.y, scale.z, scale.w};
#pragma unroll
    for (int m = 0; m < 4; ++m) {
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        const float d = fmaf(x[2 * t + m][4 * i + k], scales[m], -mean[k]);
        squares[k] = t + m == 0 ? d * d : fmaf(d, d, squares[k]);
      }
    }
  }
}
// Mean of the row of X / column that the thread keeps, and the sum of squares about it.
template <bool kKeys>
__device__ __forceinline__ Moments sweep_rows(const Shared& s, TileView<kKeys>& tile,
                                              const Values& x, const Place& at, Ahead<2>& ahead) {
  tile.forget_addresses();
  float mean[8], squares[8];
  const RowSums first = row_sums(s, tile, 0, at.q, ahead);
  const RowSums second = row_sums(s, tile, 1, at.q, ahead);
  row_squares(s, x, 0, at.g, first, mean, squares);
  row_squares(s, x, 1, at.g, second, mean + 4, squares + 4);
  scatter<8, 3>(squares, at.lane, 16, Add{});
  select<8, 3>(mean, at.lane, 16);
  return {mean[0], squares[0]};
}

// Means of the columns of T = 2 i, 2 i + 1 of X / row: m = g: high, low part; m = g + 8: the same.
struct ColumnSums {
  Fragment t[2];
};
template <bool kKeys>
__device__ __forceinline__ void load_ahead(const TileView<kKeys>& tile, int i, Ahead<4>& ahead) {
#pragma unroll
  for (int n = 0; n < 4; ++n) tile.pairs_along_k(2 * i + n / 2, n % 2, ahead.block[n]);
}
__device__ __forceinline__ ColumnSums column_sums(const Ahead<4>& ahead, const uint4& b) {
  ColumnSums sums{};
#pragma unroll
  for (int t = 0; t < 2; ++t) {
    const uint32_t(&first)[4] = ahead.block[2 * t];
    const uint32_t(&second)[4] = ahead.block[2 * t + 1];
    sums.t[t] = multiply_add(first[0], first[1], first[2], first[3], b.x, b.y, sums.t[t]);
    sums.t[t] = multiply_add(second[0], second[1], second[2], second[3], b.z, b.w, sums.t[t]);
  }
  return sums;
}
// Moments of the columns of X / row: those of a warp's 32 rows.
template <bool kKeys>
__device__ __forceinline__ void sweep_columns(Shared& s, TileView<kKeys>& tile, const Values& x,
                                              const Place& at, Ahead<4>& ahead) {
  tile.forget_addresses();
  const RowScales& rows = s.rows[at.warp];
  // Even columns of the B fragment take the high part, odd ones the low part.
  const uint4 b = *reinterpret_cast<const uint4*>(rows.split[at.q][at.g % 2]);
  float scale[8];
  load8(rows.inv[at.q], scale);
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    float mean[4], squares[4];
    const ColumnSums sums = column_sums(ahead, b);
    if (i < 3) load_ahead(tile, i + 1, ahead);
#pragma unroll
    for (int m = 0; m < 4; ++m)
      mean[m] = sums.t[m / 2].v[2 * (m % 2)] + sums.t[m / 2].v[2 * (m % 2) + 1];
#pragma unroll
    for (int k = 0; k < 8; ++k) {
#pragma unroll
      for (int m = 0; m < 4; ++m) {
        const float d = fmaf(x[4 * i + m][k], scale[k], -mean[m]);
        squares[m] = k == 0 ? d * d : fmaf(d, d, squares[m]);
      }
    }
    scatter<4, 2>(squares, at.lane, 2, Add{});
    select<4, 2>(mean, at.lane, 2);
    s.column_parts[at.warp][32 * i + at.lane] = {mean[0], squares[0]};
  }
}

// Base-2 logarithm of the sample deviation of X / row in the column that the thread keeps.
__device__ __forceinline__ float column_deviation(const Shared& s, int thread) {
  Moments part[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) part[i] = s.column_parts[i][thread];
  const float mean = 0.25f * ((part[0].mean + part[1].mean) + (part[2].mean + part[3].mean));
  float between = 0.f;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const float off = part[i].mean - mean;
    between = fmaf(off, off, between);
  }
  const float within = (part[0].squares + part[1].squares) + (part[2].squares + part[3].squares);
  return fmaf(0.5f, log2_of(fmaf(32.0f, between, within) * (1.0f / (kN - 1))), -kLogRowScale);
}

// Adds the logarithm of the present deviation to that of the scale.
__device__ __forceinline__ float updated(float log_scale, float log_deviation) {
  const float step = fminf(fmaxf(log_deviation - log_scale, -kLogStd), kLogStd);
  return fminf(fmaxf(log_scale + step, kLogMin), kLogMax);
}

struct Split {
  __half high, low;
};
__device__ __forceinline__ Split split(float scaled) {
  const __half high = __float2half_rn(scaled);
  return {high, __float2half_rn(scaled - __half2float(high))};
}
// Gives all warps, or its own, the reciprocal scale that the thread keeps.
__device__ __forceinline__ void store_column_scale(Shared& s, const Place& at, float inv) {
  const Split parts = split(inv * kSplitScale);
  s.column_inv[at.g][2 * at.kept_t() + at.kept_r0()] = inv * kColumnScale;
  __half(&to)[4][2] = s.column_split[at.kept_t()][at.g / 2];
  to[2 * at.kept_r0()][at.g % 2] = parts.high;
  to[2 * at.kept_r0() + 1][at.g % 2] = parts.low;
}
__device__ __forceinline__ void store_row_scale(Shared& s, const Place& at, float inv) {
  RowScales& rows = s.rows[at.warp];
  const Split parts = split(inv * kSplitScale);
  rows.inv[at.q][at.g] = inv * kRowScale;  // g = 4s + 2r1 + c
  rows.split[at.q][0][at.g / 2][at.g % 2] = parts.high;
  rows.split[at.q][1][at.g / 2][at.g % 2] = parts.low;
}

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

// Logarithms of the scales that a thread keeps.
struct Logs {
  float column, row;
};

// Runs the passes; returns the number of the last state to be judged.
template <bool kKeys>
__device__ __forceinline__ int run_passes(Shared& s, TileView<kKeys>& tile, const Values& x,
                                          int& thread) {
  Logs logs{};
  bool changed = true;
  Ahead<2> rows_ahead;
  load_ahead(tile, rows_ahead);
  for (int state = 0;; ++state) {
    Ahead<4> columns_ahead;
    // The rows' half of a pass; the start only looks at their deviations.
    {
      const Place at = place_anew(thread);
      const Moments row = sweep_rows(s, tile, x, at, rows_ahead);
      load_ahead(tile, 0, columns_ahead);
      const float deviation =
          fmaf(0.5f, log2_of(row.squares * (1.0f / (kN - 1))), -kLogColumnScale);
      const float row_log = state == 0 ? 0.f : updated(logs.row, deviation);
      changed = changed || row_log != logs.row;
      logs.row = row_log;
      s.row_log[state][thread] = row_log;
      store_spread(s.row_spread[state][at.warp], deviation - row_log, at.lane);
      store_row_scale(s, at, exp2_of(-row_log));
    }
    __syncwarp();
    sweep_columns(s, tile, x, place_anew(thread), columns_ahead);
    // Where no scale has changed, this state and all later ones repeat the last: the result is that
    // of all passes. Common where every scale is at its floor.
    if (__syncthreads_or(static_cast<int>(changed)) == 0) return state - 1;
    // The columns' half of the next pass.
    const Place at = place_anew(thread);
    const float deviation = column_deviation(s, thread);
    s.column_log[state][thread] = logs.column;
    store_spread(s.column_spread[state][at.warp], deviation - logs.column, at.lane);
    if (state == kPasses) return kPasses;
    const float column_log = updated(logs.column, deviation);
    changed = column_log != logs.column;
    logs.column = column_log;
    store_column_scale(s, at, exp2_of(-column_log));
    load_ahead(tile, rows_ahead);
    __syncthreads();
  }
}

// The scales of the best state.
template <bool kKeys>
__device__ __forceinline__ Logs normalise(Shared& s, TileView<kKeys>& tile, const Values& x,
                                          int& thread) {
  const int last = run_passes(s, tile, x, thread);
  __syncthreads();
  const int own = min(thread % 32, last);  // lane n judges state n
  const float imbalance = spread_of(s.column_spread[own]) + spread_of(s.row_spread[own]);
  float best = __shfl_sync(~0u, imbalance, 0);
  int chosen = 0;
  for (int state = 1; state <= last; ++state) {
    const float now = __shfl_sync(~0u, imbalance, state);
    if (now < best * kGain) {
      best = now;
      chosen = state;
    }
  }
  return {s.column_log[chosen][thread], s.row_log[chosen][thread]};
}

// The fields of a record that one block writes, in the tile's [m][k] view.
struct Record {
  std::byte* codes;
  __half* step;    // along k
  __half* zero;    // along k
  __half* column;  // along m
};

// Adding kMagic to a small number rounds it to an integer (ties to even), the code, which then is
// what the bits of the sum exceed those of kMagic by. Words are added up from whole sums; the
// shifted bits of kMagic are constants that come off.
constexpr float kMagic = 12582912.f;  // 1.5 * 2^23, whose unit in the last place is 1
constexpr uint32_t kMagicBits = 0x4b400000u;

// Words of two bits or four, by position in code[r0][4 s + 2 r1 + c].
template <int kBits>
__host__ __device__ constexpr int code_shift(int r0, int i) {
  return kBits == 4 ? 16 * (i % 2) + 8 * r0 + 4 * (i / 2 % 2)
                    : 16 * (i % 2) + 8 * r0 + 4 * (i / 4) + 2 * (i / 2 % 2);
}
// The word of the codes [begin, end) of both r0.
template <int kBits>
__device__ __forceinline__ uint32_t code_word(const uint32_t (&code)[2][8], int begin, int end) {
  uint32_t word = 0;
#pragma unroll
  for (int r0 = 0; r0 < 2; ++r0) {
#pragma unroll
    for (int i = begin; i < end; ++i)
      word += (code[r0][i] << code_shift<kBits>(r0, i)) - (kMagicBits << code_shift<kBits>(r0, i));
  }
  return word;
}
// Codes of one T: of 4 bits two neighbouring words (s = 0, 1), of 2 bits one word.
template <int kBits>
__device__ __forceinline__ void store_codes(std::byte* codes, const Place& at, int t,
                                            const uint32_t (&code)[2][8]) {
  if constexpr (kBits == 4) {
    const int piece = (2 * t + at.warp / 2) * 32 + at.lane;
    *reinterpret_cast<uint2*>(codes + 16 * piece + 8 * (at.warp % 2)) =
        make_uint2(code_word<4>(code, 0, 4), code_word<4>(code, 4, 8));
  } else {
    const int piece = 32 * t + at.lane;
    *reinterpret_cast<uint32_t*>(codes + 16 * piece + 4 * at.warp) = code_word<2>(code, 0, 8);
  }
}

// Rounds with the scales given by their logarithms, and writes the record.
template <int kBits>
__device__ __forceinline__ void round_and_store(Shared& s, Values& x, const Place& at,
                                                const Logs& logs, const Record& record) {
  constexpr float kTop = (1 << kBits) - 1;
  RowScales& rows = s.rows[at.warp];
  s.column_inv[at.g][2 * at.kept_t() + at.kept_r0()] = exp2_of(-logs.column);
  record.column[device_row_scale(at.kept_column())] = saturated_half(exp2_of(logs.column));
  __syncthreads();
  float scale[8], low[8], high[8];
#pragma unroll
  for (int t = 0; t < 8; t += 2) {
    const float4 loaded = *reinterpret_cast<const float4*>(s.column_inv[at.g] + 2 * t);
    const float scales[4] = {loaded.x, loaded.y, loaded.z, loaded.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
#pragma unroll
      for (int k = 0; k < 8; ++k) {
        float& y = x[2 * t + i][k];
        y *= scales[i];
        low[k] = t + i == 0 ? y : fminf(low[k], y);
        high[k] = t + i == 0 ? y : fmaxf(high[k], y);
      }
    }
  }
  scatter<8, 3>(low, at.lane, 16, [](float a, float b) { return fminf(a, b); });
  scatter<8, 3>(high, at.lane, 16, [](float a, float b) { return fmaxf(a, b); });
  {
    // Scaling by a positive factor keeps the order, rounding included.
    const float row = exp2_of(logs.row), inv = exp2_of(-logs.row);
    const float lo = low[0] * inv, hi = high[0] * inv;
    const float width = (hi - lo) / kTop;
    const float step = width > kMinStep ? width : kMinStep;
    rows.inv[at.q][at.g] = inv;
    rows.low[at.q][at.g] = lo;
    rows.steps[at.q][at.g] = 1.0f / step;
    const int to = device_depth_scale(at.kept_row());
    record.step[to] = saturated_half(row * step);
    record.zero[to] = saturated_half(row * lo);
  }
  __syncwarp();
  float steps[8];
  load8(rows.inv[at.q], scale);
  load8(rows.low[at.q], low);
  load8(rows.steps[at.q], steps);
#pragma unroll
  for (int t = 0; t < 8; ++t) {
    uint32_t code[2][8];
#pragma unroll
    for (int r0 = 0; r0 < 2; ++r0) {
#pragma unroll
      for (int k = 0; k < 8; ++k) {
        // Not fused: the least value of a row must give exactly 0, and where few values occur, as
        // in fp16 channels with a large offset, ties between codes are common and must round as in
        // the twin. The largest is at most kTop and a few roundings. Ties to even.
        const float y = __fmul_rn(x[2 * t + r0][k], scale[k]);
        const float scaled = __fmul_rn(__fsub_rn(y, low[k]), steps[k]);
        code[r0][k] = __float_as_uint(__fadd_rn(scaled, kMagic));
      }
    }
    store_codes<kBits>(record.codes, at, t, code);
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
  auto thread = static_cast<int>(threadIdx.x);
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
  store_column_scale(s, Place(static_cast<int>(threadIdx.x)), 1.0f);
  __syncthreads();

  TileView<kKeys> view(s, Place(thread));
  Values x;
#pragma unroll
  for (int t = 0; t < 8; ++t) {
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
  const Logs logs = normalise(s, view, x, thread);
  const Place at(thread);

  std::byte* to = page(tile.target_page);
  const auto field = [&](int offset) { return reinterpret_cast<__half*>(to + offset); };
  if constexpr (kKeys) {
    round_and_store<kTile.k_bits>(
        s, x, at, logs,
        {to + kTile.k_codes, field(kTile.k_step), field(kTile.k_zero), field(kTile.k_token)});
  } else {
    round_and_store<kTile.v_bits>(
        s, x, at, logs,
        {to + kTile.v_codes, field(kTile.v_step), field(kTile.v_zero), field(kTile.v_channel)});
  }
}

// Grid: (layer, tile, head), heads innermost; y = 0 the keys, y = 1 the values.
template <KvFormat kFormat>
__global__ void __launch_bounds__(kThreads, 3)
    kv_encode_kernel(const __grid_constant__ EncodeArgs args) {
  extern __shared__ uint4 shared_memory[];
  Shared& s = *reinterpret_cast<Shared*>(shared_memory);
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
  const auto kernel = layout.format == KvFormat::kKvarnK4V2
                          ? kv_encode_kernel<KvFormat::kKvarnK4V2>
                          : kv_encode_kernel<KvFormat::kKvarnK4V4>;
  // More than the 48 KiB that a kernel may have unasked.
  CUDA_CHECK(
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, sizeof(Shared)));
  kernel<<<grid, kThreads, sizeof(Shared), stream>>>(args);
  CUDA_CHECK(cudaGetLastError());
}

}  // namespace kvarn::cuda
