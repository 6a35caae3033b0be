// The KV cache in numbers: formats, the byte layout of a page, and the one rule that says which
// blocks a query reads coded. Everything that plans, writes, encodes or reads pages takes these
// from here. Seen by nvcc: plain constants and arithmetic only. Source: KVarN, arXiv 2606.03458
// (codec).
#pragma once

#include <cstddef>
#include <cstdint>

namespace kvarn {

constexpr int kBlockTokens = 128;  // positions in one block = tokens in one coded tile
constexpr int kSinkBlocks = 1;     // S: leading blocks that stay exact
constexpr int kWindowTokens =
    0;  // W: newest complete tiles kept exact, a multiple of 128 (docs/kvarn.md)
constexpr int kCodedHeadDim = 128;    // KVarN pages exist for this head_dim only
constexpr int kMaxPagesPerBlock = 5;  // an exact block of kvarn_k4v2: ceil(128 / 27)
static_assert(kWindowTokens % kBlockTokens == 0);

enum class KvFormat : uint8_t { kFp16, kKvarnK4V2, kKvarnK4V4 };

constexpr const char* kv_format_name(KvFormat format) {
  switch (format) {
    case KvFormat::kFp16:
      return "fp16";
    case KvFormat::kKvarnK4V2:
      return "kvarn_k4v2_g128";
    case KvFormat::kKvarnK4V4:
      return "kvarn_k4v4_g128";
  }
  return "?";
}

// Byte offsets of one coded tile: 128 tokens of one KV head of one layer. Scales are little-endian
// fp16.
//   k'[t][d] ~ (kq[d][t] * k_step[d] + k_zero[d]) * k_token[t]     v'[t][d] ~ (vq[t][d] * v_step[t]
//   + v_zero[t]) * v_channel[d]
struct TileLayout {
  int k_bits, v_bits;
  int k_codes;    // [d][t]: 128 rows of 128*k_bits/8 bytes; element i sits at bit (i % per)*bits of
                  // byte i/per
  int k_step;     // fp16[128], per channel
  int k_zero;     // fp16[128], per channel
  int k_token;    // fp16[128], per token
  int v_codes;    // [t][d]: 128 rows of 128*v_bits/8 bytes
  int v_channel;  // fp16[128], per channel
  int v_step;     // fp16[128], per token
  int v_zero;     // fp16[128], per token
  int bytes;
};

constexpr TileLayout make_tile_layout(int k_bits, int v_bits) {
  constexpr int kScale = kBlockTokens * 2;
  TileLayout t{};
  t.k_bits = k_bits;
  t.v_bits = v_bits;
  t.k_codes = 0;
  t.k_step = kCodedHeadDim * kBlockTokens * k_bits / 8;
  t.k_zero = t.k_step + kScale;
  t.k_token = t.k_zero + kScale;
  t.v_codes = t.k_token + kScale;
  t.v_channel = t.v_codes + kCodedHeadDim * kBlockTokens * v_bits / 8;
  t.v_step = t.v_channel + kScale;
  t.v_zero = t.v_step + kScale;
  t.bytes = t.v_zero + kScale;
  return t;
}
constexpr TileLayout kTileK4V2 = make_tile_layout(4, 2);
constexpr TileLayout kTileK4V4 = make_tile_layout(4, 4);
static_assert(kTileK4V2.bytes == 13824 && kTileK4V4.bytes == 17920);

// What one page of a format is, per (layer, KV head). A page holds one coded tile or a run of exact
// rows: first `exact_rows` rows of K, then as many rows of V, head_dim fp16 each. The n-th exact
// page of a block holds its positions [n*exact_rows, (n+1)*exact_rows).
struct KvLayout {
  KvFormat format;
  int head_dim;
  int page_bytes;
  int exact_rows;             // exact tokens per page: 32, 27, 35
  int pages_per_exact_block;  // 4, 5, 4

  bool coded() const { return format != KvFormat::kFp16; }
  const TileLayout& tile() const { return format == KvFormat::kKvarnK4V4 ? kTileK4V4 : kTileK4V2; }
  size_t k_row_offset(int row) const { return size_t{2} * head_dim * row; }
  size_t v_row_offset(int row) const { return size_t{2} * head_dim * (exact_rows + row); }
  int exact_pages(int tokens) const {
    return (tokens + exact_rows - 1) / exact_rows;
  }  // of one block

  bool operator==(const KvLayout&) const = default;
};

// Requires head_dim == kCodedHeadDim for the KVarN formats (callers check and refuse first).
constexpr KvLayout make_kv_layout(KvFormat format, int head_dim) {
  const int row_pair_bytes = 4 * head_dim;  // fp16 K and V of one token
  KvLayout l{};
  l.format = format;
  l.head_dim = head_dim;
  l.page_bytes = format == KvFormat::kFp16        ? 32 * row_pair_bytes
                 : format == KvFormat::kKvarnK4V2 ? kTileK4V2.bytes
                                                  : kTileK4V4.bytes;
  l.exact_rows = l.page_bytes / row_pair_bytes;
  l.pages_per_exact_block = (kBlockTokens + l.exact_rows - 1) / l.exact_rows;
  return l;
}
static_assert(make_kv_layout(KvFormat::kKvarnK4V2, 128).exact_rows == 27);
static_assert(make_kv_layout(KvFormat::kKvarnK4V2, 128).pages_per_exact_block == kMaxPagesPerBlock);
static_assert(make_kv_layout(KvFormat::kKvarnK4V4, 128).exact_rows == 35);
static_assert(make_kv_layout(KvFormat::kFp16, 128).page_bytes == 16384);

// The reading rule. kPosition is the engine's: a function of positions alone, so that chunking,
// batching, prefix hits and preemption cannot change a result. kChunkStart is the variant that
// `kvarn eval` measures beside it (a prompt chunk reads its own earlier tiles exact, as the
// original implementation does); results then depend on the chunking.
enum class ReadingRule : uint8_t { kPosition, kChunkStart };

// Whether the query at `position` (its row belongs to a chunk that starts at `chunk_start`; a
// decode row is its own chunk) reads `block` (positions 128*block ... +127) coded. Only meaningful
// for coded formats.
constexpr bool reads_coded(int64_t block, int64_t position, int64_t chunk_start,
                           ReadingRule rule = ReadingRule::kPosition) {
  const int64_t seen_from = rule == ReadingRule::kPosition ? position : chunk_start;
  return block >= kSinkBlocks && kBlockTokens * (block + 1) + kWindowTokens <= seen_from;
}

}  // namespace kvarn
