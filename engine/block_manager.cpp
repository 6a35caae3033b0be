#include "engine/block_manager.h"

#include <algorithm>
#include <utility>

#include "engine/kv_capacity.h"
#include "kernels/core/check.h"

namespace kvarn {

BlockManager::BlockManager(const KvLayout& layout, int64_t num_pages, bool enable_cache,
                           PrefixCache::HashFunction hash)
    : layout_(layout), enable_cache_(enable_cache), cache_(layout.format, hash) {
  free_.reserve(static_cast<size_t>(num_pages));
  for (int64_t page = num_pages - 1; page >= 0; --page) {
    free_.push_back(static_cast<PageId>(page));  // the lowest is taken first
  }
  stats_.pages_total = stats_.pages_free = num_pages;
}

void BlockManager::begin_step() {
  free_.insert(free_.end(), free_after_encode_.begin(), free_after_encode_.end());
  free_after_encode_.clear();
}

BlockId BlockManager::try_new_block(int32_t index, int32_t num_tokens) {
  const int pages = pages_of_block(layout_, index, num_tokens);
  if (!can_take(pages)) return kNoBlock;
  Block b;
  b.pages.fill(kNoPage);
  b.index = index;
  b.num_tokens = num_tokens;
  b.ref_count = 1;
  b.coded = is_coded_block(layout_, index, num_tokens);
  for (; b.num_pages < pages; ++b.num_pages) {
    b.pages[static_cast<size_t>(b.num_pages)] = take_page(/*for_encode=*/false);
  }
  count(b, 1, stats_);
  if (free_ids_.empty()) {
    blocks_.push_back(b);
    return static_cast<BlockId>(blocks_.size() - 1);
  }
  const BlockId id = free_ids_.back();
  free_ids_.pop_back();
  at(id) = b;
  return id;
}

bool BlockManager::try_grow(BlockId id, int32_t num_tokens) {
  const int pages = layout_.exact_pages(num_tokens);
  const int more = pages - at(id).num_pages;
  CHECK(!at(id).cached && !at(id).coded && at(id).ref_count == 1, "only a private tail grows");
  if (more > 0 && !can_take(more)) return false;
  Block b = at(id);
  for (; b.num_pages < pages; ++b.num_pages) {
    b.pages[static_cast<size_t>(b.num_pages)] = take_page(/*for_encode=*/false);
  }
  count(at(id), -1, stats_);
  b.num_tokens = num_tokens;
  at(id) = b;
  count(b, 1, stats_);
  return true;
}

std::optional<EncodeTile> BlockManager::try_encode(BlockId id) {
  CHECK(at(id).ref_count > 0, "a block that is being encoded is held");
  CHECK(is_coded_block(layout_, at(id).index, at(id).num_tokens) && !at(id).coded,
        "a full exact block is encoded once");
  if (encode_targets() < 1) return std::nullopt;
  const PageId target = take_page(/*for_encode=*/true);
  Block& b = at(id);
  const EncodeTile tile{.first_row = -1, .source_pages = b.pages, .target_page = target};
  count(b, -1, stats_);
  for (int i = 0; i < b.num_pages; ++i) {
    free_after_encode_.push_back(b.pages[static_cast<size_t>(i)]);
    ++stats_.pages_free;
  }
  b.pages.fill(kNoPage);
  b.pages[0] = target;
  b.num_pages = 1;
  b.coded = true;
  count(b, 1, stats_);
  return tile;
}

std::vector<BlockId> BlockManager::find_prefix(std::span<const int32_t> tokens, int64_t max_blocks,
                                               std::string_view salt) const {
  std::vector<BlockId> found;
  if (!enable_cache_) return found;
  BlockId parent = kNoBlock;
  for (int64_t i = 0; i < max_blocks; ++i) {
    parent = cache_.find(parent,
                         tokens.subspan(static_cast<size_t>(i * kBlockTokens), kBlockTokens), salt);
    if (parent == kNoBlock) break;
    found.push_back(parent);
  }
  return found;
}

void BlockManager::acquire(BlockId id) {
  Block& b = at(id);
  CHECK(b.num_pages > 0, "the block exists");
  count(b, -1, stats_);
  if (b.ref_count++ == 0) cache_.mark_used(id);
  count(b, 1, stats_);
}

std::vector<BlockId> BlockManager::acquire_chain(BlockId id) {
  std::vector<BlockId> chain;
  for (; id != kNoBlock; id = cache_.parent_of(id)) chain.push_back(id);
  std::reverse(chain.begin(), chain.end());
  for (const BlockId block : chain) acquire(block);
  return chain;
}

void BlockManager::release(std::span<const BlockId> ids) {
  ++clock_;
  for (const BlockId id : ids) {
    Block& b = at(id);
    CHECK(b.ref_count > 0, "only what is held is released");
    if (b.ref_count == 1 && !b.cached) {
      destroy(id);
      continue;
    }
    count(b, -1, stats_);
    if (--b.ref_count == 0) {
      cache_.mark_unused(id, clock_);
      if (wants_encode(b)) to_encode_.push_back(id);
    }
    count(b, 1, stats_);
  }
}

BlockId BlockManager::publish(BlockId id, BlockId parent, std::span<const int32_t> ids,
                              std::string_view salt) {
  CHECK(enable_cache_ && !at(id).cached && at(id).num_tokens == kBlockTokens,
        "a full block is published once");
  const BlockId first = cache_.find(parent, ids, salt);
  if (first == kNoBlock) {
    cache_.insert(id, parent, ids, salt);
    at(id).cached = true;
    return id;
  }
  if (at(id).coded &&
      !at(first).coded) {  // the cached copy takes the record: that saves its encode
    count(at(id), -1, stats_);
    count(at(first), -1, stats_);
    std::swap(at(id).pages, at(first).pages);
    std::swap(at(id).num_pages, at(first).num_pages);
    std::swap(at(id).coded, at(first).coded);
    count(at(id), 1, stats_);
    count(at(first), 1, stats_);
  }
  acquire(first);
  release(id);
  return first;
}

void BlockManager::forget(BlockId id) {
  CHECK(at(id).ref_count > 0, "an unused block would be nobody's");
  if (!at(id).cached) return;
  cache_.erase(id);
  at(id).cached = false;
}

std::vector<BlockId> BlockManager::take_blocks_to_encode() {
  std::vector<BlockId> ids;
  ids.swap(to_encode_);
  // Since then some were hit (and encoded), evicted, or given up a second time.
  std::sort(ids.begin(), ids.end());
  ids.erase(std::unique(ids.begin(), ids.end()), ids.end());
  std::erase_if(ids, [&](BlockId id) { return at(id).ref_count > 0 || !wants_encode(at(id)); });
  return ids;
}

int64_t BlockManager::audit(bool idle) const {
  BlockStats counted;
  counted.pages_total = stats_.pages_total;
  counted.pages_free = static_cast<int64_t>(free_.size() + free_after_encode_.size());
  std::vector<bool> seen(static_cast<size_t>(stats_.pages_total));
  const auto see = [&](PageId page) {
    CHECK(!seen[static_cast<size_t>(page)], "a page has one owner");
    seen[static_cast<size_t>(page)] = true;
  };
  for (const PageId page : free_) see(page);
  for (const PageId page : free_after_encode_) see(page);
  for (const Block& b : blocks_) {
    count(b, 1, counted);
    for (int i = 0; i < b.num_pages; ++i) see(b.pages[static_cast<size_t>(i)]);
  }
  CHECK(counted.pages_free == stats_.pages_free && counted.pages_cached == stats_.pages_cached &&
            counted.pages_in_use == stats_.pages_in_use,
        "running page counts equal a recount");
  CHECK(counted.coded_pages == stats_.coded_pages && counted.sink_pages == stats_.sink_pages &&
            counted.tail_pages == stats_.tail_pages && counted.dense_pages == stats_.dense_pages &&
            counted.live_tokens == stats_.live_tokens &&
            counted.cached_tokens == stats_.cached_tokens,
        "running kinds and tokens equal a recount");
  return counted.pages_total - counted.pages_free - counted.pages_cached -
         (idle ? 0 : counted.pages_in_use);
}

PageId BlockManager::take_page(bool for_encode) {
  std::vector<PageId>& from =
      !for_encode && !free_after_encode_.empty() ? free_after_encode_ : free_;
  if (from.empty()) evict_one();
  CHECK(!from.empty(), "the caller made sure that a page is left");
  const PageId page = from.back();
  from.pop_back();
  --stats_.pages_free;
  return page;
}

void BlockManager::evict_one() {
  const BlockId victim = cache_.next_victim();
  CHECK(victim != kNoBlock, "an unused cached block is left");
  destroy(victim);
}

void BlockManager::destroy(BlockId id) {
  Block& b = at(id);
  count(b, -1, stats_);
  if (b.cached) cache_.erase(id);
  for (int i = 0; i < b.num_pages; ++i) free_page(b.pages[static_cast<size_t>(i)]);
  stats_.pages_free += b.num_pages;
  b = Block{};
  free_ids_.push_back(id);
}

bool BlockManager::wants_encode(const Block& b) const {
  return b.cached && !b.coded && is_coded_block(layout_, b.index, b.num_tokens);
}

void BlockManager::count(const Block& b, int sign, BlockStats& stats) const {
  const int64_t pages = sign * int64_t{b.num_pages};
  const int64_t tokens = sign * int64_t{b.num_tokens};
  if (b.num_pages == 0) return;
  if (b.ref_count > 0) {
    stats.pages_in_use += pages;
    stats.live_tokens += tokens;
  } else {
    stats.pages_cached += pages;
    stats.cached_tokens += tokens;
  }
  if (!layout_.coded()) {
    stats.dense_pages += pages;
  } else if (b.coded) {
    stats.coded_pages += pages;
  } else if (b.index < kSinkBlocks) {
    stats.sink_pages += pages;
  } else {
    stats.tail_pages += pages;
  }
}

}  // namespace kvarn
