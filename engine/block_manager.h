// Ids of pages and blocks, ref counts and the free list; no bytes. A block of the KV cache is exact
// (one page per 27 or so rows, taken as it fills) or coded (one page). Full blocks are cached when
// their step is published and immutable from then on, so a prefix is shared without copy-on-write.
//
// Invariants: every page is free, or of exactly one block; a block with no users is cached, else it
// does not exist; free + cached + in use == total.
//
// The reserve: one page per running sequence is kept for the record of a block that is being
// encoded. Encodes run first in a step, so their source pages can be written by the same step's
// rows, but can never be the target of another encode of that step.
//
// Engine thread only.
#pragma once

#include <cstdint>
#include <optional>
#include <span>
#include <string_view>
#include <vector>

#include "engine/block.h"
#include "engine/prefix_cache.h"
#include "kernels/backend.h"

namespace kvarn {

// Pages and tokens by use and by kind; shared blocks count once.
struct BlockStats {
  int64_t pages_total = 0, pages_free = 0, pages_cached = 0, pages_in_use = 0;
  int64_t coded_pages = 0, sink_pages = 0, tail_pages = 0, dense_pages = 0;
  int64_t live_tokens = 0, cached_tokens = 0;
};

class BlockManager {
 public:
  BlockManager(const KvLayout& layout, int64_t num_pages, bool enable_cache,
               PrefixCache::HashFunction hash = &hash_block);

  const KvLayout& layout() const { return layout_; }
  const Block& block(BlockId id) const { return blocks_[static_cast<size_t>(id)]; }
  bool cache_enabled() const { return enable_cache_; }

  // Free pages and those that eviction would free.
  int64_t available_pages() const { return stats_.pages_free + stats_.pages_cached; }
  // Those of them that an encode of this step may write to.
  int64_t encode_targets() const {
    return available_pages() - static_cast<int64_t>(free_after_encode_.size());
  }
  int64_t reserve() const { return reserve_; }
  void set_reserve(int64_t pages) { reserve_ = pages; }

  // A new step is planned: sources of the last step's encodes are ordinary free pages now.
  void begin_step();

  // A block of `num_tokens` rows with one user. kNoBlock where its pages would touch the reserve.
  BlockId try_new_block(int32_t index, int32_t num_tokens);
  // Makes room for `num_tokens` rows in an exact, unshared block; false as above.
  bool try_grow(BlockId id, int32_t num_tokens);
  // Turns a full exact block into a coded one (target from the reserve) and frees its exact pages
  // for the rows of this step. Empty where no target is left.
  std::optional<EncodeTile> try_encode(BlockId id);

  // Longest cached prefix of `tokens`, at most `max_blocks` blocks. Takes no reference.
  std::vector<BlockId> find_prefix(std::span<const int32_t> tokens, int64_t max_blocks,
                                   std::string_view salt) const;
  void acquire(BlockId id);
  // Acquires an unused cached block with all its parents (so that eviction order stays "children
  // first"); returns them, for release().
  std::vector<BlockId> acquire_chain(BlockId id);
  // The last user of a cached block leaves it to the cache, of another one frees it. Blocks given
  // up together count as used at the same time.
  void release(std::span<const BlockId> ids);
  void release(BlockId id) { release(std::span(&id, 1)); }
  // Caches a full block behind `parent`. If an equal one is cached, that copy stays: the caller's
  // reference moves to it. Returns the block that the caller now holds.
  BlockId publish(BlockId id, BlockId parent, std::span<const int32_t> ids, std::string_view salt);
  // The contents are not to be trusted: nobody new gets the block; its users give it up.
  void forget(BlockId id);
  // Unused cached blocks that are still exact although every reader would want them coded.
  std::vector<BlockId> take_blocks_to_encode();

  const BlockStats& stats() const { return stats_; }
  // Counts everything anew. Returns pages that belong to nobody: neither free nor in a block that
  // is cached or, unless `idle`, used. CHECKs that the running counts are right.
  int64_t audit(bool idle) const;

 private:
  Block& at(BlockId id) { return blocks_[static_cast<size_t>(id)]; }
  bool can_take(int64_t pages) const { return available_pages() - pages >= reserve_; }
  PageId take_page(bool for_encode);
  void free_page(PageId page) { free_.push_back(page); }
  void evict_one();
  void destroy(BlockId id);
  bool wants_encode(const Block& b) const;
  // Adds a block to the counts (sign 1) or takes it out (-1), around each change of it.
  void count(const Block& b, int sign, BlockStats& stats) const;

  KvLayout layout_;
  bool enable_cache_;
  PrefixCache cache_;
  std::vector<PageId> free_, free_after_encode_;
  std::vector<Block> blocks_;
  std::vector<BlockId> free_ids_, to_encode_;
  int64_t reserve_ = 0;
  uint64_t clock_ = 0;  // of releases
  BlockStats stats_;
};

}  // namespace kvarn
