#include "kernels/kv_encode_cpu.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

#include "kernels/kv_cpu.h"

namespace kvarn::cpu {
namespace {

constexpr int kN = 128;  // tokens of a tile = head_dim
static_assert(kN == kBlockTokens && kN == kCodedHeadDim);
constexpr int kPasses = 8;
constexpr float kStdMin = 1e-3f, kStdMax = 1e3f, kLogMin = -0.3f, kLogMax = 10.0f;
constexpr float kMargin = 1.0f - 1e-4f;

float deviation(const float* x, int stride, const float* scale_other, float scale_own) {
  float sum = 0;
  for (int i = 0; i < kN; ++i) sum += x[i * stride] / scale_own / scale_other[i];
  const float mean = sum / kN;
  float sq = 0;
  for (int i = 0; i < kN; ++i) {
    const float d = x[i * stride] / scale_own / scale_other[i] - mean;
    sq += d * d;
  }
  return std::sqrt(sq / (kN - 1));
}

void deviations(const float* x, bool columns, const float* col, const float* row, float* out) {
  for (int i = 0; i < kN; ++i)
    out[i] = columns ? deviation(x + i, kN, row, col[i]) : deviation(x + i * kN, 1, col, row[i]);
}

float ratio(const float* deviation) {
  return *std::max_element(deviation, deviation + kN) /
         std::max(*std::min_element(deviation, deviation + kN), 1e-8f);
}

struct Normalised {
  float x[kN * kN];  // rows carry the rounding step
  float col[kN], row[kN];
};

void normalise(Normalised& n) {
  float log_col[kN] = {}, log_row[kN] = {}, col[kN], row[kN], dev[kN];
  std::fill_n(col, kN, 1.0f);
  std::fill_n(row, kN, 1.0f);
  std::copy_n(col, kN, n.col);
  std::copy_n(row, kN, n.row);
  const auto imbalance = [&] {
    deviations(n.x, true, col, row, dev);
    const float columns = ratio(dev);
    deviations(n.x, false, col, row, dev);
    return columns + ratio(dev);
  };
  const auto update = [&](bool columns, float* log_scale, float* scale) {
    deviations(n.x, columns, col, row, dev);
    for (int i = 0; i < kN; ++i) {
      log_scale[i] = std::clamp(log_scale[i] + std::log(std::clamp(dev[i], kStdMin, kStdMax)),
                                kLogMin, kLogMax);
      scale[i] = std::exp(log_scale[i]);
    }
  };
  float best = imbalance();
  for (int pass = 0; pass < kPasses; ++pass) {
    update(true, log_col, col);
    update(false, log_row, row);
    const float now = imbalance();
    if (now < best * kMargin) {
      best = now;
      std::copy_n(col, kN, n.col);
      std::copy_n(row, kN, n.row);
    }
  }
  for (int r = 0; r < kN; ++r)
    for (int c = 0; c < kN; ++c) n.x[r * kN + c] = n.x[r * kN + c] / n.col[c] / n.row[r];
}

void put_half(std::byte* at, int i, float value) {
  const half h = to_half(value);
  std::memcpy(at + 2 * i, &h, 2);
}

// Codes, steps and zeros of the rows of n.x; the scale of a row is absorbed into step and zero.
void round_rows(const Normalised& n, int bits, std::byte* codes, std::byte* step_out,
                std::byte* zero_out, std::byte* column_out) {
  const int per = 8 / bits;
  const float top = static_cast<float>((1 << bits) - 1);
  for (int r = 0; r < kN; ++r) {
    const float* x = n.x + r * kN;
    const float lo = *std::min_element(x, x + kN), hi = *std::max_element(x, x + kN);
    const float step = std::max((hi - lo) / top, 1e-10f);
    for (int i = 0; i < kN; i += per) {
      unsigned byte = 0;
      for (int j = 0; j < per; ++j) {
        const float q = std::clamp(std::nearbyint((x[i + j] - lo) / step), 0.0f, top);
        byte |= static_cast<unsigned>(q) << (j * bits);
      }
      *codes++ = static_cast<std::byte>(byte);
    }
    put_half(step_out, r, n.row[r] * step);
    put_half(zero_out, r, n.row[r] * lo);
    put_half(column_out, r, n.col[r]);
  }
}

}  // namespace

void encode_tile(const TileRows& rows, const TileLayout& tile, std::byte* record) {
  thread_local Normalised n;
  for (int t = 0; t < kN; ++t)
    for (int d = 0; d < kN; ++d) n.x[d * kN + t] = to_float(rows.k[t][d]);
  normalise(n);
  round_rows(n, tile.k_bits, record + tile.k_codes, record + tile.k_step, record + tile.k_zero,
             record + tile.k_token);
  for (int t = 0; t < kN; ++t)
    for (int d = 0; d < kN; ++d) n.x[t * kN + d] = to_float(rows.v[t][d]);
  normalise(n);
  round_rows(n, tile.v_bits, record + tile.v_codes, record + tile.v_step, record + tile.v_zero,
             record + tile.v_channel);
}

void decode_tile(const std::byte* record, const TileLayout& tile, float* k, float* v) {
  const auto scale = [&](int offset, int i) {
    half h;
    std::memcpy(&h, record + offset + 2 * i, 2);
    return to_float(h);
  };
  const auto code = [&](int offset, int bits, int row, int i) {
    const int per = 8 / bits;
    const auto byte = static_cast<unsigned>(record[offset + row * (kN / per) + i / per]);
    return static_cast<float>((byte >> (i % per * bits)) & ((1u << bits) - 1));
  };
  for (int t = 0; t < kN; ++t) {
    for (int d = 0; d < kN; ++d) {
      k[t * kN + d] =
          (code(tile.k_codes, tile.k_bits, d, t) * scale(tile.k_step, d) + scale(tile.k_zero, d)) *
          scale(tile.k_token, t);
      v[t * kN + d] =
          (code(tile.v_codes, tile.v_bits, t, d) * scale(tile.v_step, t) + scale(tile.v_zero, t)) *
          scale(tile.v_channel, d);
    }
  }
}

void kv_encode(const KvEncodeParams& params, ThreadPool& pool, CpuIsa isa) {
  (void)isa;
  const KvLayout& layout = params.layer.layout;
  const int kv_heads = params.layer.kv_heads;
  const auto num_tiles = static_cast<int64_t>(params.tiles.size());
  if (num_tiles == 0) return;
  CHECK(layout.coded(), "kv_encode: the format has no coded pages");
  pool.parallel_for(num_tiles * kv_heads, 1, [&](int64_t begin, int64_t end, int) {
    for (int64_t item = begin; item < end; ++item) {
      const EncodeTile& tile = params.tiles[static_cast<size_t>(item / kv_heads)];
      const int64_t head = item % kv_heads;
      const auto page = [&](int64_t id) {
        CHECK(id >= 0 && id < params.layer.num_pages, "kv_encode: a page of this pool");
        return params.layer.data + (id * kv_heads + head) * layout.page_bytes;
      };
      TileRows rows;
      for (int t = 0; t < kBlockTokens; ++t) {
        if (tile.first_row >= 0) {
          const int64_t at = ((tile.first_row + t) * kv_heads + head) * layout.head_dim;
          rows.k[t] = params.k.data<half>() + at;
          rows.v[t] = params.v.data<half>() + at;
        } else {
          const int row = t % layout.exact_rows;
          const std::byte* from =
              page(tile.source_pages[static_cast<size_t>(t / layout.exact_rows)]);
          rows.k[t] = reinterpret_cast<const half*>(from + layout.k_row_offset(row));
          rows.v[t] = reinterpret_cast<const half*>(from + layout.v_row_offset(row));
        }
      }
      encode_tile(rows, layout.tile(), page(tile.target_page));
    }
  });
}

}  // namespace kvarn::cpu
