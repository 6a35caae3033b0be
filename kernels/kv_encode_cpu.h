// The KVarN codec of one tile: 128 tokens of one KV head. A record is a pure function of the tile's
// fp16 rows, so a coded block can be shared by every sequence with the same prefix.
// Source: arXiv 2606.03458; the normaliser runs 8 passes and replaces its best scales only for a
// gain above 1e-4 (docs/kvarn.md), which makes records independent of rounding noise.
#pragma once

#include <cstddef>

#include "kernels/backend.h"
#include "kernels/core/dtype.h"
#include "kernels/kv_layout.h"

namespace kvarn::cpu {

// The fp16 rows of one tile in the rotated frame, token t at k[t] and v[t], head_dim values each.
struct TileRows {
  const half* k[kBlockTokens];
  const half* v[kBlockTokens];
};

// Writes tile.bytes bytes to `record`: the same bytes on every instruction set. Thread-safe.
void encode_tile(const TileRows& rows, const TileLayout& tile, std::byte* record,
                 CpuIsa isa = best_cpu_isa());

// The inverse up to rounding: k, v [128 tokens][128 channels] f32, rotated frame. Plain loops: used
// to inspect and to test, never to attend.
void decode_tile(const std::byte* record, const TileLayout& tile, float* k, float* v);

}  // namespace kvarn::cpu
