// Decode attention over the page table: one row a sequence, coded and exact pages in one launch.
//
// A thread block takes its share (attention_decode_plan.h) item by item: pages come by bulk copies
// into a ring of slots, item i in slot i % kSlots; its warps take units (an item or a part of one)
// in turn, and whoever finishes an item starts the copy of item i + kSlots. A warp keeps its own
// AttendState. When its next unit is of another list it leaves its state in its area of shared
// memory and goes on; the last warp to leave merges the areas (nobody waits for a slow page). At
// the share's end all warps merge together. Parts of one list meet in global memory: the last
// thread block to arrive merges them in the order of parts, so a plan gives the same bits each
// time. Merged results are rotated back where the pages are coded.
//
// sm_90: cp.async.bulk and mbarrier (PTX ISA). Longer than most files: ring, merges and launcher
// share the layout of one thread block's memory.
#include <cuda_runtime.h>

#include "kernels/attention_cuda.h"
#include "kernels/attention_decode_plan.h"
#include "kernels/attention_decode_tile.cuh"
#include "kernels/core/check.h"
#include "kernels/cuda_check.h"
#include "kernels/device_overlap.cuh"

namespace kvarn::cuda {
namespace {

constexpr int kBlocksPerSm = 1;
constexpr int kHeads = 8;  // query heads of one KV head, padded: N of the MMAs

template <KvFormat kFormat>
struct Config {
  static constexpr KvLayout kLayout = make_kv_layout(kFormat, kCodedHeadDim);
  static constexpr bool kCoded = kFormat != KvFormat::kFp16;
  static constexpr int kVBits = kFormat == KvFormat::kKvarnK4V4 ? 4 : 2;
  static constexpr float kUnit = kCoded ? code_unit(kVBits) : 1.f;  // of AttendState::o
  static constexpr int kWarps = 8;
  static constexpr int kSplit = 1;  // warps that share a page
  // Of a share, kept in shared memory: page ids of the first segment's first items, and the first
  // segments.
  static constexpr int kIds = kFormat == KvFormat::kKvarnK4V2 ? 512 : 128;
  static constexpr int kSegments = kFormat == KvFormat::kKvarnK4V2 ? 32 : 16;
  // As many as fit beside the areas in the 227 KB of a thread block.
  static constexpr int kSlots = kFormat == KvFormat::kKvarnK4V2   ? 14
                                : kFormat == KvFormat::kKvarnK4V4 ? 11
                                                                  : 12;
};

// A state as its lanes hold it.
struct alignas(16) Area {
  float4 o[kTiles][32];
  float4 ml[4];  // of q: m[0], m[1], l[0], l[1]
};

template <typename C>
struct Shared {
  std::byte slots[C::kSlots][C::kLayout.page_bytes];
  Area areas[C::kWarps];
  uint64_t full[C::kSlots];
  // The item whose copy was started last. A barrier tells apart only two successive phases, so its
  // phase is looked at only once the copy of the item in question has started.
  int started[C::kSlots];
  uint32_t users[C::kSlots];  // units of the slot's item that are done
  // Of segment i % kOpen: units done in the low bits, warps that left a state above kMaskShift. A
  // warp leaves before it starts a copy, so open segments lie within kSlots + 1 items.
  static constexpr int kOpen = 16, kMaskShift = 24;
  static_assert(kOpen > C::kSlots + 1 && kMaskShift + C::kWarps <= 32);
  uint32_t left[kOpen];
  uint32_t area_busy[C::kWarps];
  uint32_t arrived_last;
  int32_t ids[C::kIds];
  alignas(16) DecodeSegment segments[C::kSegments];
};

struct Args {
  const __half* q;  // [rows, q_heads, 128]
  __nv_bfloat16* out;
  const BlockPages* block_pages;
  const std::byte* pages;
  const DecodeShare* shares;  // [grid], then segments
  Area* partials;
  uint32_t* arrivals;  // [max_decode_partials], of a list at its first partial; 0 between launches
  int kv_heads, group;
  float score_scale;  // times log2(e)
};

__device__ __forceinline__ uint32_t shared_address(const void* p) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}

__device__ __forceinline__ void wait_for(const uint64_t* barrier, uint32_t parity) {
  asm volatile(
      "{\n .reg .pred done;\nwait:\n mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
      " @!done bra wait;\n}" ::"r"(shared_address(barrier)),
      "r"(parity)
      : "memory");
}

// Pages are read once: they must not push the plan, the queries and the partials out of L2.
__device__ __forceinline__ uint64_t read_once_policy() {
  uint64_t policy;
  asm("createpolicy.fractional.L2::evict_first.b64 %0;" : "=l"(policy));
  return policy;
}

__device__ __forceinline__ void bulk_copy(void* to, const std::byte* from, uint32_t bytes,
                                          uint64_t* barrier, uint64_t policy) {
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], "
      "[%1], %2, [%3], %4;" ::"r"(shared_address(to)),
      "l"(from), "r"(bytes), "r"(shared_address(barrier)), "l"(policy)
      : "memory");
}

// `rows`: 0 for a coded tile.
template <typename C>
__device__ __forceinline__ void start_copy(Shared<C>& shared, int slot, const std::byte* page,
                                           int rows, uint64_t policy) {
  constexpr int kRow = 2 * kCodedHeadDim;  // bytes of K or V
  std::byte* to = shared.slots[slot];
  uint64_t* full = &shared.full[slot];
  const bool whole = rows == 0 || rows == C::kLayout.exact_rows;
  const uint32_t part = rows * kRow;
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(full)),
               "r"(whole ? C::kLayout.page_bytes : 2 * part)
               : "memory");
  if (whole) {
    bulk_copy(to, page, C::kLayout.page_bytes, full, policy);
  } else {  // only the rows in use
    constexpr int kV = C::kLayout.exact_rows * kRow;
    bulk_copy(to, page, part, full, policy);
    bulk_copy(to + kV, page + kV, part, full, policy);
  }
}

// A place in the thread block's share: item numbers run over all its segments. Moves forward only.
// Before the segments are in shared memory (`staged` null) it reads them from the plan.
template <typename C>
class Cursor {
 public:
  __device__ Cursor(const Args& args, const DecodeShare& share, const DecodeSegment* staged)
      : args_(args), share_(share), staged_(staged) {
    enter(0);
  }
  // To the segment of `item`.
  __device__ void seek(int item) {
    while (item >= end_) enter(index_ + 1);
  }
  __device__ DecodeList::Item at(int item) const {
    return decode_list(C::kCoded, C::kLayout.pages_per_exact_block, C::kLayout.exact_rows,
                       position_)
        .item(item - base_, C::kLayout.pages_per_exact_block, C::kLayout.exact_rows);
  }
  __device__ int32_t load_id(int item) const {
    const DecodeList::Item i = at(item);
    return __ldg(&args_.block_pages[first_block_ + i.block][0] + i.page);
  }
  __device__ const std::byte* page(int32_t id) const {
    return args_.pages + (int64_t{id} * args_.kv_heads + head_) * C::kLayout.page_bytes;
  }
  __device__ const DecodeSegment& segment() const { return segment(index_); }
  __device__ int index() const { return index_; }
  __device__ int begin() const { return begin_; }
  __device__ int end() const { return end_; }

 private:
  __device__ const DecodeSegment& segment(int index) const {
    if (staged_ != nullptr && index < C::kSegments) return staged_[index];
    const auto* further = reinterpret_cast<const DecodeSegment*>(args_.shares + gridDim.x);
    return index == 0 ? share_.first : further[share_.rest + index - 1];
  }
  __device__ void enter(int index) {
    const DecodeSegment& s = segment(index);
    index_ = index;
    begin_ = end_;
    base_ = end_ - s.begin;
    end_ += s.end - s.begin;
    position_ = s.position;
    first_block_ = s.first_block;
    head_ = s.head;
  }

  const Args& args_;
  const DecodeShare& share_;
  const DecodeSegment* staged_;
  int index_ = 0, begin_ = 0, base_ = 0, end_ = 0, position_ = 0, first_block_ = 0, head_ = 0;
};

// A query's fragments as they lie in memory. Loading and use are apart, so that a wait for memory
// hides behind the work between.
struct RawQuery {
  uint32_t low[kSteps], high[kSteps];
};

__device__ __forceinline__ void load(const Args& args, const DecodeSegment& segment,
                                     RawQuery& raw) {
  const int lane = threadIdx.x % 32, g = lane / 4, q = lane % 4;
  const int64_t head = int64_t{segment.row} * args.kv_heads * args.group +
                       segment.head * args.group + (g < args.group ? g : 0);
  const auto* from = reinterpret_cast<const uint32_t*>(args.q + head * kCodedHeadDim) + q;
#pragma unroll
  for (int s = 0; s < kSteps; ++s) {
    raw.low[s] = g < args.group ? __ldg(from + 8 * s) : 0;
    raw.high[s] = g < args.group ? __ldg(from + 8 * s + 4) : 0;
  }
}

__device__ __forceinline__ void take(const RawQuery& raw, Query& query) {
#pragma unroll
  for (int s = 0; s < kSteps; ++s) {
    query.low[s] = times(raw.low[s], 0.125f);
    query.low16[s] = times(raw.low[s], 2.f);
    query.high[s] = times(raw.high[s], 0.125f);
  }
}

__device__ __forceinline__ void leave(const AttendState& state, Area& area) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int d = 0; d < kTiles; ++d) {
    area.o[d][lane] = make_float4(state.o[d][0], state.o[d][1], state.o[d][2], state.o[d][3]);
  }
  if (lane < 4) area.ml[lane] = make_float4(state.m[0], state.m[1], state.l[0], state.l[1]);
}

// A sum of states. Every lane knows it for its heads.
struct Merge {
  float m[2] = {-INFINITY, -INFINITY}, l[2] = {};
  __device__ float4 ml() const { return make_float4(m[0], m[1], l[0], l[1]); }
};

template <bool kGlobal>
__device__ __forceinline__ float4 load(const float4* from) {
  return kGlobal ? __ldcg(from) : *from;  // other thread blocks' results: not from L1
}

// Adds channel tiles [first, first + kN) of the states in `present` (bits, up to 8 kGroups) to `o`,
// and all of their m and l to `sums`. Lane 4 i + q works out the weights of state i.
template <bool kGlobal, int kN, int kGroups>
__device__ __forceinline__ void merge_states(const Area* states, uint32_t present, int first,
                                             Merge& sums, float (&o)[kN][4]) {
  const int lane = threadIdx.x % 32, q = lane % 4;
  constexpr bool kAllAhead = kN * kGroups <= 2;  // loads of all states in flight, else of one
  float4 part[kAllAhead ? 8 * kGroups : 1][kN];
  float4 ml[kGroups];
#pragma unroll
  for (int group = 0; group < kGroups; ++group) {
    const int i = 8 * group + lane / 4;
    ml[group] = make_float4(-INFINITY, -INFINITY, 0, 0);
    if (present >> i & 1) ml[group] = load<kGlobal>(&states[i].ml[q]);
  }
  if constexpr (kAllAhead) {
#pragma unroll
    for (int i = 0; i < 8 * kGroups; ++i) {
#pragma unroll
      for (int d = 0; d < kN; ++d) {
        part[i][d] = make_float4(0, 0, 0, 0);
        if (present >> i & 1) part[i][d] = load<kGlobal>(&states[i].o[first + d][lane]);
      }
    }
  }
  float weight[kGroups][2], before[2];
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    float top = h == 0 ? ml[0].x : ml[0].y;
#pragma unroll
    for (int group = 1; group < kGroups; ++group) {
      top = fmaxf(top, h == 0 ? ml[group].x : ml[group].y);
    }
#pragma unroll
    for (int lanes = 4; lanes < 32; lanes *= 2) {
      top = fmaxf(top, __shfl_xor_sync(~0u, top, lanes));
    }
    top = fmaxf(top, sums.m[h]);  // finite: a segment has one row at least
    before[h] = exp2_fast(sums.m[h] - top);
    float l = 0;
#pragma unroll
    for (int group = 0; group < kGroups; ++group) {
      weight[group][h] = exp2_fast((h == 0 ? ml[group].x : ml[group].y) - top);
      l += weight[group][h] * (h == 0 ? ml[group].z : ml[group].w);
    }
#pragma unroll
    for (int lanes = 4; lanes < 32; lanes *= 2) l += __shfl_xor_sync(~0u, l, lanes);
    sums.l[h] = sums.l[h] * before[h] + l;
    sums.m[h] = top;
  }
  each<kN>([&](int d) {
    o[d][0] *= before[0], o[d][1] *= before[1];
    o[d][2] *= before[0], o[d][3] *= before[1];
  });
  const auto add = [&](int i, const float4(&x)[kN], float w0, float w1) {
    const float weight0 = __shfl_sync(~0u, w0, 4 * (i % 8) + q);
    const float weight1 = __shfl_sync(~0u, w1, 4 * (i % 8) + q);
#pragma unroll
    for (int d = 0; d < kN; ++d) {
      o[d][0] = fmaf(weight0, x[d].x, o[d][0]);
      o[d][1] = fmaf(weight1, x[d].y, o[d][1]);
      o[d][2] = fmaf(weight0, x[d].z, o[d][2]);
      o[d][3] = fmaf(weight1, x[d].w, o[d][3]);
    }
  };
  if constexpr (kAllAhead) {
#pragma unroll
    for (int i = 0; i < 8 * kGroups; ++i) add(i, part[i], weight[i / 8][0], weight[i / 8][1]);
  } else {
    static_assert(kGroups == 1);
#pragma unroll 1
    for (int i = 0; i < 8; ++i) {
      if (!(present >> i & 1)) continue;
#pragma unroll
      for (int d = 0; d < kN; ++d) part[0][d] = load<kGlobal>(&states[i].o[first + d][lane]);
      add(i, part[0], weight[0][0], weight[0][1]);
    }
  }
}

// All parts of a cut list, in order.
template <int kN, int kGroups>
__device__ __forceinline__ void merge_parts(const Args& args, const DecodeSegment& segment,
                                            int first, Merge& sums, float (&o)[kN][4]) {
  sums = Merge{};
  each<kN>([&](int d) { o[d][0] = o[d][1] = o[d][2] = o[d][3] = 0; });
  for (int p = 0; p < segment.parts; p += 8 * kGroups) {
    const int n = min(segment.parts - p, 8 * kGroups);
    merge_states<true, kN, kGroups>(args.partials + segment.first_partial + p, (1u << n) - 1, first,
                                    sums, o);
  }
}

__device__ __forceinline__ __nv_bfloat16* out_of(const Args& args, const DecodeSegment& segment,
                                                 int head) {
  return args.out +
         (int64_t{segment.row} * args.kv_heads * args.group + segment.head * args.group + head) *
             kCodedHeadDim;
}

constexpr float kHadamardScale = 0.08838834764831845f;  // 1 / sqrt(128)

// One warp: o / l of all channels, rotated back, to `out`. d = 16 tile + 8 r + g.
template <typename C>
__device__ __forceinline__ void write_alone(const Args& args, const DecodeSegment& segment,
                                            const Merge& sums, float (&o)[kTiles][4]) {
  const int lane = threadIdx.x % 32, g = lane / 4, q = lane % 4;
  const float scale = C::kUnit * (C::kCoded ? kHadamardScale : 1.f);
  const float scale0 = scale / sums.l[0], scale1 = scale / sums.l[1];
  if constexpr (C::kCoded) {
    each<kTiles>([&](int d) {  // bit 3 of the channel
      const float low0 = o[d][0], low1 = o[d][1];
      o[d][0] += o[d][2], o[d][1] += o[d][3];
      o[d][2] = low0 - o[d][2], o[d][3] = low1 - o[d][3];
    });
    each<3>([&](int bit) {  // bits 4 to 6
      each<kTiles / 2>([&](int i) {
        const int low = i % (1 << bit) + (i >> bit << (bit + 1)), high = low + (1 << bit);
        each<4>([&](int c) {
          const float a = o[low][c], b = o[high][c];
          o[low][c] = a + b;
          o[high][c] = a - b;
        });
      });
    });
    each<3>([&](int bit) {  // bits 0 to 2: lanes
      each<4 * kTiles>([&](int i) {
        float& x = o[i / 4][i % 4];
        const float other = __shfl_xor_sync(~0u, x, 4 << bit);
        x = g >> bit & 1 ? other - x : x + other;
      });
    });
  }
  // Transposed: head g, channels 2q and 2q + 1.
  auto* out = reinterpret_cast<uint32_t*>(out_of(args, segment, g)) + q;
#pragma unroll
  for (int d = 0; d < kTiles; ++d) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const __nv_bfloat162 pair =
          __floats2bfloat162_rn(o[d][2 * r] * scale0, o[d][2 * r + 1] * scale1);
      const uint32_t row = transpose_8x8(*reinterpret_cast<const uint32_t*>(&pair));
      if (g < args.group) out[8 * d + 4 * r] = row;
    }
  }
}

// The arrival of one part of a cut list; whether it was the last. One thread calls, after a barrier
// behind all writes of the part.
__device__ __forceinline__ bool arrive(const Args& args, const DecodeSegment& segment) {
  const auto last = static_cast<uint32_t>(segment.parts - 1);
  uint32_t before;
  asm volatile("fence.acq_rel.gpu;" ::: "memory");
  // Wraps to 0 at the last: ready for the next launch.
  asm volatile("atom.relaxed.gpu.global.inc.u32 %0, [%1], %2;"
               : "=r"(before)
               : "l"(args.arrivals + segment.first_partial), "r"(last)
               : "memory");
  asm volatile("fence.acq_rel.gpu;" ::: "memory");
  return before == last;
}

// One warp merges the areas in `mask`, which then are free, and writes the result.
template <typename C>
__device__ __forceinline__ void merge_alone(const Args& args, Shared<C>& shared,
                                            const DecodeSegment& segment, uint32_t mask) {
  const int lane = threadIdx.x % 32;
  Merge sums;
  float o[kTiles][4] = {};
  merge_states<false, kTiles, 1>(shared.areas, mask, 0, sums, o);
  __threadfence_block();
  __syncwarp();
  if (mask >> lane & 1) *const_cast<volatile uint32_t*>(&shared.area_busy[lane]) = 0;
  if (segment.parts > 1) {
    Area& mine = args.partials[segment.partial];
#pragma unroll
    for (int d = 0; d < kTiles; ++d) {
      __stcg(&mine.o[d][lane], make_float4(o[d][0], o[d][1], o[d][2], o[d][3]));
    }
    if (lane < 4) __stcg(&mine.ml[lane], sums.ml());
    __syncwarp();
    bool last = false;
    if (lane == 0) last = arrive(args, segment);
    if (!__shfl_sync(~0u, last, 0)) return;
    merge_parts<kTiles, 1>(args, segment, 0, sums, o);
  }
  write_alone<C>(args, segment, sums, o);
}

// The share's last segment: all warps, a channel tile or more each. Slots and areas are idle.
template <typename C>
__device__ __forceinline__ void merge_together(const Args& args, Shared<C>& shared,
                                               const DecodeSegment& segment, uint32_t mask) {
  constexpr int kTilesOfWarp = kTiles / C::kWarps;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int first = warp * kTilesOfWarp;
  Merge sums;
  float o[kTilesOfWarp][4] = {};
  merge_states<false, kTilesOfWarp, 1>(shared.areas, mask, first, sums, o);
  if (segment.parts > 1) {
    Area& mine = args.partials[segment.partial];
#pragma unroll
    for (int d = 0; d < kTilesOfWarp; ++d) {
      __stcg(&mine.o[first + d][lane], make_float4(o[d][0], o[d][1], o[d][2], o[d][3]));
    }
    if (threadIdx.x < 4) __stcg(&mine.ml[lane], sums.ml());
    __syncthreads();
    if (threadIdx.x == 0) shared.arrived_last = arrive(args, segment);
    __syncthreads();
    if (!shared.arrived_last) return;
    merge_parts<kTilesOfWarp, 2 / kTilesOfWarp>(args, segment, first, sums, o);
  }
  // [tile][lane] in shared memory, then a warp a head: lane i holds channels 4 i to 4 i + 3.
  auto* whole = reinterpret_cast<float4*>(shared.slots);
  const float scale0 = C::kUnit / sums.l[0], scale1 = C::kUnit / sums.l[1];
#pragma unroll
  for (int d = 0; d < kTilesOfWarp; ++d) {
    whole[(first + d) * 32 + lane] =
        make_float4(o[d][0] * scale0, o[d][1] * scale1, o[d][2] * scale0, o[d][3] * scale1);
  }
  __syncthreads();
  for (int head = warp; head < args.group; head += C::kWarps) {
    float x[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int d = 4 * lane + i;
      x[i] = reinterpret_cast<const float*>(
          &whole[d / 16 * 32 + d % 8 * 4 + head / 2])[d / 8 % 2 * 2 + head % 2];
    }
    if constexpr (C::kCoded) {
      const float a = x[0] + x[1], b = x[0] - x[1], c = x[2] + x[3], d = x[2] - x[3];
      x[0] = a + c, x[1] = b + d, x[2] = a - c, x[3] = b - d;
#pragma unroll
      for (int bit = 0; bit < 5; ++bit) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const float other = __shfl_xor_sync(~0u, x[i], 1 << bit);
          x[i] = lane >> bit & 1 ? other - x[i] : x[i] + other;
        }
      }
#pragma unroll
      for (int i = 0; i < 4; ++i) x[i] *= kHadamardScale;
    }
    alignas(8) __nv_bfloat162 pairs[2] = {__floats2bfloat162_rn(x[0], x[1]),
                                          __floats2bfloat162_rn(x[2], x[3])};
    reinterpret_cast<uint2*>(out_of(args, segment, head))[lane] =
        *reinterpret_cast<const uint2*>(pairs);
  }
}

template <typename C>
__device__ __forceinline__ void attend_unit(const std::byte* page, int rows, int part,
                                            const Query& query, float score_scale,
                                            AttendState& state) {
  if (C::kCoded && rows == 0) {
    constexpr int kN = kTiles / C::kSplit;
    attend_coded<C::kVBits, kN>(page, part * kN, query, score_scale, state);
    return;
  }
  constexpr int kExactTiles = (C::kLayout.exact_rows + 15) / 16;
  const uint32_t k = shared_address(page), v = k + 2 * kCodedHeadDim * C::kLayout.exact_rows;
  if constexpr (C::kSplit == 1) {
    attend_exact<kExactTiles>(k, v, 0, rows, query, score_scale, C::kUnit, state);
  } else {
    for (int tile = kExactTiles * part / C::kSplit;
         tile < kExactTiles * (part + 1) / C::kSplit && 16 * tile < rows; ++tile) {
      attend_exact<1>(k, v, tile, rows, query, score_scale, C::kUnit, state);
    }
  }
}

template <typename C>
__global__ void __launch_bounds__(32 * C::kWarps, kBlocksPerSm)
    attention_decode_kernel(const __grid_constant__ Args args) {
#if __CUDA_ARCH__ >= 900
  extern __shared__ __align__(128) std::byte memory[];
  auto& shared = *reinterpret_cast<Shared<C>*>(memory);
  wait_for_kernel_in_front();
  let_next_kernel_begin();
  const DecodeShare& share = args.shares[blockIdx.x];
  const int items = share.items, segments = share.segments, units = items * C::kSplit;
  if (items == 0) return;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const uint64_t policy = read_once_policy();

  // Loads in the order of need, results used later: once the pages' copies start they take all of
  // the memory's attention.
  RawQuery raw;
  if (warp < units) load(args, share.first, raw);
  constexpr int kPieces = sizeof(DecodeSegment) / sizeof(int4);
  static_assert(C::kSegments * kPieces <= 32 * C::kWarps, "a thread stages one piece");
  const bool stages = threadIdx.x < min(segments, C::kSegments) * kPieces;
  int4 piece;
  if (stages) {
    const int i = threadIdx.x / kPieces;
    const auto* further = reinterpret_cast<const DecodeSegment*>(args.shares + gridDim.x);
    const DecodeSegment* from = i == 0 ? &share.first : further + share.rest + i - 1;
    piece = __ldg(reinterpret_cast<const int4*>(from) + threadIdx.x % kPieces);
  }
  const Cursor<C> plan(args, share, nullptr);  // at the first segment
  const int num_ids = min(plan.end(), C::kIds);
  if (warp == 0) {  // fills the ring, a slot a lane
    static_assert(C::kSlots <= 32);
    if (lane < C::kSlots) {
      asm volatile(
          "mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(shared_address(&shared.full[lane]))
          : "memory");
      asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
      if (lane < items) {
        Cursor<C> cursor = plan;
        cursor.seek(lane);
        start_copy(shared, lane, cursor.page(cursor.load_id(lane)), cursor.at(lane).rows, policy);
      }
    }
  } else {  // ids of items that go into the ring later
    constexpr int kThreads = 32 * (C::kWarps - 1), kRounds = (C::kIds + kThreads - 1) / kThreads;
    const int first = C::kSlots + threadIdx.x - 32;
    int32_t ids[kRounds];
#pragma unroll
    for (int r = 0; r < kRounds; ++r) {
      const int i = first + r * kThreads;
      if (i < num_ids) ids[r] = plan.load_id(i);
    }
    if (warp == 1) {
      if (lane < C::kSlots) shared.users[lane] = 0, shared.started[lane] = lane;
      if (lane < shared.kOpen) shared.left[lane] = 0;
      if (lane < C::kWarps) shared.area_busy[lane] = 0;
    }
#pragma unroll
    for (int r = 0; r < kRounds; ++r) {
      const int i = first + r * kThreads;
      if (i < num_ids) shared.ids[i] = ids[r];
    }
  }
  if (stages) reinterpret_cast<int4*>(shared.segments)[threadIdx.x] = piece;
  __syncthreads();

  Cursor<C> here(args, share, shared.segments), ahead = here;
  Query query;
  if (warp < units) {
    here.seek(warp / C::kSplit);
    if (here.index() != 0) load(args, here.segment(), raw);
    take(raw, query);
  }
  AttendState state;
  clear(state);
  int done = 0;  // units of the segment at hand

  // Leaves the state to the last warp that leaves the segment. Returns the warps that have left a
  // state if that is this one, else 0.
  const auto leave_segment = [&] {
    volatile uint32_t* busy = &shared.area_busy[warp];
    while (*busy != 0) {  // an earlier segment's; its last warp is at work
    }
    __threadfence_block();
    leave(state, shared.areas[warp]);
    __threadfence_block();
    __syncwarp();
    uint32_t left = 0;
    if (lane == 0) {
      *busy = 1;
      __threadfence_block();
      const uint32_t mine = (1u << (shared.kMaskShift + warp)) + static_cast<uint32_t>(done);
      uint32_t* counter = &shared.left[here.index() % shared.kOpen];
      left = atomicAdd(counter, mine) + mine;
      const uint32_t units = C::kSplit * (here.end() - here.begin());
      if ((left & ((1u << shared.kMaskShift) - 1)) != units) {
        left = 0;
      } else {
        *counter = 0;
        left >>= shared.kMaskShift;
      }
      __threadfence_block();
    }
    return __shfl_sync(~0u, left, 0);
  };

  for (int unit = warp; unit < units; unit += C::kWarps) {
    const int item = unit / C::kSplit, slot = item % C::kSlots, refill = item + C::kSlots;
    const int following = (unit + C::kWarps) / C::kSplit;  // the warp's next item, if any
    const bool leaving = here.index() + 1 < segments && following >= here.end();
    const bool crossing = leaving && unit + C::kWarps < units;
    if (crossing) {
      Cursor<C> next = here;
      next.seek(following);
      load(args, next.segment(), raw);
    }
    int32_t id = -1;
    if (refill < items) {
      ahead.seek(refill);
      id = refill < num_ids ? shared.ids[refill] : ahead.load_id(refill);
    }
    while (*const_cast<volatile int*>(&shared.started[slot]) != item) {
    }
    wait_for(&shared.full[slot], item / C::kSlots & 1);
    attend_unit<C>(shared.slots[slot], here.at(item).rows, unit % C::kSplit, query,
                   args.score_scale, state);
    ++done;
    uint32_t to_merge = 0;
    if (leaving) to_merge = leave_segment();
    __syncwarp();
    if (lane == 0 && refill < items) {
      bool free = true;
      if constexpr (C::kSplit > 1) {
        __threadfence_block();
        free = atomicInc(&shared.users[slot], C::kSplit - 1) == C::kSplit - 1;
        __threadfence_block();
      }
      if (free) {
        start_copy(shared, slot, ahead.page(id), ahead.at(refill).rows, policy);
        *const_cast<volatile int*>(&shared.started[slot]) = refill;
      }
    }
    if (to_merge != 0) merge_alone<C>(args, shared, here.segment(), to_merge);
    if (crossing) {
      here.seek(following);
      take(raw, query);
      clear(state);
      done = 0;
    }
  }

  // The last segment, by all warps; those that have seen nothing of it only help.
  const bool in_last = here.index() + 1 == segments && done > 0;
  const uint32_t contributed = in_last ? 1u << warp : 0;
  if (in_last) {
    volatile uint32_t* busy = &shared.area_busy[warp];
    while (*busy != 0) {
    }
    __threadfence_block();
    leave(state, shared.areas[warp]);
  }
  if (lane == 0) atomicOr(&shared.left[(segments - 1) % shared.kOpen], contributed);
  __syncthreads();
  const uint32_t mask = shared.left[(segments - 1) % shared.kOpen];
  here.seek(items - 1);
  merge_together<C>(args, shared, here.segment(), mask);
#endif
}

template <KvFormat kFormat>
void launch(cudaStream_t stream, const Args& args, int grid) {
  using C = Config<kFormat>;
  // 227 KB of shared memory a block; 228 KB a multiprocessor, of which each block costs 1 KB more.
  static_assert(sizeof(Shared<C>) <= (kBlocksPerSm == 1 ? 227 * 1024 : 113 * 1024));
  constexpr auto kKernel = attention_decode_kernel<C>;
  static const bool ready = [] {
    CUDA_CHECK(cudaFuncSetAttribute(kKernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                    sizeof(Shared<C>)));
    return true;
  }();
  static_cast<void>(ready);
  LaunchConfig config(stream, static_cast<unsigned>(grid), 32 * C::kWarps, /*overlap=*/true);
  config.value.dynamicSmemBytes = sizeof(Shared<C>);
  CUDA_CHECK(cudaLaunchKernelEx(&config.value, kKernel, args));
}

Buffer allocate_device(size_t bytes) {
  void* data = nullptr;
  CUDA_CHECK(cudaMalloc(&data, bytes));
  return {data, bytes, [](void* p, size_t) { cudaFree(p); }};
}

size_t partial_bytes(int grid) {
  return sizeof(Area) * static_cast<size_t>(max_decode_partials(grid));
}

}  // namespace

DecodeAttention::DecodeAttention(const StepLimits& limits, int num_multiprocessors)
    : limits_(limits), grid_(num_multiprocessors * kBlocksPerSm) {
  const size_t counters = sizeof(uint32_t) * static_cast<size_t>(max_decode_partials(grid_));
  scratch_ = allocate_device(partial_bytes(grid_) + counters);
  CUDA_CHECK(cudaMemset(scratch_.data() + partial_bytes(grid_), 0, counters));
}

size_t DecodeAttention::max_plan_bytes() const {
  return max_decode_plan_bytes(grid_, limits_.max_sequences, limits_.kv_heads);
}

size_t DecodeAttention::plan(std::span<const AttentionSequence> decodes, std::byte* plan) const {
  CHECK(decodes.size() <= static_cast<size_t>(limits_.max_sequences),
        "attention_decode: no more sequences than the limit");
  return plan_decode(limits_.layout, limits_.kv_heads, grid_, decodes, plan);
}

void DecodeAttention::run(cudaStream_t stream, const AttentionParams& params,
                          const std::byte* plan) {
  const KvLayout& layout = params.layer.layout;
  CHECK(layout.format == limits_.layout.format && layout.head_dim == kCodedHeadDim,
        "attention_decode: pages of the planned format, head_dim 128");
  CHECK(params.layer.kv_heads == limits_.kv_heads && params.q_heads % limits_.kv_heads == 0,
        "attention_decode: q_heads is a multiple of the planned kv_heads");
  const int group = params.q_heads / params.layer.kv_heads;
  CHECK(group >= 1 && group <= kHeads, "attention_decode: at most 8 query heads for a KV head");
  CHECK(params.q.dtype() == DType::kF16 && params.q.dims() == 3 &&
            params.q.dim(1) == params.q_heads && params.q.dim(2) == kCodedHeadDim,
        "attention_decode: q is f16 [rows, q_heads, 128]");
  CHECK(params.out.dtype() == DType::kBF16 && params.out.size() == params.q.size(),
        "attention_decode: out is bf16 [rows, q_heads * 128]");
  if (params.sequences.empty()) return;
  constexpr float kLog2E = 1.4426950408889634f;
  auto* partials = reinterpret_cast<Area*>(scratch_.data());
  const Args args{params.q.empty() ? nullptr : static_cast<const __half*>(params.q.raw()),
                  static_cast<__nv_bfloat16*>(params.out.raw()),
                  params.block_pages,
                  params.layer.data,
                  reinterpret_cast<const DecodeShare*>(plan),
                  partials,
                  reinterpret_cast<uint32_t*>(scratch_.data() + partial_bytes(grid_)),
                  params.layer.kv_heads,
                  group,
                  params.scale * kLog2E};
  switch (layout.format) {
    case KvFormat::kFp16:
      return launch<KvFormat::kFp16>(stream, args, grid_);
    case KvFormat::kKvarnK4V2:
      return launch<KvFormat::kKvarnK4V2>(stream, args, grid_);
    case KvFormat::kKvarnK4V4:
      return launch<KvFormat::kKvarnK4V4>(stream, args, grid_);
  }
}

}  // namespace kvarn::cuda
