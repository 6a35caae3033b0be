// Causal attention over pages: which thread attends which rows to which blocks. One partial
// (m, l, acc) per (row, query head, block), merged in order of blocks, so no schedule can change a
// bit; the arithmetic of a partial is in attention_impl.h.
#include <algorithm>
#include <array>
#include <cstring>
#include <vector>

#include "kernels/kv_cpu.h"
#include "kernels/kv_kernels.h"

namespace kvarn::cpu {
namespace {

constexpr int kUnitQueries = 256;    // query vectors of one unit of prefill work, about
constexpr int kBlocksPerRound = 64;  // of a context that is split between threads

// Rows of one tile of one sequence, for all query heads of one KV head.
struct Unit {
  const AttentionSequence* sequence;
  int first_row, rows;  // within the sequence
};

// Memory of one thread, grown to the largest shape seen and kept.
class Scratch {
 public:
  struct Views {
    float *q, *k, *v;
    Partials part, state;
  };

  Views views(int queries, int padded_dim) {
    const auto n = static_cast<size_t>(queries), dim = static_cast<size_t>(padded_dim);
    const size_t partial = kMaxQueries * (dim + 32), state = n * (dim + 2) + 32;
    const size_t floats = n * dim + 2 * kBlockTokens * dim + partial + state + 64;
    if (buffer_.bytes() < floats * sizeof(float)) buffer_ = allocate_host(floats * sizeof(float));
    float* p = reinterpret_cast<float*>(buffer_.data());
    const auto take = [&p](size_t count) { return std::exchange(p, p + (count + 15) / 16 * 16); };
    Views v{};
    v.q = take(n * dim);
    v.k = take(kBlockTokens * dim);
    v.v = take(kBlockTokens * dim);
    v.part = {take(kMaxQueries), take(kMaxQueries), take(kMaxQueries * dim)};
    v.state = {take(n), take(n), take(n * dim)};
    return v;
  }

 private:
  Buffer buffer_;
};

Partials offset(const Partials& p, int query, int padded_dim) {
  return {p.m + query, p.l + query, p.acc + int64_t{query} * padded_dim};
}

void clear(const Partials& state, int n, int padded_dim) {
  std::fill_n(state.m, n, -__builtin_inff());
  std::fill_n(state.l, n, 0.0f);
  std::fill_n(state.acc, int64_t{n} * padded_dim, 0.0f);
}

class Attention {
 public:
  Attention(const AttentionParams& params, CpuIsa isa)
      : params_(params),
        layout_(params.layer.layout),
        kernels_(kv_kernels(isa)),
        kv_heads_(params.layer.kv_heads),
        group_(params.q_heads / params.layer.kv_heads) {
    const int head_dim = layout_.head_dim;
    const int64_t rows = params.q.dim(0);
    CHECK(group_ * kv_heads_ == params.q_heads, "attention: q_heads is a multiple of kv_heads");
    CHECK(params.q.dims() == 3 && params.q.dim(1) == params.q_heads &&
              params.q.dim(2) == head_dim && params.q.dtype() == DType::kF32,
          "attention: q is f32 [rows, q_heads, head_dim]");
    for (const Tensor& t : {params.k_rows, params.v_rows})
      CHECK(t.dims() == 3 && t.dim(0) == rows && t.dim(1) == kv_heads_ && t.dim(2) == head_dim &&
                t.dtype() == DType::kF16,
            "attention: k_rows and v_rows are f16 [rows, kv_heads, head_dim]");
    CHECK(params.out.dtype() == DType::kF32 && params.out.size() == params.q.size(),
          "attention: out is f32 [rows, q_heads * head_dim]");
    shape_ = {layout_.coded() ? layout_.tile() : TileLayout{}, head_dim, (head_dim + 15) / 16 * 16,
              params.scale};
  }

  void run(ThreadPool& pool) {
    thread_local std::vector<Unit> units;  // of the calling thread; keeps its capacity
    units.clear();
    int rows_per_unit = kBlockTokens;  // a power of two: units do not cross tiles
    while (rows_per_unit > 1 && rows_per_unit * group_ > kUnitQueries) rows_per_unit /= 2;
    bool decode_only = true;
    for (const AttentionSequence& s : params_.sequences) {
      CHECK(s.num_rows <= 1 || s.first_position % kBlockTokens == 0,
            "attention: a chunk starts at a block border");
      CHECK(s.first_row >= 0 && s.first_row + s.num_rows <= params_.q.dim(0),
            "attention: a sequence's rows are rows of this step");
      decode_only = decode_only && s.num_rows <= 1;
      for (int row = 0; row < s.num_rows; row += rows_per_unit)
        units.push_back({&s, row, std::min(rows_per_unit, s.num_rows - row)});
    }
    const auto num_units = static_cast<int64_t>(units.size());
    if (num_units == 0) return;
    if (decode_only && should_split(num_units, pool.size())) {
      for (const Unit& unit : units) attend_split(unit, pool);
      return;
    }
    // Heads outermost: a thread's share of every sequence is the same.
    const std::vector<Unit>& list = units;
    pool.parallel_for(num_units * kv_heads_, 1, [&](int64_t begin, int64_t end, int) {
      for (int64_t item = begin; item < end; ++item)
        attend_unit(list[static_cast<size_t>(item % num_units)],
                    static_cast<int>(item / num_units));
    });
  }

 private:
  bool should_split(int64_t num_units, int threads) const {
    const int64_t items = num_units * kv_heads_;
    return threads > 1 && items < 4 * threads && items % threads != 0;
  }

  static Scratch& scratch() {
    thread_local Scratch scratch;
    return scratch;
  }

  int64_t position(const Unit& unit) const {
    return unit.sequence->first_position + unit.first_row;
  }
  int64_t own_block(const Unit& unit) const { return position(unit) / kBlockTokens; }

  const std::byte* page(int32_t id, int head) const {
    DCHECK(id >= 0 && id < params_.layer.num_pages, "attention: a page of this pool");
    return params_.layer.data + (int64_t{id} * kv_heads_ + head) * layout_.page_bytes;
  }

  bool coded(const Unit& unit, int64_t block) const {
    return layout_.coded() &&
           reads_coded(block, position(unit), unit.sequence->first_position, params_.rule);
  }

  const BlockPages& pages(const Unit& unit, int64_t block) const {
    return params_.block_pages[unit.sequence->first_block + block];
  }

  // The block as the unit's rows see it; `rows` receives the addresses of exact rows.
  Block view(const Unit& unit, int64_t block, int head, TileRows& rows) const {
    const int64_t start = block * kBlockTokens;
    const int64_t last = position(unit) + unit.rows - 1;
    Block b{};
    b.tokens = static_cast<int>(std::min<int64_t>(kBlockTokens, last + 1 - start));
    if (coded(unit, block)) {
      b.record = page(pages(unit, block)[0], head);
      return b;
    }
    b.rows = &rows;
    const AttentionSequence& s = *unit.sequence;
    const auto in_pages = static_cast<int>(
        std::clamp<int64_t>(s.first_position - start, 0, b.tokens));  // the rest is of this step
    for (int t = 0; t < in_pages; t += layout_.exact_rows) {
      const std::byte* from =
          page(pages(unit, block)[static_cast<size_t>(t / layout_.exact_rows)], head);
      for (int r = 0; r < layout_.exact_rows && t + r < in_pages; ++r) {
        rows.k[t + r] = reinterpret_cast<const half*>(from + layout_.k_row_offset(r));
        rows.v[t + r] = reinterpret_cast<const half*>(from + layout_.v_row_offset(r));
      }
    }
    for (int t = in_pages; t < b.tokens; ++t) {
      const int64_t row = s.first_row + start + t - s.first_position;
      const int64_t at = (row * kv_heads_ + head) * layout_.head_dim;
      rows.k[t] = params_.k_rows.data<half>() + at;
      rows.v[t] = params_.v_rows.data<half>() + at;
    }
    return b;
  }

  // [rows * group][padded_dim], zeros past head_dim.
  void load_queries(const Unit& unit, int head, float* q) const {
    const int head_dim = layout_.head_dim, padded = shape_.padded_dim;
    for (int i = 0; i < unit.rows * group_; ++i) {
      float* to = q + int64_t{i} * padded;
      std::copy_n(params_.q.data<float>() + offset_of(unit, head, i), head_dim, to);
      std::fill(to + head_dim, to + padded, 0.0f);
    }
  }

  // Of query i of the unit, in q and in out.
  int64_t offset_of(const Unit& unit, int head, int i) const {
    const int64_t row = unit.sequence->first_row + unit.first_row + i / group_;
    return (row * params_.q_heads + head * group_ + i % group_) * layout_.head_dim;
  }

  void finish(const Unit& unit, int head, const Partials& state) const {
    for (int i = 0; i < unit.rows * group_; ++i) {
      const float* acc = state.acc + int64_t{i} * shape_.padded_dim;
      float* out = params_.out.data<float>() + offset_of(unit, head, i);
      kernels_.finish(shape_, layout_.coded(), acc, state.l[i], out);
    }
  }

  void attend_unit(const Unit& unit, int head) const {
    const int n = unit.rows * group_, padded = shape_.padded_dim;
    const Scratch::Views s = scratch().views(n, padded);
    load_queries(unit, head, s.q);
    clear(s.state, n, padded);
    const int64_t own = own_block(unit);
    TileRows rows[2];
    Block views[2];
    views[0] = view(unit, 0, head, rows[0]);
    for (int64_t block = 0; block <= own; ++block) {
      Block& b = views[block % 2];
      if (block < own) {
        b.next = &views[(block + 1) % 2];
        views[(block + 1) % 2] = view(unit, block + 1, head, rows[(block + 1) % 2]);
      }
      if (n >= kernels_.expand_from) {
        attend_many(unit, b, block == own, s);
      } else if (block < own) {
        attend_few(b, s, 0, n);
      } else {  // causal: row by row
        for (int row = 0; row < unit.rows; ++row) {
          Block seen = b;
          seen.tokens = static_cast<int>(position(unit) % kBlockTokens) + row + 1;
          attend_few(seen, s, row * group_, group_);
        }
      }
    }
    finish(unit, head, s.state);
  }

  void attend_few(const Block& block, const Scratch::Views& s, int first, int n) const {
    const int padded = shape_.padded_dim;
    for (int i = first; i < first + n; i += kMaxQueries) {
      const int count = std::min(kMaxQueries, first + n - i);
      kernels_.attend(shape_, block, s.q + int64_t{i} * padded, count, s.part);
      kernels_.merge(count, padded, s.part, offset(s.state, i, padded));
    }
  }

  void attend_many(const Unit& unit, const Block& block, bool own, const Scratch::Views& s) const {
    const int n = unit.rows * group_, padded = shape_.padded_dim;
    const ExpandedBlock expanded{s.k, s.v};
    kernels_.expand(shape_, block, expanded);
    const int seen_by_first = static_cast<int>(position(unit) % kBlockTokens) + 1;
    for (int i = 0; i < n; i += kMaxQueries) {
      const int count = std::min(kMaxQueries, n - i);
      std::array<int, kMaxQueries> limits;
      if (own)
        for (int j = 0; j < count; ++j)
          limits[static_cast<size_t>(j)] = seen_by_first + (i + j) / group_;
      kernels_.attend_expanded(shape_, block, expanded, s.q + int64_t{i} * padded, count,
                               own ? limits.data() : nullptr, s.part);
      kernels_.merge(count, padded, s.part, offset(s.state, i, padded));
    }
  }

  // A decode row whose KV heads are too few for the threads: partials of many blocks at once, then
  // merged in order. A round bounds the memory.
  void attend_split(const Unit& unit, ThreadPool& pool) const {
    thread_local Scratch state_memory;  // queries of all heads, and their state
    thread_local Buffer partial_memory;
    const int n = params_.q_heads, padded = shape_.padded_dim;
    const Scratch::Views s = state_memory.views(n, padded);
    const size_t floats =
        static_cast<size_t>(kBlocksPerRound * n) * static_cast<size_t>(padded + 2);
    if (partial_memory.bytes() < floats * sizeof(float))
      partial_memory = allocate_host(floats * sizeof(float));
    float* memory = reinterpret_cast<float*>(partial_memory.data());
    // Of one block and head: group_ query vectors.
    const auto partials = [&](int64_t slot, int head) {
      const int64_t i = slot * n + head * group_, count = int64_t{kBlocksPerRound} * n;
      return Partials{memory + i, memory + count + i, memory + 2 * count + i * padded};
    };
    for (int head = 0; head < kv_heads_; ++head)
      load_queries(unit, head, s.q + int64_t{head} * group_ * padded);
    clear(s.state, n, padded);
    const int64_t blocks = own_block(unit) + 1;
    for (int64_t first = 0; first < blocks; first += kBlocksPerRound) {
      const int64_t count = std::min<int64_t>(kBlocksPerRound, blocks - first);
      pool.parallel_for(count * kv_heads_, 1, [&](int64_t begin, int64_t end, int) {
        TileRows rows;
        for (int64_t item = begin; item < end; ++item) {
          const int64_t slot = item % count;
          const int head = static_cast<int>(item / count);
          const Block b = view(unit, first + slot, head, rows);
          kernels_.attend(shape_, b, s.q + int64_t{head} * group_ * padded, group_,
                          partials(slot, head));
        }
      });
      for (int64_t slot = 0; slot < count; ++slot)
        kernels_.merge(n, padded, partials(slot, 0), s.state);
    }
    for (int head = 0; head < kv_heads_; ++head)
      finish(unit, head, offset(s.state, head * group_, padded));
  }

  const AttentionParams& params_;
  const KvLayout& layout_;
  const KvKernels& kernels_;
  const int kv_heads_, group_;
  AttendShape shape_;
};

}  // namespace

void attention(const AttentionParams& params, ThreadPool& pool, CpuIsa isa) {
  if (params.sequences.empty()) return;
  Attention(params, isa).run(pool);
}

}  // namespace kvarn::cpu
