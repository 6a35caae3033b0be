// The register-blocked loops of linear(), written once over a vector trait V. Include it after the
// `#pragma GCC target` of an ISA: everything here is a template or local to the file.
//
// V gives one accumulator register per output element. k advances in steps of V::kStep weights; a
// step is V::kPhases multiply-adds into the accumulator, always in the same order. A packed row of
// x is one V::XReg per phase, so load_x and load_w meet the same elements. Last, reduce4() folds
// the lanes of four accumulators by one tree: i and i+8, i+4, i+2, i+1.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "kernels/linear_cpu.h"

namespace kvarn::cpu {
namespace {

#define KVARN_UNROLL _Pragma("GCC unroll 16")
#define KVARN_ALWAYS inline __attribute__((always_inline))

template <class V>
constexpr int64_t packed_row(int64_t k) {  // elements of one packed row of x
  return (k + V::kStep - 1) / V::kStep * V::kStep;
}

template <class V>
size_t packed_bytes_vector(int64_t rows, int64_t k) {
  return static_cast<size_t>(rows * packed_row<V>(k)) * sizeof(typename V::X);
}

template <class V>
void pack_vector(const float* x, int64_t rows, int64_t k, int64_t first, int64_t last,
                 std::byte* packed) {
  (void)rows;  // a block is one row
  using X = typename V::X;
  const int64_t full = k / V::kStep * V::kStep;
  for (int64_t row = first; row < last; ++row) {
    const float* from = x + row * k;
    X* to = reinterpret_cast<X*>(packed) + row * packed_row<V>(k);
    for (int64_t i = 0; i < full; i += V::kStep) V::pack_step(from + i, to + i);
    if (full < k) {
      float tail[V::kStep] = {};
      std::memcpy(tail, from + full, static_cast<size_t>(k - full) * sizeof(float));
      V::pack_step(tail, to + full);
    }
  }
}

template <class V, int T, int R>
KVARN_ALWAYS void step(typename V::Acc (&acc)[R][T], const typename V::X* x, int64_t x_stride,
                       const typename V::W* w, int64_t w_stride) {
  KVARN_UNROLL
  for (int phase = 0; phase < V::kPhases; ++phase) {
    typename V::XReg xs[T];
    KVARN_UNROLL
    for (int t = 0; t < T; ++t) xs[t] = V::load_x(x + t * x_stride, phase);
    KVARN_UNROLL
    for (int r = 0; r < R; ++r) {
      const typename V::XReg wr = V::load_w(w + r * w_stride, phase);
      KVARN_UNROLL
      for (int t = 0; t < T; ++t) acc[r][t] = V::multiply_add(wr, xs[t], acc[r][t]);
    }
  }
}

// Bytes ahead in each row of W that the GEMV asks for: far enough for memory, near enough to stay
// within the page that the hardware is prefetching.
constexpr int64_t kPrefetchBytes = 512;

// T rows of x times R rows of W. kPrefetch: weights come from memory, so ask for each row's bytes
// ahead of time, at its end for those of the row that takes its place in the next block.
template <class V, int T, int R, bool kPrefetch>
KVARN_ALWAYS void block(const typename V::X* x, int64_t k, const typename V::W* w, float* y,
                        int64_t y_stride) {
  using W = typename V::W;
  const int64_t x_stride = packed_row<V>(k);
  const int64_t full = k / V::kStep * V::kStep;
  typename V::Acc acc[R][T];
  KVARN_UNROLL
  for (int r = 0; r < R; ++r) {
    KVARN_UNROLL
    for (int t = 0; t < T; ++t) acc[r][t] = V::zero();
  }
  const int64_t row_bytes = k * static_cast<int64_t>(sizeof(W));
  int64_t i = 0;
  for (; i < full; i += V::kStep) {
    if constexpr (kPrefetch) {
      int64_t ahead = i * static_cast<int64_t>(sizeof(W)) + kPrefetchBytes;
      if (ahead >= row_bytes) ahead += (R - 1) * row_bytes;
      const char* line = reinterpret_cast<const char*>(w) + ahead;
      KVARN_UNROLL
      for (int r = 0; r < R; ++r, line += row_bytes) _mm_prefetch(line, _MM_HINT_T0);
    }
    step<V, T, R>(acc, x + i, x_stride, w + i, k);
  }
  if (i < k) {
    W tail[R][V::kStep] = {};
    for (int r = 0; r < R; ++r) {
      std::memcpy(tail[r], w + r * k + i, static_cast<size_t>(k - i) * sizeof(W));
    }
    step<V, T, R>(acc, x + i, x_stride, &tail[0][0], V::kStep);
  }
  KVARN_UNROLL
  for (int t = 0; t < T; ++t) {
    float* out = y + t * y_stride;
    if constexpr (R % 4 == 0) {
      KVARN_UNROLL
      for (int r = 0; r < R; r += 4) {
        _mm_storeu_ps(out + r, V::reduce4(acc[r][t], acc[r + 1][t], acc[r + 2][t], acc[r + 3][t]));
      }
    } else {
      KVARN_UNROLL
      for (int r = 0; r < R; ++r) {
        out[r] = _mm_cvtss_f32(V::reduce4(acc[r][t], acc[r][t], acc[r][t], acc[r][t]));
      }
    }
  }
}

// block() for a number of rows known at run time, 1 .. kRows.
template <class V, int kRows, int R, bool kPrefetch>
KVARN_ALWAYS void block_of(int64_t rows, const typename V::X* x, int64_t k, const typename V::W* w,
                           float* y, int64_t y_stride) {
  if constexpr (kRows > 1) {
    if (rows < kRows) return block_of<V, kRows - 1, R, kPrefetch>(rows, x, k, w, y, y_stride);
  }
  block<V, kRows, R, kPrefetch>(x, k, w, y, y_stride);
}

template <class V>
void compute_vector(const LinearJob& job, int64_t first, int64_t last) {
  using W = typename V::W;
  using X = typename V::X;
  const X* x = reinterpret_cast<const X*>(job.packed_x);
  const W* weight = static_cast<const W*>(job.weight);
  const int64_t k = job.k;
  if (job.rows == 1) {
    int64_t column = first;
    for (; column + 8 <= last; column += 8) {
      block<V, 1, 8, true>(x, k, weight + column * k, job.y + column, job.y_stride);
    }
    for (; column < last; ++column) {
      block<V, 1, 1, false>(x, k, weight + column * k, job.y + column, job.y_stride);
    }
    return;
  }
  // Columns in groups whose weights stay in L2, and few rows of x in L1 while the columns pass by.
  // With few rows in all the weights are the stream: each panel stays in L1 until all rows had it.
  constexpr int64_t kGroupBytes = 1 << 18, kFewRows = 16;
  const int64_t column_bytes = k * static_cast<int64_t>(sizeof(W));
  const int64_t fitting = kGroupBytes / column_bytes / V::kColumns * V::kColumns;
  const int64_t group =
      job.rows <= kFewRows ? V::kColumns : std::max<int64_t>(V::kColumns, fitting);
  for (int64_t column = first; column < last; column += group) {
    const int64_t end = std::min(column + group, last);
    for (int64_t row = 0; row < job.rows;) {
      const int64_t left = job.rows - row;
      const int64_t rows = left >= 2 * V::kRows ? V::kRows
                           : left > V::kRows    ? (left + 1) / 2
                                                : left;
      const X* x_rows = x + row * packed_row<V>(k);
      float* y = job.y + row * job.y_stride;
      const bool from_memory = row == 0;
      int64_t c = column;
      for (; c + V::kColumns <= end; c += V::kColumns) {
        if (from_memory) {
          block_of<V, V::kRows, V::kColumns, true>(rows, x_rows, k, weight + c * k, y + c,
                                                   job.y_stride);
        } else {
          block_of<V, V::kRows, V::kColumns, false>(rows, x_rows, k, weight + c * k, y + c,
                                                    job.y_stride);
        }
      }
      for (; c < end; ++c) {
        block_of<V, V::kRows, 1, false>(rows, x_rows, k, weight + c * k, y + c, job.y_stride);
      }
      row += rows;
    }
  }
}

template <class V>
constexpr LinearKernel make_kernel(const char* name) {
  return {name, 1, 8, packed_bytes_vector<V>, pack_vector<V>, compute_vector<V>};
}

}  // namespace
}  // namespace kvarn::cpu
