// A KV cache of one layer under test: sequences with given q, k, v are prefilled in chunks and
// decoded, alone or together, over pages handed out in random order from a pool that starts as NaN.
// It plans pages as docs/architecture.md says; the ops under test do the rest.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstring>
#include <random>
#include <utility>
#include <vector>

#include "kernels/kv_cpu.h"
#include "kernels/kv_layout.h"
#include "tests/support/random_tensor.h"

namespace kvarn::test {

struct KvShape {
  KvFormat format = KvFormat::kKvarnK4V2;
  int q_heads = 2, kv_heads = 1, head_dim = 128;
};

struct KvSequence {
  std::vector<float> q;            // [position][q_heads][head_dim]
  std::vector<half> k, v;          // [position][kv_heads][head_dim]
  std::vector<BlockPages> blocks;  // block table
  std::vector<bool> block_is_coded;
  std::vector<float> out;        // [position][q_heads * head_dim]
  int64_t length = 0, done = 0;  // positions in all, and computed
};

inline std::vector<half> random_half(size_t count, uint64_t seed, float low, float high) {
  std::vector<half> values(count);
  const std::vector<float> source = random_floats(count, seed, low, high);
  for (size_t i = 0; i < count; ++i) values[i] = to_half(source[i]);
  return values;
}

inline KvSequence make_sequence(const KvShape& shape, int64_t length, uint64_t seed) {
  KvSequence s;
  const auto positions = static_cast<size_t>(length), dim = static_cast<size_t>(shape.head_dim);
  const size_t kv = positions * static_cast<size_t>(shape.kv_heads) * dim;
  s.q = random_floats(positions * static_cast<size_t>(shape.q_heads) * dim, 3 * seed, -2.f, 2.f);
  s.k = random_half(kv, 3 * seed + 1, -3.f, 3.f);
  s.v = random_half(kv, 3 * seed + 2, -1.f, 1.5f);
  // A few loud channels and tokens, so that the scales of a tile differ.
  std::mt19937_64 engine(seed);
  for (int i = 0; i < 3; ++i) {
    const size_t channel = engine() % dim;
    for (size_t at = channel; at < kv; at += dim) s.k[at] = to_half(6.f * to_float(s.k[at]) + 9.f);
  }
  for (size_t at = 0; at < kv; ++at)
    if ((at / dim) % 41 == seed % 41) s.v[at] = to_half(5.f * to_float(s.v[at]));
  s.out.resize(s.q.size());
  s.length = length;
  return s;
}

class KvCacheDriver {
 public:
  KvCacheDriver(const KvShape& shape, int pages, CpuIsa isa, int threads, uint64_t seed,
                std::byte stale = std::byte{0xff})
      : shape_(shape), isa_(isa), pool_(threads), stale_(stale) {
    layout_ = make_kv_layout(shape.format, shape.head_dim);
    // 0xffff is an fp16 NaN: a row that nobody wrote shows in every result that reads it.
    bytes_.resize(static_cast<size_t>(pages) * static_cast<size_t>(shape.kv_heads) *
                      static_cast<size_t>(layout_.page_bytes),
                  stale);
    for (int i = 0; i < pages; ++i) free_.push_back(i);
    std::shuffle(free_.begin(), free_.end(), std::mt19937_64(seed));
    layer_ = {bytes_.data(), pages, shape.kv_heads, layout_};
  }

  const KvLayout& layout() const { return layout_; }
  const KvLayerView& layer() const { return layer_; }
  ReadingRule rule = ReadingRule::kPosition;
  bool attend = true;  // false: only fill the cache

  // One step: the next `rows` positions of each sequence.
  void step(const std::vector<std::pair<KvSequence*, int>>& work) {
    std::vector<float> q;
    std::vector<half> k, v;
    std::vector<int64_t> slots;
    std::vector<EncodeTile> tiles;
    std::vector<AttentionSequence> sequences;
    std::vector<BlockPages> table;
    std::vector<int32_t> freed;
    int32_t first_row = 0;
    for (const auto& [s, rows] : work) {
      plan(*s, rows, first_row, slots, tiles, freed);
      append(q, s->q, s->done, rows, shape_.q_heads);
      append(k, s->k, s->done, rows, shape_.kv_heads);
      append(v, s->v, s->done, rows, shape_.kv_heads);
      sequences.push_back(
          {first_row, rows, static_cast<int32_t>(s->done), static_cast<int32_t>(table.size())});
      table.insert(table.end(), s->blocks.begin(), s->blocks.end());
      first_row += rows;
    }
    const Tensor q_t = Tensor::of(q.data(), {first_row, shape_.q_heads, shape_.head_dim});
    const Tensor k_t = Tensor::of(k.data(), {first_row, shape_.kv_heads, shape_.head_dim});
    const Tensor v_t = Tensor::of(v.data(), {first_row, shape_.kv_heads, shape_.head_dim});
    std::vector<float> out(q.size(), -1.f);
    const Tensor out_t = Tensor::of(out.data(), {first_row, shape_.q_heads * shape_.head_dim});
    cpu::kv_write({k_t, v_t, slots.data(), layer_}, pool_);
    cpu::kv_encode({k_t, v_t, tiles, {&layer_, 1}}, pool_, isa_);
    AttentionParams params{q_t,     k_t,  v_t,  sequences, table.data(), layer_, shape_.q_heads,
                           scale(), rule, out_t};
    if (attend) cpu::attention(params, pool_, isa_);
    size_t from = 0;
    for (const auto& [s, rows] : work) {
      const size_t count = static_cast<size_t>(rows) * row_size();
      const size_t to = static_cast<size_t>(s->done) * row_size();
      std::copy_n(out.data() + from, count, s->out.data() + to);
      from += count;
      s->done += rows;
    }
    for (const int32_t page : freed) release(page);
  }

  // Prefills `prompt` positions in chunks, then decodes the rest alone.
  void run(KvSequence& s, int64_t prompt, int chunk) {
    while (s.done < prompt)
      step({{&s, static_cast<int>(std::min<int64_t>(chunk, prompt - s.done))}});
    while (s.done < s.length) step({{&s, 1}});
  }

  float scale() const { return 1.f / std::sqrt(static_cast<float>(shape_.head_dim)); }
  size_t row_size() const {
    return static_cast<size_t>(shape_.q_heads) * static_cast<size_t>(shape_.head_dim);
  }

 private:
  template <typename T>
  void append(std::vector<T>& to, const std::vector<T>& from, int64_t first, int rows, int heads) {
    const int64_t row = int64_t{heads} * shape_.head_dim;
    to.insert(to.end(), from.begin() + first * row, from.begin() + (first + rows) * row);
  }

  int32_t take() {
    CHECK(!free_.empty(), "the test's pool is too small");
    const int32_t page = free_.back();
    free_.pop_back();
    return page;
  }
  void release(int32_t page) {  // what is left in it must not matter
    std::memset(bytes_.data() + int64_t{page} * shape_.kv_heads * layout_.page_bytes,
                std::to_integer<int>(stale_),
                static_cast<size_t>(shape_.kv_heads) * static_cast<size_t>(layout_.page_bytes));
    free_.insert(free_.begin(), page);
  }

  void plan(KvSequence& s, int rows, int32_t first_row, std::vector<int64_t>& slots,
            std::vector<EncodeTile>& tiles, std::vector<int32_t>& freed) {
    const int64_t end = s.done + rows;
    const auto num_blocks = static_cast<size_t>((end + kBlockTokens - 1) / kBlockTokens);
    while (s.blocks.size() < num_blocks) {
      BlockPages none;
      none.fill(-1);
      s.blocks.push_back(none);
      s.block_is_coded.push_back(false);
    }
    const bool encode = layout_.coded();
    // Blocks that this step's rows read coded, from the exact pages of earlier steps.
    for (int64_t b = 0; encode && b < s.done / kBlockTokens; ++b) {
      const auto i = static_cast<size_t>(b);
      if (s.block_is_coded[i] || !reads_coded(b, s.done, s.done)) continue;
      EncodeTile tile{-1, s.blocks[i], take()};
      for (int32_t& page : s.blocks[i])
        if (page >= 0) freed.push_back(std::exchange(page, -1));
      s.blocks[i][0] = tile.target_page;
      s.block_is_coded[i] = true;
      tiles.push_back(tile);
    }
    for (int64_t p = s.done; p < end; ++p) {
      const int64_t b = p / kBlockTokens;
      const auto i = static_cast<size_t>(b);
      const bool whole = s.done % kBlockTokens == 0 && kBlockTokens * b >= s.done &&
                         kBlockTokens * (b + 1) <= end && rows > 1;
      if (encode && whole && b >= kSinkBlocks) {  // a complete tile of a chunk never is exact
        if (p % kBlockTokens == 0) {
          EncodeTile tile{first_row + static_cast<int32_t>(p - s.done), {}, take()};
          tile.source_pages.fill(-1);
          s.blocks[i][0] = tile.target_page;
          s.block_is_coded[i] = true;
          tiles.push_back(tile);
        }
        slots.push_back(-1);
        continue;
      }
      const auto in_block = static_cast<int>(p % kBlockTokens);
      int32_t& page = s.blocks[i][static_cast<size_t>(in_block / layout_.exact_rows)];
      if (page < 0) page = take();
      slots.push_back(int64_t{page} * layout_.exact_rows + in_block % layout_.exact_rows);
    }
  }

  KvShape shape_;
  KvLayout layout_;
  CpuIsa isa_;
  ThreadPool pool_;
  std::byte stale_;  // what unwritten and freed pages hold
  std::vector<std::byte> bytes_;
  std::vector<int32_t> free_;
  KvLayerView layer_;
};

}  // namespace kvarn::test
