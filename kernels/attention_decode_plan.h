// Decode attention as lists of pages: a (sequence, KV head) reads its list in order, and the lists
// of a step are divided over a fixed number of thread blocks, so that a recorded launch serves any
// batch. All pages cost the same bytes, so work is counted in pages. Host and device use the same
// arithmetic. Seen by nvcc.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>

#include "kernels/kv_layout.h"
#include "kernels/step_input.h"

namespace kvarn::cuda {

// What the row at `position` reads of its own sequence: whole exact blocks (the sink), coded
// blocks, exact blocks up to its own row. An item of a list is one page.
struct DecodeList {
  int32_t position;
  int32_t sink_blocks;   // exact and complete; 0 when the row's own block is one of them
  int32_t coded_blocks;  // these follow
  int32_t sink_items;
  int32_t items;  // in all

  struct Item {
    int32_t block;  // of the sequence
    int32_t page;   // within the block
    int32_t rows;   // exact rows in use; 0: a coded tile
  };
  constexpr Item item(int32_t i, int32_t pages_per_block, int32_t exact_rows) const {
    if (i >= sink_items && i < sink_items + coded_blocks) {
      return {sink_blocks + i - sink_items, 0, 0};
    }
    const int32_t exact = i < sink_items ? i : i - coded_blocks;  // as if nothing lay between
    const int32_t block = exact / pages_per_block;
    const int32_t page = exact - block * pages_per_block;
    const bool own = i == items - 1;  // only the last page is not full, or the last of a block
    const int32_t end = own ? position % kBlockTokens + 1 : kBlockTokens;
    const int32_t left = end - page * exact_rows;
    return {i < sink_items ? block : block + coded_blocks, page,
            left < exact_rows ? left : exact_rows};
  }
};

constexpr DecodeList decode_list(bool coded, int32_t pages_per_block, int32_t exact_rows,
                                 int32_t position) {
  const int32_t own = position / kBlockTokens;
  DecodeList list{position, 0, 0, 0, 0};
  if (coded && own >= kSinkBlocks) {
    list.sink_blocks = kSinkBlocks;
    // reads_coded(): block + 1 <= (position - window) / 128.
    const int32_t complete =
        position < kWindowTokens ? 0 : (position - kWindowTokens) / kBlockTokens;
    list.coded_blocks = complete > kSinkBlocks ? complete - kSinkBlocks : 0;
    list.sink_items = kSinkBlocks * pages_per_block;
  }
  const int32_t whole_blocks = own - list.sink_blocks - list.coded_blocks;
  list.items = list.sink_items + list.coded_blocks + whole_blocks * pages_per_block +
               (position % kBlockTokens + exact_rows) / exact_rows;
  return list;
}

// A run of items of one list, the work of one thread block or part of it.
struct DecodeSegment {
  int32_t row;            // of q and out
  int32_t position;       // of that row
  int32_t first_block;    // the sequence's block 0 in block_pages
  int32_t head;           // KV head
  int32_t begin, end;     // items
  int32_t parts;          // segments that the list is cut into; 1: the result is final
  int32_t partial;        // where this part's result goes when parts > 1
  int32_t first_partial;  // of the list; parts lie one after the other
  int32_t unused[3];
};
static_assert(sizeof(DecodeSegment) == 48);  // three 16-byte loads

// One thread block's work: its first segment, and where the others lie.
struct DecodeShare {
  DecodeSegment first;
  int32_t segments;  // in all; 0: nothing to do
  int32_t items;     // of all its segments
  int32_t rest;      // index of the second among the plan's further segments
  int32_t unused;
};
static_assert(sizeof(DecodeShare) == 64);

// A plan is DecodeShare[grid], then DecodeSegment[]. A list that is cut has at most `grid` parts;
// all of them together are at most max_decode_partials(grid).
constexpr int max_decode_partials(int grid) { return 2 * grid; }
size_t max_decode_plan_bytes(int grid, int max_sequences, int kv_heads);
// Returns the bytes used. Sequences of 0 rows get no work.
size_t plan_decode(const KvLayout& layout, int kv_heads, int grid,
                   std::span<const AttentionSequence> decodes, std::byte* plan);

}  // namespace kvarn::cuda
