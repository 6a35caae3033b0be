#include "kernels/attention_decode_plan.h"

#include <algorithm>
#include <cstring>

#include "kernels/core/check.h"

namespace kvarn::cuda {
namespace {

// Shares that begin and end with a list save the merge of cut lists; they may be larger by this.
constexpr int64_t allowed_excess(int64_t share) { return 4 + share / 25; }

class Planner {
 public:
  Planner(const KvLayout& layout, int kv_heads, int grid,
          std::span<const AttentionSequence> decodes, std::byte* plan)
      : layout_(layout), kv_heads_(kv_heads), grid_(grid), decodes_(decodes) {
    shares_ = reinterpret_cast<DecodeShare*>(plan);
    rest_ = reinterpret_cast<DecodeSegment*>(shares_ + grid);
    std::memset(plan, 0, sizeof(DecodeShare) * static_cast<size_t>(grid));
  }

  size_t run() {
    int64_t total = 0;
    for (const AttentionSequence& s : decodes_) total += int64_t{items(s)} * kv_heads_;
    const int64_t least = (total + grid_ - 1) / grid_;
    // Lists whole or cut into equal parts, if that makes the largest share little larger.
    for (int64_t share = least; share <= least + allowed_excess(least); ++share) {
      if (blocks_for(share) <= grid_) {
        cut_lists(share);
        return bytes();
      }
    }
    cut_evenly(total);
    return bytes();
  }

 private:
  int32_t items(const AttentionSequence& s) const {
    CHECK(s.num_rows == 0 || s.num_rows == 1, "attention_decode: a sequence has one row or none");
    if (s.num_rows == 0) return 0;
    return decode_list(layout_.coded(), layout_.pages_per_exact_block, layout_.exact_rows,
                       s.first_position)
        .items;
  }

  size_t bytes() const {
    return sizeof(DecodeShare) * static_cast<size_t>(grid_) +
           sizeof(DecodeSegment) * static_cast<size_t>(num_rest_);
  }

  // Thread blocks that cut_lists(share) takes.
  int64_t blocks_for(int64_t share) const {
    int64_t blocks = 0, room = 0;  // room: in the last one
    for (const AttentionSequence& s : decodes_) {
      const int64_t n = items(s);
      if (n == 0) continue;
      if (n > share) {
        blocks += (n + share - 1) / share * kv_heads_;
        room = 0;
        continue;
      }
      const int64_t in_room = std::min<int64_t>(room / n, kv_heads_), a_block = share / n;
      const int64_t left = kv_heads_ - in_room;
      room -= in_room * n;
      if (left == 0) continue;
      blocks += (left + a_block - 1) / a_block;
      room = share - ((left - 1) % a_block + 1) * n;
    }
    return blocks;
  }

  void cut_lists(int64_t share) {
    int block = -1;
    int64_t room = 0;
    for (const AttentionSequence& s : decodes_) {
      const int32_t n = items(s);
      if (n == 0) continue;
      for (int head = 0; head < kv_heads_; ++head) {
        if (n <= share) {
          if (room < n) ++block, room = share;
          room -= n;
          add(block, s, head, 0, n, 1, 0, 0);
          continue;
        }
        const auto parts = static_cast<int32_t>((n + share - 1) / share);
        for (int32_t p = 0; p < parts; ++p) {
          add(++block, s, head, static_cast<int32_t>(int64_t{n} * p / parts),
              static_cast<int32_t>(int64_t{n} * (p + 1) / parts), parts, p, partials_);
        }
        partials_ += parts;
        room = 0;
      }
    }
  }

  // One long list of all items, cut into equal shares.
  void cut_evenly(int64_t total) {
    int block = 0;
    int64_t at = 0;  // in the long list
    const auto share_end = [&](int b) { return total * (b + 1) / grid_; };
    for (const AttentionSequence& s : decodes_) {
      const int32_t n = items(s);
      if (n == 0) continue;
      for (int head = 0; head < kv_heads_; ++head, at += n) {
        while (share_end(block) <= at) ++block;
        int last = block;
        while (share_end(last) < at + n) ++last;
        const int parts = last - block + 1;
        int64_t begin = at;
        for (int p = 0; p < parts; ++p, begin = share_end(block + p - 1)) {
          const int64_t end = std::min(at + n, share_end(block + p));
          add(block + p, s, head, static_cast<int32_t>(begin - at), static_cast<int32_t>(end - at),
              parts, p, partials_);
        }
        if (parts > 1) partials_ += parts;
        block = last;
      }
    }
  }

  // Calls come in order of blocks.
  void add(int block, const AttentionSequence& s, int head, int32_t begin, int32_t end,
           int32_t parts, int32_t part, int32_t first_partial) {
    CHECK(block < grid_ && begin < end, "attention_decode: a share has work, and a thread block");
    CHECK(parts == 1 || first_partial + parts <= max_decode_partials(grid_),
          "attention_decode: cut lists fit the scratch");
    const DecodeSegment segment{s.first_row, s.first_position,     s.first_block, head, begin, end,
                                parts,       first_partial + part, first_partial, {}};
    DecodeShare& share = shares_[block];
    if (share.segments == 0) {
      share.first = segment;
      share.rest = num_rest_;
    } else {
      std::memcpy(&rest_[num_rest_++], &segment, sizeof segment);
    }
    ++share.segments;
    share.items += end - begin;
  }

  const KvLayout& layout_;
  const int kv_heads_, grid_;
  const std::span<const AttentionSequence> decodes_;
  DecodeShare* shares_;
  DecodeSegment* rest_;
  int32_t num_rest_ = 0, partials_ = 0;
};

}  // namespace

size_t max_decode_plan_bytes(int grid, int max_sequences, int kv_heads) {
  // Every list has a segment, and every border between shares may cut one in two.
  const size_t segments = static_cast<size_t>(max_sequences) * static_cast<size_t>(kv_heads) +
                          static_cast<size_t>(grid);
  return sizeof(DecodeShare) * static_cast<size_t>(grid) + sizeof(DecodeSegment) * segments;
}

size_t plan_decode(const KvLayout& layout, int kv_heads, int grid,
                   std::span<const AttentionSequence> decodes, std::byte* plan) {
  return Planner(layout, kv_heads, grid, decodes, plan).run();
}

}  // namespace kvarn::cuda
