// linear() on AMX: 16x16 outputs a tile, bf16 times bf16 into fp32. The weights are the A operand
// in their own layout (16 rows of 64 bytes), the activations the packed B operand, so y^T = W x^T
// and one row of x is the same instruction with one column: GEMV and GEMM share the order. A tile
// element adds the 16 pairs of a step to its accumulator in order of k, subnormals count as zero.
// A range of columns is walked in panels of 32. With several blocks of rows the next panel's
// weights are prefetched in order of address while this one is multiplied.
#include <immintrin.h>

#include <algorithm>
#include <cstring>

#include "kernels/core/dtype.h"
#include "kernels/linear_cpu.h"

#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,amx-tile,amx-bf16")

namespace kvarn::cpu {
namespace {

constexpr int kTileRows = 16;             // of W, and rows of x in a block
constexpr int kStep = 32;                 // bf16 of k in a tile: 64 bytes
constexpr int kPanel = 2 * kTileRows;     // columns of y worked on together
constexpr int64_t kGroupBytes = 1 << 20;  // packed x that stays in L2 while the columns pass
constexpr int64_t kPrefetchBytes = 512;   // ahead in each row of W that a GEMV reads
constexpr int kTileBytes = kTileRows * 64;

// The tile loads of GCC are asm without a memory operand: what they read must be in memory first.
inline void settle_memory() { asm volatile("" ::: "memory"); }

// Rows of x per block: all of them when they fit one tile, so that a GEMV packs one column.
int64_t block_width(int64_t rows) { return std::min<int64_t>(rows, kTileRows); }
int64_t num_steps(int64_t k) { return (k + kStep - 1) / kStep; }
int64_t block_bytes(int64_t rows, int64_t k) { return num_steps(k) * block_width(rows) * 64; }

size_t packed_bytes_amx(int64_t rows, int64_t k) {
  const int64_t blocks = (rows + kTileRows - 1) / kTileRows;
  return static_cast<size_t>(blocks * block_bytes(rows, k));
}

inline void transpose16(__m512i (&r)[16]) {
  __m512i t[16];
#pragma GCC unroll 16
  for (int i = 0; i < 16; i += 2) {
    t[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]);
    t[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
  }
#pragma GCC unroll 16
  for (int i = 0; i < 16; i += 4) {
    r[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
    r[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
    r[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
    r[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
  }
  // Now r[4g + c] holds, in 128-bit lane l, column 4l + c of rows 4g .. 4g+3.
#pragma GCC unroll 16
  for (int c = 0; c < 4; ++c) {
    const __m512i low01 = _mm512_shuffle_i32x4(r[c], r[4 + c], 0x44);
    const __m512i high01 = _mm512_shuffle_i32x4(r[c], r[4 + c], 0xee);
    const __m512i low23 = _mm512_shuffle_i32x4(r[8 + c], r[12 + c], 0x44);
    const __m512i high23 = _mm512_shuffle_i32x4(r[8 + c], r[12 + c], 0xee);
    t[c] = _mm512_shuffle_i32x4(low01, low23, 0x88);
    t[4 + c] = _mm512_shuffle_i32x4(low01, low23, 0xdd);
    t[8 + c] = _mm512_shuffle_i32x4(high01, high23, 0x88);
    t[12 + c] = _mm512_shuffle_i32x4(high01, high23, 0xdd);
  }
#pragma GCC unroll 16
  for (int i = 0; i < 16; ++i) r[i] = t[i];
}

// 32 floats -> 16 pairs of bf16; past `count` zeros.
inline __m512i pack_pairs(const float* x, int64_t count) {
  const auto mask = [](int64_t n) {
    return static_cast<__mmask16>(n >= 16 ? 0xffffu : n <= 0 ? 0u : (1u << n) - 1u);
  };
  const __m512 low = _mm512_maskz_loadu_ps(mask(count), x);
  const __m512 high = _mm512_maskz_loadu_ps(mask(count - 16), x + 16);
  return reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(high, low));
}

// Packed x: [block][step][16 pairs of k][width rows], a pair being two bf16 of one row.
void pack_amx(const float* x, int64_t rows, int64_t k, int64_t first, int64_t last,
              std::byte* packed) {
  const int64_t width = block_width(rows);
  for (int64_t block = first; block < last; ++block) {
    const float* from = x + block * kTileRows * k;
    std::byte* to = packed + block * block_bytes(rows, k);
    const int64_t filled = std::min<int64_t>(kTileRows, rows - block * kTileRows);
    for (int64_t i = 0; i < k; i += kStep, to += width * 64) {
      if (width == kTileRows) {
        __m512i r[16];
        for (int64_t row = 0; row < kTileRows; ++row) {
          r[row] = row < filled ? pack_pairs(from + row * k + i, k - i) : _mm512_setzero_si512();
        }
        transpose16(r);
        for (int64_t pair = 0; pair < 16; ++pair) _mm512_storeu_si512(to + pair * 64, r[pair]);
      } else {
        for (int64_t row = 0; row < width; ++row) {
          int32_t pairs[16];
          _mm512_storeu_si512(pairs, pack_pairs(from + row * k + i, k - i));
          for (int64_t pair = 0; pair < 16; ++pair) {
            std::memcpy(to + (pair * width + row) * 4, &pairs[pair], 4);
          }
        }
      }
    }
  }
}

// Tiles 0-3 accumulate, 4-5 hold x (16 pairs by `width` rows), 6-7 hold W.
void configure_tiles(int64_t width) {
  struct alignas(64) {
    uint8_t palette = 1, start_row = 0, reserved[14] = {};
    uint16_t row_bytes[16] = {};
    uint8_t rows[16] = {};
  } config;
  static_assert(sizeof(config) == 64);
  for (int tile = 0; tile < 8; ++tile) {
    config.rows[tile] = kTileRows;
    config.row_bytes[tile] = static_cast<uint16_t>(tile < 6 ? 4 * width : 64);
  }
  settle_memory();
  _tile_loadconfig(&config);
}

// 16 rows of W by one step of k, padded with zeros where the matrix or k ends.
inline void copy_weights(const bf16* w, int64_t k, int64_t count, int64_t remaining_k,
                         std::byte* tile) {
  std::memset(tile, 0, kTileBytes);
  const auto bytes = static_cast<size_t>(std::min<int64_t>(remaining_k, kStep)) * sizeof(bf16);
  for (int64_t row = 0; row < count; ++row) std::memcpy(tile + row * 64, w + row * k, bytes);
  settle_memory();
}

// Accumulator tile [16 columns][width rows] -> y[row][column].
inline void write_outputs(const float* tile, int64_t width, int64_t columns, int64_t rows, float* y,
                          int64_t y_stride) {
  if (width == kTileRows && columns == kTileRows) {
    __m512i r[16];
#pragma GCC unroll 16
    for (int i = 0; i < 16; ++i) r[i] = _mm512_load_si512(tile + 16 * i);
    transpose16(r);
    for (int64_t row = 0; row < rows; ++row) _mm512_storeu_si512(y + row * y_stride, r[row]);
    return;
  }
  for (int64_t row = 0; row < rows; ++row) {
    for (int64_t column = 0; column < columns; ++column) {
      y[row * y_stride + column] = tile[column * width + row];
    }
  }
}

struct alignas(64) Outputs {
  float tile[4][kTileRows * kTileRows];
};

// The next `kLines` cache lines of the next panel's weights, into L2.
template <int kLines>
inline void prefetch_slice(const char*& ahead) {
#pragma GCC unroll 32
  for (int line = 0; line < kLines; ++line) _mm_prefetch(ahead + 64 * line, _MM_HINT_T1);
  ahead += 64 * kLines;
}

// 16 columns by one block of x: the GEMV. One tile of weights at a time, its 16 rows read as they
// lie, with each row's bytes asked for ahead of time and, at its end, those of the row that takes
// its place. Two cores of a Xeon with AMX reach 89 % of a plain read so; two or four tiles at once,
// or the next rows asked for in order of address, gave 70 to 80 %.
void tile_by_one(const bf16* w, int64_t k, const std::byte* x, int64_t width, Outputs& out) {
  const int64_t stride = k * static_cast<int64_t>(sizeof(bf16)), x_stride = 4 * width;
  const int64_t full = k / kStep;
  const char* w0 = reinterpret_cast<const char*>(w);
  _tile_zero(0);
  for (int64_t s = 0; s < full; ++s) {
    int64_t ahead = s * 64 + kPrefetchBytes;
    if (ahead >= stride) ahead += (kTileRows - 1) * stride;
    const char* line = w0 + ahead;
#pragma GCC unroll 16
    for (int row = 0; row < kTileRows; ++row, line += stride) _mm_prefetch(line, _MM_HINT_T0);
    _tile_loadd(4, x + s * width * 64, x_stride);
    _tile_loadd(6, w0 + s * 64, stride);
    _tile_dpbf16ps(0, 6, 4);
  }
  if (full * kStep < k) {
    alignas(64) std::byte tail[kTileBytes];
    copy_weights(w + full * kStep, k, kTileRows, k - full * kStep, tail);
    _tile_loadd(4, x + full * width * 64, x_stride);
    _tile_loadd(6, tail, 64);
    _tile_dpbf16ps(0, 6, 4);
  }
  _tile_stored(0, out.tile[0], x_stride);
  settle_memory();
}

// 32 columns by two blocks of x of 16 rows each.
template <int kLines>
void panel_by_two(const bf16* w, int64_t k, const std::byte* x0, const std::byte* x1,
                  const char*& ahead, Outputs& out) {
  const int64_t stride = k * static_cast<int64_t>(sizeof(bf16));
  const int64_t full = k / kStep;
  const char* w0 = reinterpret_cast<const char*>(w);
  const char* w1 = w0 + kTileRows * stride;
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  for (int64_t s = 0; s < full; ++s) {
    prefetch_slice<kLines>(ahead);
    _tile_loadd(4, x0 + s * kTileBytes, 64);
    _tile_loadd(6, w0 + s * 64, stride);
    _tile_dpbf16ps(0, 6, 4);
    _tile_loadd(7, w1 + s * 64, stride);
    _tile_dpbf16ps(1, 7, 4);
    _tile_loadd(5, x1 + s * kTileBytes, 64);
    _tile_dpbf16ps(2, 6, 5);
    _tile_dpbf16ps(3, 7, 5);
  }
  if (full * kStep < k) {
    alignas(64) std::byte tail[2][kTileBytes];
    const int64_t at = full * kStep;
    copy_weights(w + at, k, kTileRows, k - at, tail[0]);
    copy_weights(w + kTileRows * k + at, k, kTileRows, k - at, tail[1]);
    _tile_loadd(4, x0 + full * kTileBytes, 64);
    _tile_loadd(5, x1 + full * kTileBytes, 64);
    _tile_loadd(6, tail[0], 64);
    _tile_loadd(7, tail[1], 64);
    _tile_dpbf16ps(0, 6, 4);
    _tile_dpbf16ps(1, 7, 4);
    _tile_dpbf16ps(2, 6, 5);
    _tile_dpbf16ps(3, 7, 5);
  }
  _tile_stored(0, out.tile[0], 64);
  _tile_stored(1, out.tile[1], 64);
  _tile_stored(2, out.tile[2], 64);
  _tile_stored(3, out.tile[3], 64);
  settle_memory();
}

// Up to 16 columns where W ends: every tile of W is copied, so nothing behind it is read.
void edge_by_one(const bf16* w, int64_t k, int64_t columns, const std::byte* x, int64_t width,
                 Outputs& out) {
  alignas(64) std::byte tile[kTileBytes];
  _tile_zero(0);
  for (int64_t s = 0; s < num_steps(k); ++s) {
    copy_weights(w + s * kStep, k, columns, k - s * kStep, tile);
    _tile_loadd(4, x + s * width * 64, 4 * width);
    _tile_loadd(6, tile, 64);
    _tile_dpbf16ps(0, 6, 4);
  }
  _tile_stored(0, out.tile[0], 4 * width);
  settle_memory();
}

// Columns [first, last) by the blocks of x [block, block_end).
void columns_by_blocks(const LinearJob& job, int64_t first, int64_t last, int64_t block,
                       int64_t block_end) {
  const int64_t k = job.k, width = block_width(job.rows), bytes = block_bytes(job.rows, k);
  const auto rows_of = [&](int64_t b) {
    return std::min<int64_t>(kTileRows, job.rows - b * kTileRows);
  };
  const auto y_of = [&](int64_t b, int64_t column) {
    return job.y + b * kTileRows * job.y_stride + column;
  };
  // The first group of rows brings the weights, a slice of the next panel with every pair of
  // blocks; for the groups after it they are in L2 or near it. A panel is 32 lines per step.
  const int64_t pairs = (block_end - block) / 2;
  const auto by_two = block > 0     ? panel_by_two<0>
                      : pairs >= 16 ? panel_by_two<2>
                      : pairs >= 8  ? panel_by_two<4>
                      : pairs >= 4  ? panel_by_two<8>
                      : pairs >= 2  ? panel_by_two<16>
                                    : panel_by_two<32>;
  Outputs out;
  int64_t column = first;
  for (; column + kPanel <= last; column += kPanel) {
    const bf16* w = static_cast<const bf16*>(job.weight) + column * k;
    const char* ahead = reinterpret_cast<const char*>(w + kPanel * k);
    int64_t b = block;
    for (; b + 2 <= block_end; b += 2) {
      const std::byte* x = job.packed_x + b * bytes;
      by_two(w, k, x, x + bytes, ahead, out);
      for (int i = 0; i < 4; ++i) {
        const int64_t at = b + i / 2;
        write_outputs(out.tile[i], width, kTileRows, rows_of(at),
                      y_of(at, column + i % 2 * kTileRows), job.y_stride);
      }
    }
    if (b < block_end) {
      for (int half = 0; half < 2; ++half) {
        tile_by_one(w + half * kTileRows * k, k, job.packed_x + b * bytes, width, out);
        write_outputs(out.tile[0], width, kTileRows, rows_of(b), y_of(b, column + half * kTileRows),
                      job.y_stride);
      }
    }
  }
  for (; column < last; column += kTileRows) {
    const int64_t columns = std::min<int64_t>(kTileRows, last - column);
    const bf16* w = static_cast<const bf16*>(job.weight) + column * k;
    for (int64_t b = block; b < block_end; ++b) {
      edge_by_one(w, k, columns, job.packed_x + b * bytes, width, out);
      write_outputs(out.tile[0], width, columns, rows_of(b), y_of(b, column), job.y_stride);
    }
  }
}

void compute_amx(const LinearJob& job, int64_t first, int64_t last) {
  const int64_t blocks = (job.rows + kTileRows - 1) / kTileRows;
  // An even number of blocks, so that only the last group ends on a single one.
  const int64_t group = std::max<int64_t>(2, kGroupBytes / block_bytes(job.rows, job.k) / 2 * 2);
  configure_tiles(block_width(job.rows));
  for (int64_t block = 0; block < blocks; block += group) {
    columns_by_blocks(job, first, last, block, std::min(block + group, blocks));
  }
  _tile_release();  // a thread without tile state is cheaper to switch
}

constexpr LinearKernel kAmx = {"amx_bf16",       kTileRows, kPanel,
                               packed_bytes_amx, pack_amx,  compute_amx};

}  // namespace

#pragma GCC pop_options

const LinearKernel& linear_kernel_amx() { return kAmx; }

}  // namespace kvarn::cpu
