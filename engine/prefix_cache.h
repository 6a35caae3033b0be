// Token prefix -> full block. An entry is found by hash(parent hash, 128 token ids), the chain
// starting at hash(format, salt), and compared by its ids, its parent and (at the root) its salt: a
// collision is a miss. Knows nothing of pages.
//
// Invariant: the parent of a cached block is cached. Whoever uses a block uses its parents, so
// "least recently used, deepest first" never evicts a parent before its child.
//
// Engine thread only.
#pragma once

#include <cstdint>
#include <set>
#include <span>
#include <string>
#include <string_view>
#include <tuple>
#include <unordered_map>
#include <vector>

#include "engine/block.h"

namespace kvarn {

uint64_t hash_block(uint64_t parent_hash, std::span<const int32_t> ids);

class PrefixCache {
 public:
  using HashFunction = uint64_t (*)(uint64_t parent_hash, std::span<const int32_t> ids);
  // Tests pass a poor hash to force collisions.
  explicit PrefixCache(KvFormat format, HashFunction hash = &hash_block)
      : format_(format), hash_(hash) {}

  // The block that follows `parent` (kNoBlock: the first of a sequence) and holds `ids`; kNoBlock
  // where there is none. `salt` counts at the root only: deeper blocks inherit it.
  BlockId find(BlockId parent, std::span<const int32_t> ids, std::string_view salt) const;
  // Adds `block`, which is in use. Nothing equal may be cached yet; the parent must be.
  void insert(BlockId block, BlockId parent, std::span<const int32_t> ids, std::string_view salt);
  // Forgets the block, which must have no children.
  void erase(BlockId block);

  BlockId parent_of(BlockId block) const { return entries_.at(block).parent; }

  void mark_used(BlockId block);
  // Nobody uses the block since `time` (larger: later). It may be evicted.
  void mark_unused(BlockId block, uint64_t time);
  // The unused block to evict next: least recently used, the deepest of those; kNoBlock: none.
  BlockId next_victim() const;

  int64_t size() const { return static_cast<int64_t>(entries_.size()); }

 private:
  struct Entry {
    uint64_t hash = 0;
    BlockId parent = kNoBlock;
    int32_t depth = 0;
    int32_t num_children = 0;
    bool unused = false;
    uint64_t unused_since = 0;
    std::vector<int32_t> ids;
    std::string salt;  // of roots
  };
  using VictimOrder = std::tuple<uint64_t, int32_t, BlockId>;  // unused_since, -depth, block

  uint64_t chain_hash(BlockId parent, std::span<const int32_t> ids, std::string_view salt) const;
  static VictimOrder order_of(BlockId block, const Entry& entry) {
    return {entry.unused_since, -entry.depth, block};
  }

  KvFormat format_;
  HashFunction hash_;
  std::unordered_map<BlockId, Entry> entries_;
  std::unordered_multimap<uint64_t, BlockId> by_hash_;
  std::set<VictimOrder> victims_;
};

}  // namespace kvarn
