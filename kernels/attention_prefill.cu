// PrefillAttention on the host: which query tiles and which blocks a step has, and in which order
// the launches run. Sequences share the scratch as long as they fit into it together; each such
// group is one expand() and one attention launch, so a later group may overwrite the scratch.
#include <algorithm>
#include <numeric>

#include "kernels/attention_cuda.h"
#include "kernels/attention_prefill.h"
#include "kernels/cuda_check.h"

namespace kvarn::cuda {
namespace {

using prefill::ExpandTile;
using prefill::kHeadDim;
using prefill::kTile;
using prefill::QueryTile;

// Key tiles are whole blocks, read by position or from the chunk's rows; a window of exact tiles
// would need a third source.
static_assert(kWindowTokens == 0, "prefill attention knows the reading rule without a window");

int blocks_for(int64_t positions) { return static_cast<int>((positions + kTile - 1) / kTile); }

// A row that does not begin its block: its block's earlier rows are in exact pages.
bool is_late(const AttentionSequence& s) { return s.first_position % kTile != 0; }

int query_tiles_of(const AttentionSequence& s) { return blocks_for(s.num_rows); }

// Which blocks are put into scratch.
struct ScratchRule {
  bool coded;  // the layout

  // Blocks [0, n) of a sequence have places in scratch: those before its last query tile.
  int tiles_of(const AttentionSequence& s) const {
    if (s.num_rows == 0) return 0;
    return (s.first_position + s.num_rows - 1) / kTile + (is_late(s) ? 1 : 0);
  }
  bool expands(const AttentionSequence& s, int block) const {
    return kTile * block < s.first_position || (coded && block >= kSinkBlocks);
  }
  int expand_tiles_of(const AttentionSequence& s) const {
    int count = 0;
    for (int block = 0; block < tiles_of(s); ++block) count += expands(s, block);
    return count;
  }
  ExpandTile expand_tile(const AttentionSequence& s, int block, int scratch_tile) const {
    const int start = kTile * block;
    const bool own = is_late(s) && block == s.first_position / kTile;
    const bool exact = own || !coded || block < kSinkBlocks;
    return {s.first_block + block, scratch_tile,
            exact ? std::min(kTile, s.first_position - start) : -1, own ? s.first_row : -1,
            start >= s.first_position};
  }
};

// Sequences [first, end) whose blocks fit into scratch together.
struct Group {
  size_t first, end;
  int query_tiles, expand_tiles;
};
Group next_group(std::span<const AttentionSequence> chunks, size_t first, int scratch_tiles,
                 const ScratchRule& rule) {
  Group group{first, first, 0, 0};
  for (int left = scratch_tiles; group.end < chunks.size(); ++group.end) {
    const AttentionSequence& s = chunks[group.end];
    left -= rule.tiles_of(s);
    if (left < 0) break;
    group.query_tiles += query_tiles_of(s);
    group.expand_tiles += rule.expand_tiles_of(s);
  }
  CHECK(group.end > first, "prefill attention: a sequence is longer than max_model_len");
  return group;
}

Buffer allocate_device(size_t bytes) {
  void* data = nullptr;
  CUDA_CHECK(cudaMalloc(&data, bytes));
  return {data, bytes, [](void* p, size_t) { cudaFree(p); }};
}

}  // namespace

PrefillAttention::PrefillAttention(const StepLimits& limits, int num_multiprocessors,
                                   PrefillKernel kernel)
    : limits_(limits), num_multiprocessors_(num_multiprocessors) {
  CHECK(limits.head_dim == kHeadDim && limits.layout.head_dim == kHeadDim,
        "prefill attention: head_dim is 128");
  CHECK(limits.kv_heads > 0 && limits.q_heads % limits.kv_heads == 0,
        "prefill attention: q_heads is a multiple of kv_heads");
  scratch_tiles_ = blocks_for(limits.max_model_len);
  // K and V, 256 bytes a row: 67 MB for 16K positions of 8 KV heads.
  scratch_ = allocate_device(size_t{2} * static_cast<size_t>(scratch_tiles_) * kTile *
                             static_cast<size_t>(limits.kv_heads) * kHeadDim * 2);
  counter_ = allocate_device(sizeof(int));
  CUDA_CHECK(cudaMemset(counter_.data(), 0, sizeof(int)));
  CUDA_CHECK(cudaDeviceSynchronize());
  use_wgmma_ = kernel == PrefillKernel::kBest && prefill::wgmma_available();
}

size_t PrefillAttention::max_plan_bytes() const {
  const auto query_tiles = static_cast<size_t>(limits_.max_rows / kTile + limits_.max_sequences);
  return query_tiles * sizeof(QueryTile) +
         static_cast<size_t>(limits_.max_blocks) * sizeof(ExpandTile);
}

// Query tiles of all groups, then blocks to expand of all groups.
size_t PrefillAttention::plan(std::span<const AttentionSequence> chunks, std::byte* plan) const {
  const ScratchRule rule{limits_.layout.coded()};
  int all_query_tiles = 0;
  for (const AttentionSequence& s : chunks) {
    CHECK(s.num_rows <= 1 || !is_late(s), "prefill attention: a chunk starts at a block border");
    all_query_tiles += query_tiles_of(s);
  }
  auto* query_tiles = reinterpret_cast<QueryTile*>(plan);
  auto* const first_expand = reinterpret_cast<ExpandTile*>(query_tiles + all_query_tiles);
  auto* expand_tiles = first_expand;
  for (size_t first = 0; first < chunks.size();) {
    const Group group = next_group(chunks, first, scratch_tiles_, rule);
    QueryTile* const group_tiles = query_tiles;
    int scratch_tile = 0;
    for (size_t i = group.first; i < group.end; ++i) {
      const AttentionSequence& s = chunks[i];
      for (int row = 0; row < s.num_rows; row += kTile) {
        *query_tiles++ = {s.first_row + row, std::min(kTile, s.num_rows - row),
                          s.first_position + row, s.first_position / kTile, scratch_tile};
      }
      for (int block = 0; block < rule.tiles_of(s); ++block) {
        if (rule.expands(s, block)) {
          *expand_tiles++ = rule.expand_tile(s, block, scratch_tile + block);
        }
      }
      scratch_tile += rule.tiles_of(s);
    }
    // The longest first: the last blocks of a launch to start should be the shortest.
    std::sort(group_tiles, query_tiles, [](const QueryTile& a, const QueryTile& b) {
      const int blocks_a = a.position / kTile, blocks_b = b.position / kTile;
      return blocks_a != blocks_b ? blocks_a > blocks_b : a.first_row < b.first_row;
    });
    first = group.end;
  }
  return static_cast<size_t>(reinterpret_cast<std::byte*>(expand_tiles) - plan);
}

void PrefillAttention::run(cudaStream_t stream, const AttentionParams& params,
                           std::span<const AttentionSequence> chunks, const std::byte* plan) {
  const int64_t rows = params.q.dims() == 3 ? params.q.dim(0) : -1;
  const int kv_heads = params.layer.kv_heads;
  CHECK(params.q_heads == limits_.q_heads && kv_heads == limits_.kv_heads &&
            params.layer.layout.format == limits_.layout.format,
        "prefill attention: the shape that the limits gave");
  CHECK(rows >= 0 && params.q.dtype() == DType::kF16 && params.q.dim(1) == params.q_heads &&
            params.q.dim(2) == kHeadDim,
        "prefill attention: q is f16 [rows, q_heads, 128]");
  for (const Tensor& t : {params.k_rows, params.v_rows}) {
    CHECK(t.dims() == 3 && t.dim(0) == rows && t.dim(1) == kv_heads && t.dim(2) == kHeadDim &&
              t.dtype() == DType::kF16,
          "prefill attention: k_rows and v_rows are f16 [rows, kv_heads, 128]");
  }
  CHECK(params.out.dtype() == DType::kBF16 && params.out.size() == params.q.size(),
        "prefill attention: out is bf16 [rows, q_heads * 128]");
  const bool coded = params.layer.layout.coded();
  const ScratchRule rule{coded};
  const size_t half_scratch = scratch_.bytes() / 2;
  prefill::Arguments a{};
  a.q = params.q.raw();
  a.k_rows = params.k_rows.raw();
  a.v_rows = params.v_rows.raw();
  a.k_scratch = scratch_.data();
  a.v_scratch = scratch_.data() + half_scratch;
  a.out = params.out.raw();
  a.rows = rows;
  a.scratch_rows = int64_t{scratch_tiles_} * kTile;
  a.q_heads = params.q_heads;
  a.kv_heads = kv_heads;
  a.scale = params.scale;
  a.rotate = coded;
  a.chunk_exact = !coded || params.rule == ReadingRule::kChunkStart;
  a.layout = params.layer.layout;
  a.pages = params.layer.data;
  a.block_pages = params.block_pages;

  const int all_query_tiles =
      std::accumulate(chunks.begin(), chunks.end(), 0, [](int n, const AttentionSequence& s) {
        CHECK(s.first_row >= 0 && s.num_rows >= 0, "prefill attention: rows of this step");
        return n + query_tiles_of(s);
      });
  a.query_tiles = reinterpret_cast<const QueryTile*>(plan);
  a.expand_tiles = reinterpret_cast<const ExpandTile*>(a.query_tiles + all_query_tiles);
  for (size_t first = 0; first < chunks.size();) {
    const Group group = next_group(chunks, first, scratch_tiles_, rule);
    for (size_t i = group.first; i < group.end; ++i) {
      CHECK(chunks[i].first_row + chunks[i].num_rows <= rows,
            "prefill attention: a sequence's rows are rows of this step");
    }
    a.num_query_tiles = group.query_tiles;
    a.num_expand_tiles = group.expand_tiles;
    prefill::launch_expand(stream, a);
    if (use_wgmma_) {
      prefill::launch_wgmma(stream, a, reinterpret_cast<int*>(counter_.data()),
                            num_multiprocessors_);
    } else {
      prefill::launch_mma(stream, a);
    }
    a.query_tiles += group.query_tiles;
    a.expand_tiles += group.expand_tiles;
    first = group.end;
  }
}

}  // namespace kvarn::cuda
