// Inside PrefillAttention: what the host plans, and the three launches that share it. A step's
// chunks are cut into query tiles of one block (128 positions); the context of a query tile is
// walked in key tiles of one block. Key tiles come from two places, by the reading rule
// (kv_layout.h): from scratch, where launch_expand() has put every block that some query of the
// chunk reads from pages, as plain fp16 rows; or from this step's own rows, exact.
//
// Invariant: scratch and k_rows/v_rows have the same layout, [row][kv_head][128] fp16, so a key
// tile is a pointer to its first row and nothing else.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "kernels/backend.h"

namespace kvarn::cuda::prefill {

constexpr int kTile = kBlockTokens;  // rows of a query tile and of a key tile
constexpr int kHeadDim = kCodedHeadDim;

// Up to 128 queries of one chunk, all in one block. `position` of the first is a multiple of 128,
// except for a chunk of one row ("late" below): its block's earlier rows are in exact pages, so
// the whole block, own row included, is put into scratch.
struct QueryTile {
  int32_t first_row;     // of the step
  int32_t rows;          // 1..128
  int32_t position;      // of first_row
  int32_t chunk_block;   // block in which the chunk begins
  int32_t scratch_tile;  // of the sequence's block 0
};

// A block to be put into scratch.
struct ExpandTile {
  int32_t table_entry;  // in block_pages
  int32_t scratch_tile;
  int32_t exact_rows;  // rows in exact pages, -1: a coded block
  int32_t own_row;     // row of the step that follows them, -1: none
  int32_t in_chunk;    // 1: a block of the chunk itself, not needed when `chunk_exact`
};

// Everything the kernels see, by value. Device pointers; f16 but for `out` (bf16).
struct Arguments {
  const void *q, *k_rows, *v_rows;
  void *k_scratch, *v_scratch;
  void* out;
  int64_t rows;          // of the step
  int64_t scratch_rows;  // 128 per scratch tile
  int q_heads, kv_heads;
  float scale;
  bool rotate;       // the layout is coded: undo the Hadamard transform
  bool chunk_exact;  // the chunk's own blocks are read from k_rows/v_rows: kChunkStart, or fp16
  KvLayout layout;
  const std::byte* pages;
  const BlockPages* block_pages;
  const QueryTile* query_tiles;    // longest context first
  const ExpandTile* expand_tiles;  // of the same sequences
  int num_query_tiles, num_expand_tiles;
};

// Decodes or copies the blocks of expand_tiles into scratch (attention_prefill_expand.cu).
void launch_expand(cudaStream_t stream, const Arguments& arguments);
// Attention of the query tiles. The portable kernel runs from compute capability 8.0 on
// (attention_prefill_mma.cu); the other one needs code for sm_90a (attention_prefill_wgmma.cu).
void launch_mma(cudaStream_t stream, const Arguments& arguments);
// `counter`: an int of device memory that is 0 before and after. It starts under the end of
// launch_expand() where there is anything to expand.
void launch_wgmma(cudaStream_t stream, const Arguments& arguments, int* counter,
                  int num_multiprocessors);
// Whether this build has wgmma code for the current device. Synchronises: start-up only.
bool wgmma_available();

}  // namespace kvarn::cuda::prefill
