#include "engine/tokenizer/bpe.h"

#include <algorithm>
#include <bit>

#include "kernels/core/check.h"

namespace kvarn {
namespace {

struct Symbol {
  int32_t id;
  int32_t prev, next;  // index of the neighbour, -1: none
  bool alive;
};

struct Candidate {
  int32_t rank;
  int32_t left;  // index of the left symbol
  int32_t merged;
};
// std heaps put the largest first.
struct Later {
  bool operator()(const Candidate& a, const Candidate& b) const {
    return a.rank != b.rank ? a.rank > b.rank : a.left > b.left;
  }
};

}  // namespace

Bpe::Bpe(size_t num_merges)
    : table_(std::bit_ceil(std::max<size_t>(16, 2 * num_merges))), mask_(table_.size() - 1) {
  byte_ids_.fill(-1);
}

size_t Bpe::slot_of(uint64_t pair) const {
  // A multiplicative hash: ids are dense, so their low bits alone would cluster.
  size_t slot = static_cast<size_t>((pair * 0x9E3779B97F4A7C15u) >> 29) & mask_;
  while (table_[slot].pair != kNoPair && table_[slot].pair != pair) slot = (slot + 1) & mask_;
  return slot;
}

void Bpe::add_merge(int32_t left, int32_t right, int32_t merged, int32_t rank) {
  const uint64_t pair = pair_key(left, right);
  table_[slot_of(pair)] = {pair, rank, merged};
}

const Bpe::Merge* Bpe::find(int32_t left, int32_t right) const {
  const Merge& merge = table_[slot_of(pair_key(left, right))];
  return merge.pair == kNoPair ? nullptr : &merge;
}

void Bpe::encode(std::string_view piece, std::vector<int32_t>& ids) const {
  const auto size = static_cast<int32_t>(piece.size());
  DCHECK(piece.size() < (size_t{1} << 31), "bodies are limited far below");
  // Reused between calls: most pieces are a few bytes, and allocating would dominate.
  thread_local std::vector<Symbol> symbols;
  thread_local std::vector<Candidate> heap;
  symbols.clear();
  heap.clear();
  const auto consider = [&](int32_t left, int32_t right) {
    const Merge* merge =
        find(symbols[static_cast<size_t>(left)].id, symbols[static_cast<size_t>(right)].id);
    if (merge) heap.push_back({merge->rank, left, merge->merged});
    return merge != nullptr;
  };
  for (int32_t i = 0; i < size; ++i) {
    const int32_t id = byte_ids_[static_cast<uint8_t>(piece[static_cast<size_t>(i)])];
    DCHECK(id >= 0, "every byte of UTF-8 has a token, checked at load");
    symbols.push_back({id, i - 1, i + 1 < size ? i + 1 : -1, true});
  }
  for (int32_t i = 0; i + 1 < size; ++i) consider(i, i + 1);
  std::make_heap(heap.begin(), heap.end(), Later{});

  while (!heap.empty()) {
    std::pop_heap(heap.begin(), heap.end(), Later{});
    const Candidate top = heap.back();
    heap.pop_back();
    Symbol& left = symbols[static_cast<size_t>(top.left)];
    if (!left.alive || left.next < 0) continue;
    Symbol& right = symbols[static_cast<size_t>(left.next)];
    // Stale if a neighbour was merged since. Compared by result, not by pair, as the reference
    // does.
    const Merge* merge = find(left.id, right.id);
    if (!merge || merge->merged != top.merged) continue;

    left.id = top.merged;
    left.next = right.next;
    right.alive = false;
    if (right.next >= 0) symbols[static_cast<size_t>(right.next)].prev = top.left;
    if (left.prev >= 0 && consider(left.prev, top.left)) {
      std::push_heap(heap.begin(), heap.end(), Later{});
    }
    if (left.next >= 0 && consider(top.left, left.next)) {
      std::push_heap(heap.begin(), heap.end(), Later{});
    }
  }
  for (int32_t i = size > 0 ? 0 : -1; i >= 0; i = symbols[static_cast<size_t>(i)].next) {
    ids.push_back(symbols[static_cast<size_t>(i)].id);
  }
  // One huge piece must not pin its memory to the thread for good.
  constexpr size_t kKeptSymbols = size_t{1} << 16;
  if (symbols.capacity() > kKeptSymbols) {
    std::vector<Symbol>().swap(symbols);
    std::vector<Candidate>().swap(heap);
  }
}

}  // namespace kvarn
