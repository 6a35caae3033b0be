#include "engine/prefix_cache.h"

#include <algorithm>

#include "kernels/core/check.h"

namespace kvarn {
namespace {

// The finaliser of SplitMix64: every input bit reaches every output bit.
uint64_t mix(uint64_t x) {
  x ^= x >> 30;
  x *= 0xbf58476d1ce4e5b9u;
  x ^= x >> 27;
  x *= 0x94d049bb133111ebu;
  return x ^ (x >> 31);
}

constexpr uint64_t kOddStep =
    0x9e3779b97f4a7c15u;  // 2^64 / golden ratio: successive sums differ widely

}  // namespace

uint64_t hash_block(uint64_t parent_hash, std::span<const int32_t> ids) {
  uint64_t hash = mix(parent_hash + kOddStep);
  for (const int32_t id : ids) hash = mix(hash + kOddStep + static_cast<uint32_t>(id));
  return hash;
}

uint64_t PrefixCache::chain_hash(BlockId parent, std::span<const int32_t> ids,
                                 std::string_view salt) const {
  if (parent != kNoBlock) return hash_(entries_.at(parent).hash, ids);
  uint64_t root = mix(static_cast<uint64_t>(format_) + kOddStep);
  for (const char c : salt) root = mix(root + kOddStep + static_cast<unsigned char>(c));
  return hash_(root, ids);
}

BlockId PrefixCache::find(BlockId parent, std::span<const int32_t> ids,
                          std::string_view salt) const {
  const auto [first, last] = by_hash_.equal_range(chain_hash(parent, ids, salt));
  for (auto it = first; it != last; ++it) {
    const Entry& entry = entries_.at(it->second);
    if (entry.parent == parent && (parent != kNoBlock || entry.salt == salt) &&
        std::ranges::equal(entry.ids, ids)) {
      return it->second;
    }
  }
  return kNoBlock;
}

void PrefixCache::insert(BlockId block, BlockId parent, std::span<const int32_t> ids,
                         std::string_view salt) {
  CHECK(ids.size() == static_cast<size_t>(kBlockTokens), "only full blocks are cached");
  Entry entry;
  entry.hash = chain_hash(parent, ids, salt);
  entry.parent = parent;
  entry.ids.assign(ids.begin(), ids.end());
  if (parent == kNoBlock) {
    entry.salt = salt;
  } else {
    Entry& parent_entry = entries_.at(parent);
    entry.depth = parent_entry.depth + 1;
    ++parent_entry.num_children;
  }
  by_hash_.emplace(entry.hash, block);
  const bool is_new = entries_.emplace(block, std::move(entry)).second;
  CHECK(is_new, "a block is cached once");
}

void PrefixCache::erase(BlockId block) {
  const auto it = entries_.find(block);
  CHECK(it != entries_.end(), "the block is cached");
  const Entry& entry = it->second;
  CHECK(entry.num_children == 0, "a parent leaves the cache after its children");
  if (entry.unused) victims_.erase(order_of(block, entry));
  if (entry.parent != kNoBlock) --entries_.at(entry.parent).num_children;
  const auto [first, last] = by_hash_.equal_range(entry.hash);
  by_hash_.erase(std::find_if(first, last, [&](const auto& e) { return e.second == block; }));
  entries_.erase(it);
}

void PrefixCache::mark_used(BlockId block) {
  Entry& entry = entries_.at(block);
  CHECK(entry.unused, "the block was unused");
  victims_.erase(order_of(block, entry));
  entry.unused = false;
}

void PrefixCache::mark_unused(BlockId block, uint64_t time) {
  Entry& entry = entries_.at(block);
  CHECK(!entry.unused, "the block was in use");
  entry.unused = true;
  entry.unused_since = time;
  victims_.insert(order_of(block, entry));
}

BlockId PrefixCache::next_victim() const {
  return victims_.empty() ? kNoBlock : std::get<2>(*victims_.begin());
}

}  // namespace kvarn
