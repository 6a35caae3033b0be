// The unit of the block table: 128 positions of one sequence and the pages they stand on.
#pragma once

#include <array>
#include <cstdint>

#include "kernels/kv_layout.h"

namespace kvarn {

using PageId = int32_t;
using BlockId = int32_t;
constexpr BlockId kNoBlock = -1;
constexpr PageId kNoPage = -1;

struct Block {
  std::array<PageId, kMaxPagesPerBlock> pages{};  // the first num_pages; the rest kNoPage
  int32_t num_pages = 0;                          // 0: this id is not in use
  int32_t index = 0;       // of the block in its sequence: positions 128*index...
  int32_t num_tokens = 0;  // rows stored or planned
  int32_t ref_count = 0;   // sequences, and the step that encodes it
  bool coded = false;      // one page holds the coded tile
  bool cached = false;     // the prefix cache knows it: immutable
};

}  // namespace kvarn
