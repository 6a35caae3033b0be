#include "kernels/kv_encode_cpu.h"

#include <cstring>

#include "kernels/kv_cpu.h"
#include "kernels/kv_kernels.h"

namespace kvarn::cpu {
namespace {

constexpr int kN = 128;  // tokens of a tile = head_dim
static_assert(kN == kBlockTokens && kN == kCodedHeadDim);

}  // namespace

void encode_tile(const TileRows& rows, const TileLayout& tile, std::byte* record, CpuIsa isa) {
  kv_kernels(isa).encode_tile(rows, tile, record);
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
  const auto num_tiles = static_cast<int64_t>(params.tiles.size());
  if (num_tiles == 0) return;
  CHECK(!params.layers.empty(), "kv_encode: at least one layer");
  const KvLayout& layout = params.layers[0].layout;
  const int kv_heads = params.layers[0].kv_heads;
  const auto num_layers = static_cast<int64_t>(params.layers.size());
  CHECK(layout.coded(), "kv_encode: the format has no coded pages");
  CHECK(params.k.empty() || num_layers == 1, "kv_encode: rows belong to one layer");
  pool.parallel_for(num_layers * num_tiles * kv_heads, 1, [&](int64_t begin, int64_t end, int) {
    for (int64_t item = begin; item < end; ++item) {
      const KvLayerView& layer = params.layers[static_cast<size_t>(item / (num_tiles * kv_heads))];
      const EncodeTile& tile = params.tiles[static_cast<size_t>(item / kv_heads % num_tiles)];
      const int64_t head = item % kv_heads;
      const auto page = [&](int64_t id) {
        CHECK(id >= 0 && id < layer.num_pages, "kv_encode: a page of this pool");
        return layer.data + (id * kv_heads + head) * layout.page_bytes;
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
      encode_tile(rows, layout.tile(), page(tile.target_page), isa);
    }
  });
}

}  // namespace kvarn::cpu
