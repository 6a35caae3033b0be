// Pieces of text and their ids, so that a word is merged once and not each time it is seen.
// Bounded; a shard that is full is emptied. Thread-safe.
#pragma once

#include <array>
#include <cstdint>
#include <mutex>
#include <string>
#include <string_view>
#include <unordered_map>
#include <vector>

namespace kvarn {

class WordCache {
 public:
  static constexpr size_t kMaxWordBytes = 64;  // longer pieces hardly ever come twice

  // Appends the ids of `word` and returns true if it is known.
  bool find(std::string_view word, std::vector<int32_t>& ids);
  void insert(std::string_view word, const int32_t* ids, size_t count);

 private:
  static constexpr size_t kShards = 16;
  static constexpr size_t kMaxWordsPerShard = 4096;  // at most about 20 MB in all

  struct Hash {
    using is_transparent = void;
    size_t operator()(std::string_view word) const { return std::hash<std::string_view>{}(word); }
  };
  struct Shard {
    std::mutex mutex;
    std::unordered_map<std::string, std::vector<int32_t>, Hash, std::equal_to<>> words;
  };
  Shard& shard_of(std::string_view word);

  std::array<Shard, kShards> shards_;
};

}  // namespace kvarn
