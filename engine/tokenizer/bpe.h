// The merges of byte-pair encoding over the bytes of one piece of text. Immutable after add().
#pragma once

#include <array>
#include <cstdint>
#include <string_view>
#include <vector>

namespace kvarn {

class Bpe {
 public:
  explicit Bpe(size_t num_merges);

  void set_byte(uint8_t byte, int32_t id) { byte_ids_[byte] = id; }
  // Merges are given in order of rank, 0 first; the same pair given again gets the later rank.
  void add_merge(int32_t left, int32_t right, int32_t merged, int32_t rank);

  // Appends the ids of `piece`. The pair of lowest rank is merged first, of equals the leftmost:
  // O(n log n), so that a piece of a megabyte costs a second, not a day.
  void encode(std::string_view piece, std::vector<int32_t>& ids) const;

 private:
  struct Merge {
    uint64_t pair = kNoPair;
    int32_t rank = 0;
    int32_t merged = 0;
  };
  static constexpr uint64_t kNoPair = ~uint64_t{0};

  static uint64_t pair_key(int32_t left, int32_t right) {
    return uint64_t{static_cast<uint32_t>(left)} << 32 | static_cast<uint32_t>(right);
  }
  size_t slot_of(uint64_t pair) const;  // of the pair, or the free slot where it would go
  const Merge* find(int32_t left, int32_t right) const;

  std::array<int32_t, 256> byte_ids_;
  std::vector<Merge> table_;  // open addressing, at most half full
  size_t mask_;
};

}  // namespace kvarn
