#include "engine/tokenizer/word_cache.h"

namespace kvarn {

WordCache::Shard& WordCache::shard_of(std::string_view word) {
  // Cheap and not the map's hash: the bucket index must not depend on the shard.
  const size_t first = static_cast<uint8_t>(word.front()), last = static_cast<uint8_t>(word.back());
  return shards_[(first * 7 + last * 3 + word.size()) % kShards];
}

bool WordCache::find(std::string_view word, std::vector<int32_t>& ids) {
  Shard& shard = shard_of(word);
  const std::lock_guard lock(shard.mutex);
  const auto it = shard.words.find(word);
  if (it == shard.words.end()) return false;
  ids.insert(ids.end(), it->second.begin(), it->second.end());
  return true;
}

void WordCache::insert(std::string_view word, const int32_t* ids, size_t count) {
  Shard& shard = shard_of(word);
  const std::lock_guard lock(shard.mutex);
  if (shard.words.size() >= kMaxWordsPerShard) shard.words.clear();
  shard.words.try_emplace(std::string(word), ids, ids + count);
}

}  // namespace kvarn
