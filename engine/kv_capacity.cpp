#include "engine/kv_capacity.h"

#include <algorithm>

namespace kvarn {

int64_t pages_after_prefill(const KvLayout& layout, int64_t tokens) {
  const int64_t full_blocks = tokens / kBlockTokens;
  const int tail = static_cast<int>(tokens % kBlockTokens);
  const int64_t exact_blocks =
      layout.coded() ? std::min<int64_t>(full_blocks, kSinkBlocks) : full_blocks;
  return exact_blocks * layout.pages_per_exact_block + (full_blocks - exact_blocks) +
         layout.exact_pages(tail);
}

int64_t pages_after_decode(const KvLayout& layout, int64_t tokens) {
  if (tokens <= 0) return 0;
  const int64_t last_block = (tokens - 1) / kBlockTokens;
  const int rows = static_cast<int>(tokens - last_block * kBlockTokens);
  return pages_after_prefill(layout, last_block * kBlockTokens) + layout.exact_pages(rows);
}

int64_t peak_pages(const KvLayout& layout, int64_t tokens) {
  if (tokens <= 0) return 0;
  // Pages grow within a block and drop when it is encoded, so the peak is at the end or at the last
  // moment when a block was full and exact.
  const int64_t last_border = (tokens - 1) / kBlockTokens * kBlockTokens;
  const int64_t held =
      std::max(pages_after_decode(layout, tokens), pages_after_decode(layout, last_border));
  return held + (layout.coded() ? 1 : 0);
}

int64_t longest_sequence(const KvLayout& layout, int64_t pages) {
  // peak_pages grows with the length: search the largest that fits. No page holds more than 128.
  int64_t low = 0, high = std::max<int64_t>(pages, 0) * kBlockTokens;
  while (low < high) {
    const int64_t middle = low + (high - low + 1) / 2;
    if (peak_pages(layout, middle) <= pages) {
      low = middle;
    } else {
      high = middle - 1;
    }
  }
  return low;
}

}  // namespace kvarn
