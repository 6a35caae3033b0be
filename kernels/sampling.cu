// sample_row() (sampling.h) on the GPU. A cluster of thread blocks takes a row: each block keeps
// its slice of the logits in shared memory, so global memory is read once, and every later pass
// (rules, sums, searches for a cut, the walk of the draw) runs on chip. Blocks exchange one value a
// warp through distributed shared memory. The logits themselves are not changed.
//
// Nothing is sorted but short lists of candidates. top_k up to the number of warps of a cluster,
// and the tokens of top_logprobs: the k-th largest of the warps' maxima bounds the k-th largest
// logit from below; what reaches it is gathered into one block. Everything else (nucleus over the
// whole row, large top_k, thousands of ties): a radix search over histograms of count and weight.
//
// Invariant: a row's result depends on its logits and its SamplingRow alone (sampling_device.cuh).
// Clusters and distributed shared memory are of compute capability 9.0 (PTX ISA, "Cluster of
// Cooperative Thread Arrays"); prepare_sampling() refuses less.
//
// One kernel over 400 lines: its phases share the slice, the exchange table and the work area, and
// are one class so that this sharing can be read in one place.
#include <cooperative_groups.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <cstddef>
#include <stdexcept>

#include "kernels/core/check.h"
#include "kernels/cuda_check.h"
#include "kernels/philox.h"
#include "kernels/sampling_device.cuh"
#include "kernels/sampling_step_cuda.h"

namespace kvarn::cuda {
namespace {

namespace cg = cooperative_groups;

constexpr int kStep = 128;          // logits a warp takes at once: four a lane
constexpr int kLoads = 5;           // 16-byte loads of a thread in flight: 80 KB an SM
constexpr int kBuckets = 512;       // of a histogram
constexpr int kCountWindow = 1024;  // distinct output tokens counted in one walk of the list
constexpr int kNucleusGuess = 64;   // tokens a nucleus is looked for in, before the whole row

// Count and weight of the tokens in each bucket, the weight in two words: shared memory adds words.
struct Histogram {
  uint32_t count[kBuckets], weight_low[kBuckets], weight_high[kBuckets];
};
struct HistogramSums {  // over the cluster
  uint64_t weight[kBuckets];
  uint32_t count[kBuckets];
};

constexpr int slice_of(int vocab, int ctas) {
  const int share = (vocab + ctas - 1) / ctas;
  return (share + kStep - 1) / kStep * kStep;
}
constexpr int max_candidates(int threads) { return 2 * threads; }
// The work area holds one of: candidates; a histogram and its sums; the marks of the penalties (two
// bits a token, marks before each word) and a window of counts.
constexpr int work_bytes(int slice, int threads) {
  const int histogram = static_cast<int>(sizeof(Histogram) + sizeof(HistogramSums));
  const int marks = slice / 32 * 12 + kCountWindow * 4;
  return std::max({histogram, marks, max_candidates(threads) * 8}) / 16 * 16 + 16;
}
// A block that sorts candidates keeps a second copy of them where its slice was.
constexpr int slice_bytes(int slice, int threads) {
  return std::max(slice * 4, max_candidates(threads) * 8);
}

// Tokens that are drawn from: logit above `logit`, or equal to it and id up to `token`. A rank
// between those of tokens may stand for any 32-bit id.
struct Cut {
  float logit;
  uint32_t token;
  __device__ bool keeps(float x, int32_t id) const {
    return x > logit || (x == logit && static_cast<uint32_t>(id) <= token);
  }
};

struct Selection {
  uint64_t rank;    // of the last token selected, or below it and above the next
  uint64_t weight;  // of all tokens selected
};

template <int kCtas, int kThreads>
class RowSampler {
 public:
  static constexpr int kWarps = kThreads / 32;
  static constexpr int kSlots = kCtas * kWarps;  // of an exchange: one a warp of the cluster
  static constexpr int kLaneSlots = kSlots / 32;
  static constexpr int kMaxCandidates = max_candidates(kThreads);
  using Block = BlockTeam<kWarps>;

  struct Shared {
    uint64_t slots[2][kSlots];
    uint64_t partials[kWarps];
    uint64_t found[4];  // what one thread found out for its team
    DeviceSamplingRow row;
  };

  __device__ RowSampler(const SamplingLaunch& launch, int row, Shared& shared, std::byte* dynamic)
      : launch_(launch),
        source_(launch.rows[row]),
        raw_(launch.logits + int64_t{row} * launch.vocab),
        result_(launch.results[row]),
        shared_(shared),
        row_(shared.row),
        block_{shared.partials},
        cta_(static_cast<int>(cluster_.block_rank())),
        lane_(static_cast<int>(threadIdx.x % 32)),
        warp_(static_cast<int>(threadIdx.x / 32)),
        slice_size_(slice_of(launch.vocab, kCtas)),
        base_(cta_ * slice_size_),
        first_step_(warp_ * (slice_size_ / kStep) / kWarps),
        last_step_((warp_ + 1) * (slice_size_ / kStep) / kWarps),
        slice_(reinterpret_cast<float*>(dynamic)),
        work_(reinterpret_cast<uint64_t*>(dynamic + slice_bytes(slice_size_, kThreads))) {}

  __device__ void run() {
    cluster_.barrier_arrive();  // every block has started before one writes into another
    constexpr int kRowWords = sizeof(DeviceSamplingRow) / sizeof(uint32_t);
    static_assert(kRowWords <= kThreads);
    if (threadIdx.x < kRowWords) {  // read by all after the first exchange
      reinterpret_cast<uint32_t*>(&shared_.row)[threadIdx.x] =
          reinterpret_cast<const uint32_t*>(&source_)[threadIdx.x];
    }
    uint64_t best = launch_.vocab % 4 == 0 ? load<true>() : load<false>();
    cluster_.barrier_wait();
    best = exchange_max(best);
    if (row_.num_logprobs >= 0) {
      if (!is_finite(best)) return fail();
      report_logprobs(key_logit(rank_key(best)));
    }
    if (has_rules()) {
      __syncthreads();
      apply_rules();
      __syncthreads();
      best = exchange_max(scan());
    }
    if (!is_finite(best)) return fail();
    if (row_.greedy != 0) {
      if (cta_ == 0 && threadIdx.x == 0) choose(rank_token(best));
      return;
    }
    draw(best);
  }

 private:
  // --- the slice -------------------------------------------------------------------------------

  // Calls fn(first id of four, the four logits) for the steps of this warp.
  template <typename Fn>
  __device__ void for_each(Fn fn) const {
    for (int step = first_step_; step < last_step_; ++step) {
      const int at = step * kStep + lane_ * 4;
      fn(base_ + at, *reinterpret_cast<const float4*>(slice_ + at));
    }
  }

  static __device__ float max_of(const float4& x) {
    return fmaxf(fmaxf(x.x, x.y), fmaxf(x.z, x.w));
  }

  // The first of the largest logits of a lane, and whether it saw a NaN (which fmaxf passes over).
  struct Best {
    float logit = -INFINITY;
    int32_t token = 0;  // first of the four
    bool nan = false;
    __device__ void take(int32_t first, const float4& x) {
      const float largest = max_of(x);
      if (largest > logit) logit = largest, token = first;
      // The sum is NaN if one of them is; rarely else (infinities), so look again.
      const float sum = (x.x + x.y) + (x.z + x.w);
      if (sum != sum) nan |= x.x != x.x || x.y != x.y || x.z != x.z || x.w != x.w;
    }
  };
  __device__ uint64_t rank_of_best(const Best& best) const {
    if (best.nan) return kNaNRank;
    const float4 x = *reinterpret_cast<const float4*>(slice_ + (best.token - base_));
    const int place = x.x == best.logit ? 0 : x.y == best.logit ? 1 : x.z == best.logit ? 2 : 3;
    return rank_of(order_key(best.logit), best.token + place);
  }

  // Fills the slice, -inf beyond the vocabulary. Returns the rank of this lane's first token.
  template <bool kAligned>
  __device__ uint64_t load() {
    const float* source = raw_ + base_;
    const int count = min(slice_size_, launch_.vocab - base_);  // may be negative
    Best best{-INFINITY, base_ + lane_ * 4};
    for (int step = first_step_; step < last_step_; step += kLoads) {
      float4 x[kLoads];
#pragma unroll
      for (int i = 0; i < kLoads; ++i) {
        const int at = (step + i) * kStep + lane_ * 4;
        x[i] = {-INFINITY, -INFINITY, -INFINITY, -INFINITY};
        if (step + i >= last_step_) continue;
        if constexpr (kAligned) {
          if (at < count) x[i] = __ldcs(reinterpret_cast<const float4*>(source + at));
        } else {
          if (at < count) x[i].x = source[at];
          if (at + 1 < count) x[i].y = source[at + 1];
          if (at + 2 < count) x[i].z = source[at + 2];
          if (at + 3 < count) x[i].w = source[at + 3];
        }
      }
#pragma unroll
      for (int i = 0; i < kLoads; ++i) {
        if (step + i >= last_step_) continue;
        const int at = (step + i) * kStep + lane_ * 4;
        *reinterpret_cast<float4*>(slice_ + at) = x[i];
        best.take(base_ + at, x[i]);
      }
    }
    return rank_of_best(best);
  }

  __device__ uint64_t scan() const {
    Best best{-INFINITY, base_ + lane_ * 4};
    for_each([&](int32_t first, const float4& x) { best.take(first, x); });
    return rank_of_best(best);
  }

  static __device__ bool is_finite(uint64_t best) {
    return rank_key(best) > kMinusInfKey && rank_key(best) < kPlusInfKey;
  }

  // --- exchange between the warps of the cluster -----------------------------------------------

  // Gives `value` (of lane 0) of every warp of the cluster to all of them, in order of ids. What is
  // read stands until this thread enters the next exchange. A barrier of the cluster.
  __device__ void exchange(uint64_t value) {
    phase_ ^= 1;
    value = __shfl_sync(kFullWarp, value, 0);
    uint64_t* slot = &shared_.slots[phase_][cta_ * kWarps + warp_];
    if (lane_ < kCtas) *cluster_.map_shared_rank(slot, lane_) = value;
    cluster_.sync();
    for (int i = 0; i < kLaneSlots; ++i) values_[i] = shared_.slots[phase_][lane_ * kLaneSlots + i];
  }
  __device__ uint64_t exchange_max(uint64_t lane_value) {
    exchange(warp_max(lane_value));
    uint64_t best = 0;
    for (int i = 0; i < kLaneSlots; ++i) {
      best_keys_[i] = rank_key(values_[i]);
      best = max(best, values_[i]);
    }
    return warp_max(best);
  }
  // Sums are fp32 within a lane (forty terms), whose tokens never change, and integers from there.
  __device__ uint64_t exchange_sum(float lane_value) {
    exchange(warp_sum(fixed_point(lane_value)));
    uint64_t sum = 0;
    for (int i = 0; i < kLaneSlots; ++i) sum += values_[i];
    return warp_sum(sum);
  }

  // --- logprobs --------------------------------------------------------------------------------

  // The weight of this lane's tokens that `cut` keeps. kTies: cut.token matters.
  template <bool kTies>
  __device__ float lane_weight(WeightScale scale, float temperature, Cut cut) const {
    const float least = fmaxf(cut.logit, scale.max - kLastWeight * temperature);
    float sum = 0.f;
    for_each([&](int32_t first, const float4& x) {
      if (!(max_of(x) >= least)) return;
      const float logits[4] = {x.x, x.y, x.z, x.w};
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const bool kept = kTies ? cut.keeps(logits[i], first + i) : logits[i] >= cut.logit;
        sum += kept ? scale.weight(logits[i]) : 0.f;
      }
    });
    return sum;
  }

  __device__ void report_logprobs(float max_logit) {
    const auto scale = WeightScale::of(max_logit, 1.f);
    const uint64_t total = exchange_sum(lane_weight<false>(scale, 1.f, {-INFINITY, UINT32_MAX}));
    normalizer_ = max_logit + logf(static_cast<float>(total) * 0x1p-40f);
    const int wanted = min(row_.num_logprobs, launch_.vocab);
    if (wanted == 0) {
      if (cta_ == 0 && threadIdx.x == 0) result_.num_top = 0;
      return;
    }
    uint32_t found = gather({bound_of(wanted), UINT32_MAX});
    if (found > kMaxCandidates) {  // ties beyond number: find the exact cut
      const Selection top =
          select(scale, rank_at_least(-INFINITY), rank_of(order_key(max_logit), 0), {wanted});
      found = gather(cut_at(top.rank));
    }
    if (cta_ != 0) return;
    if (found <= 2 * WarpTeam::kSize) {
      if (warp_ == 0) report_candidates(WarpTeam{}, static_cast<int>(found), wanted);
    } else {
      report_candidates(block_, static_cast<int>(found), wanted);
    }
    __syncthreads();  // the work area is free again
  }

  template <typename Team>
  __device__ void report_candidates(const Team& team, int found, int wanted) {
    sort_candidates(team, found);
    const int num_top = min(wanted, found);
    if (threadIdx.x == 0) result_.num_top = num_top;
    for (int i = static_cast<int>(threadIdx.x); i < num_top; i += Team::kSize) {
      result_.top_tokens[i] = rank_token(work_[i]);
      result_.top_logprobs[i] = key_logit(rank_key(work_[i])) - normalizer_;
    }
  }

  // --- candidates ------------------------------------------------------------------------------

  static __device__ uint64_t rank_at_least(float logit) {
    return uint64_t{max(order_key(logit), kLowestKey)} << 32;
  }
  static __device__ Cut cut_at(uint64_t rank) {
    return {key_logit(rank_key(rank)), static_cast<uint32_t>(rank_token(rank))};
  }

  // A bound from below of the logit of the count-th token. Each warp has the maximum of its own
  // tokens: `count` maxima reach the bound. Never below the lowest finite number.
  __device__ float bound_of(int count) const {
    uint32_t bound = 0;
    constexpr int kLowestBit = 12;  // the rest of the mantissa would exclude next to nothing
    for (int bit = 31; bit >= kLowestBit; --bit) {
      const uint32_t raised = bound | 1u << bit;
      int reaching = 0;
      for (int i = 0; i < kLaneSlots; ++i) {
        reaching += __popc(__ballot_sync(kFullWarp, best_keys_[i] >= raised));
      }
      if (reaching >= count) bound = raised;
    }
    return key_logit(max(bound, kLowestKey));
  }

  // Writes the ranks of the tokens that `cut` keeps, in order of ids, into the work area of block
  // 0, unless they are more than kMaxCandidates. Returns their number.
  __device__ uint32_t gather(Cut cut) {
    static_assert(slice_of(kMaxSamplingVocab, kCtas) / kStep / kWarps < 32);  // bits of `hits`
    uint32_t hits = 0, count = 0;
    for (int step = first_step_; step < last_step_; ++step) {
      const int at = step * kStep + lane_ * 4;
      const float4 x = *reinterpret_cast<const float4*>(slice_ + at);
      if (!(max_of(x) >= cut.logit)) continue;
      const int kept = cut.keeps(x.x, base_ + at) + cut.keeps(x.y, base_ + at + 1) +
                       cut.keeps(x.z, base_ + at + 2) + cut.keeps(x.w, base_ + at + 3);
      count += static_cast<uint32_t>(kept);
      if (kept > 0) hits |= 1u << (step - first_step_);
    }
    hits = __reduce_or_sync(kFullWarp, hits);
    exchange(__reduce_add_sync(kFullWarp, count));
    const int own = cta_ * kWarps + warp_;
    uint32_t total = 0, place = 0;
    for (int i = 0; i < kLaneSlots; ++i) {
      const auto value = static_cast<uint32_t>(values_[i]);
      total += value;
      if (lane_ * kLaneSlots + i < own) place += value;
    }
    total = __reduce_add_sync(kFullWarp, total);
    if (total > kMaxCandidates) return total;

    place = __reduce_add_sync(kFullWarp, place);
    uint64_t* target = cluster_.map_shared_rank(work_, 0);
    for (; hits != 0; hits &= hits - 1) {
      const int at = (first_step_ + __ffs(static_cast<int>(hits)) - 1) * kStep + lane_ * 4;
      uint32_t own_place = place;
      bool kept[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        kept[i] = cut.keeps(slice_[at + i], base_ + at + i);
        const uint32_t taking = __ballot_sync(kFullWarp, kept[i]);
        own_place += static_cast<uint32_t>(__popc(taking & lanes_below()));
        place += static_cast<uint32_t>(__popc(taking));
      }
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        if (kept[i]) target[own_place++] = rank_of(order_key(slice_[at + i]), base_ + at + i);
      }
    }
    cluster_.sync();
    return total;
  }

  // Block 0 alone: work_[0, found) in descending order, zeros up to a power of two of at least 2.
  template <typename Team>
  __device__ void sort_candidates(const Team& team, int found) {
    const int size = found <= 2 ? 2 : 1 << (32 - __clz(found - 1));
    for (int i = static_cast<int>(threadIdx.x) + found; i < size; i += Team::kSize) work_[i] = 0;
    team.sync();
    sort_descending(team, work_, size);
  }

  // --- search for a cut ------------------------------------------------------------------------

  // What a selection has to reach: a number of tokens, or a weight.
  struct Aim {
    int64_t count;
    double weight = 0;  // used where count is 0
    __device__ bool reached(uint64_t tokens, uint64_t sum) const {
      return count > 0 ? tokens >= static_cast<uint64_t>(count)
                       : static_cast<double>(sum) >= weight;
    }
  };

  // The first tokens, in order of rank, that reach the aim, among those of ranks [low, high]; all
  // of these if they do not. Nine bits of the range a level; a rank belongs to one token, so at the
  // last level the bucket is one token.
  __device__ Selection select(WeightScale scale, uint64_t low, uint64_t high, Aim aim) {
    auto& own = *reinterpret_cast<Histogram*>(work_);
    auto& sums = *reinterpret_cast<HistogramSums*>(&own + 1);
    uint64_t tokens = 0, weight = 0;  // above `high`
    for (;;) {
      const int bits = 64 - __clzll(static_cast<long long>(high - low));
      const int shift = max(bits - 9, 0);
      for (int i = static_cast<int>(threadIdx.x); i < kBuckets; i += kThreads) {
        own.count[i] = own.weight_low[i] = own.weight_high[i] = 0;
      }
      __syncthreads();
      const float least = key_logit(rank_key(low)), most = key_logit(rank_key(high));
      for_each([&](int32_t first, const float4& x) {
        if (!(max_of(x) >= least)) return;
        const float logits[4] = {x.x, x.y, x.z, x.w};
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          if (!(logits[i] >= least && logits[i] <= most)) continue;
          const uint64_t rank = rank_of(order_key(logits[i]), first + i);
          if (rank < low || rank > high) continue;
          const auto bucket = static_cast<int>((rank - low) >> shift);
          const uint64_t w = fixed_point(scale.weight(logits[i]));
          const auto w_low = static_cast<uint32_t>(w);
          atomicAdd(&own.count[bucket], 1u);
          const uint32_t sum_low = atomicAdd(&own.weight_low[bucket], w_low) + w_low;
          const uint32_t carry = static_cast<uint32_t>(w >> 32) + (sum_low < w_low ? 1u : 0u);
          if (carry != 0) atomicAdd(&own.weight_high[bucket], carry);
        }
      });
      cluster_.sync();
      add_histograms(own, sums);
      cluster_.sync();

      // Thread t takes its buckets from 511 - kEach * t down: in order of rank.
      constexpr int kEach = kBuckets / kThreads;
      static_assert(kEach >= 1 && kBuckets % kThreads == 0);
      const int top = kBuckets - 1 - kEach * static_cast<int>(threadIdx.x);
      uint64_t own_tokens = 0, own_weight = 0;
      for (int i = 0; i < kEach; ++i) {
        own_tokens += sums.count[top - i];
        own_weight += sums.weight[top - i];
      }
      uint64_t sum_tokens = tokens + block_.inclusive_sum(own_tokens);
      uint64_t sum_weight = weight + block_.inclusive_sum(own_weight);
      const int owner = __syncthreads_count(!aim.reached(sum_tokens, sum_weight));
      if (static_cast<int>(threadIdx.x) == min(owner, kThreads - 1)) {
        int i = kEach - 1;  // back to the first bucket that reaches the aim
        while (owner < kThreads && i > 0 &&
               aim.reached(sum_tokens - sums.count[top - i], sum_weight - sums.weight[top - i])) {
          sum_tokens -= sums.count[top - i];
          sum_weight -= sums.weight[top - i];
          --i;
        }
        shared_.found[0] = sum_tokens;
        shared_.found[1] = sum_weight;
        shared_.found[2] = static_cast<uint64_t>(top - i);
      }
      __syncthreads();
      if (owner == kThreads) return {low, shared_.found[1]};
      const auto bucket = static_cast<int>(shared_.found[2]);
      low += static_cast<uint64_t>(bucket) << shift;
      if (shift == 0 || sums.count[bucket] == 1) return {low, shared_.found[1]};
      high = min(high, low + ((uint64_t{1} << shift) - 1));
      tokens = shared_.found[0] - sums.count[bucket];
      weight = shared_.found[1] - sums.weight[bucket];
    }
  }

  // Each block adds up its share of the buckets over all blocks and gives it to all.
  __device__ void add_histograms(Histogram& own, HistogramSums& sums) {
    constexpr int kShare = kBuckets / kCtas, kLanes = kThreads / kShare;
    static_assert(kLanes <= 32 && kCtas % kLanes == 0);
    const int bucket = cta_ * kShare + static_cast<int>(threadIdx.x) / kLanes;
    const int first = static_cast<int>(threadIdx.x) % kLanes;
    uint32_t count = 0;
    uint64_t weight = 0;
#pragma unroll
    for (int i = 0; i < kCtas / kLanes; ++i) {
      const Histogram* of = cluster_.map_shared_rank(&own, first + i * kLanes);
      count += of->count[bucket];
      weight += of->weight_low[bucket] + (uint64_t{of->weight_high[bucket]} << 32);
    }
    for (int delta = kLanes / 2; delta > 0; delta /= 2) {
      count += __shfl_xor_sync(kFullWarp, count, delta);
      weight += __shfl_xor_sync(kFullWarp, weight, delta);
    }
#pragma unroll
    for (int i = 0; i < kCtas / kLanes; ++i) {
      HistogramSums* to = cluster_.map_shared_rank(&sums, first + i * kLanes);
      to->count[bucket] = count;
      to->weight[bucket] = weight;
    }
  }

  // --- masks, bias, penalties ------------------------------------------------------------------

  __device__ bool has_rules() const {
    return row_.banned.count + row_.bias.count + row_.prompt.count + row_.output.count > 0;
  }

  // Calls fn(place in the slice) for the tokens of a list that lie in the slice.
  template <typename Fn>
  __device__ void for_listed(WordRange list, Fn fn) const {
    constexpr uint32_t kAhead = 8;  // loads in flight
    const uint32_t* words = launch_.step->words + list.begin;
    const int count = min(slice_size_, launch_.vocab - base_);
    for (uint32_t start = threadIdx.x; start < list.count; start += kAhead * kThreads) {
      int32_t tokens[kAhead];
#pragma unroll
      for (uint32_t i = 0; i < kAhead; ++i) {
        const uint32_t at = start + i * kThreads;
        tokens[i] = at < list.count ? static_cast<int32_t>(words[at]) : -1;
      }
#pragma unroll
      for (uint32_t i = 0; i < kAhead; ++i) {
        if (tokens[i] >= base_ && tokens[i] - base_ < count) fn(tokens[i] - base_);
      }
    }
  }

  // Every product and sum is rounded on its own, as in the CPU's twin.
  __device__ void apply_rules() {
    if (row_.banned.count > 0) {
      for_listed(row_.banned, [&](int at) { slice_[at] = -INFINITY; });
      __syncthreads();
    }
    if (row_.bias.count > 0) {
      add_bias();
      __syncthreads();
    }
    if (row_.prompt.count + row_.output.count > 0) penalize();
  }

  __device__ void add_bias() {
    const uint32_t* words = launch_.step->words + row_.bias.begin;  // pairs, sorted by token
    const uint32_t pairs = row_.bias.count / 2;
    const int count = min(slice_size_, launch_.vocab - base_);
    for (uint32_t i = threadIdx.x; i < pairs; i += kThreads) {
      const auto token = static_cast<int32_t>(words[2 * i]);
      if (token < base_ || token - base_ >= count) continue;
      if (i > 0 && words[2 * i - 2] == words[2 * i]) continue;  // the first of its token adds all
      for (uint32_t j = i; j < pairs && words[2 * j] == words[2 * i]; ++j) {
        slice_[token - base_] = __fadd_rn(slice_[token - base_], __uint_as_float(words[2 * j + 1]));
      }
    }
  }

  // Counts lie packed, by the place of a token among the marked ones: as many as there are distinct
  // output tokens, a window at a time. A thread has the same words of marks in every pass.
  __device__ void penalize() {
    const int num_words = slice_size_ / 32;
    auto* anywhere = reinterpret_cast<uint32_t*>(work_);  // marks of prompt and output tokens
    uint32_t* in_output = anywhere + num_words;
    uint32_t* before = in_output + num_words;  // marked output tokens before each word
    uint32_t* counts = before + num_words;
    for (int i = static_cast<int>(threadIdx.x); i < 2 * num_words; i += kThreads) anywhere[i] = 0;
    __syncthreads();
    const auto mark = [](uint32_t* marks, int at) { atomicOr(&marks[at / 32], 1u << (at % 32)); };
    for_listed(row_.prompt, [&](int at) { mark(anywhere, at); });
    for_listed(row_.output, [&](int at) {
      mark(anywhere, at);
      mark(in_output, at);
    });
    __syncthreads();
    const auto for_marked = [&](const uint32_t* marks, auto fn) {
      for (int word = static_cast<int>(threadIdx.x); word < num_words; word += kThreads) {
        for (uint32_t bits = marks[word]; bits != 0; bits &= bits - 1) {
          fn(word * 32 + __ffs(static_cast<int>(bits)) - 1);
        }
      }
    };
    if (row_.repetition_penalty != 1.f) {
      const float penalty = row_.repetition_penalty;
      for_marked(anywhere, [&](int at) {
        const float x = slice_[at];
        slice_[at] = x > 0.f ? __fdiv_rn(x, penalty) : __fmul_rn(x, penalty);
      });
    }
    if (row_.presence_penalty == 0.f && row_.frequency_penalty == 0.f) return;

    int distinct = 0;
    for (int start = 0; start < num_words; start += kThreads) {
      const int word = start + static_cast<int>(threadIdx.x);
      const int own = word < num_words ? __popc(in_output[word]) : 0;
      const auto sum = static_cast<int>(block_.inclusive_sum(static_cast<uint64_t>(own)));
      if (word < num_words) before[word] = static_cast<uint32_t>(distinct + sum - own);
      if (threadIdx.x == kThreads - 1) shared_.found[0] = static_cast<uint64_t>(sum);
      __syncthreads();
      distinct += static_cast<int>(shared_.found[0]);
    }
    const auto place = [&](int at) {
      return static_cast<int>(before[at / 32]) +
             __popc(in_output[at / 32] & ((1u << (at % 32)) - 1u));
    };
    for (int window = 0; window < distinct; window += kCountWindow) {
      for (int i = static_cast<int>(threadIdx.x); i < kCountWindow; i += kThreads) counts[i] = 0;
      __syncthreads();
      for_listed(row_.output, [&](int at) {
        const int i = place(at) - window;
        if (i >= 0 && i < kCountWindow) atomicAdd(&counts[i], 1u);
      });
      __syncthreads();
      for_marked(in_output, [&](int at) {
        const int i = place(at) - window;
        if (i < 0 || i >= kCountWindow) return;
        const auto count = static_cast<float>(counts[i]);
        slice_[at] = __fsub_rn(__fsub_rn(slice_[at], row_.presence_penalty),
                               __fmul_rn(row_.frequency_penalty, count));
      });
      __syncthreads();
    }
  }

  // --- the draw --------------------------------------------------------------------------------

  // The row's uniform number times `total`, rounded down: below `total`.
  __device__ uint64_t point_of(uint64_t total) const {
    const PhiloxCounter bits =
        philox4x32_10({row_.output_position, row_.choice, 0, 0},
                      {static_cast<uint32_t>(row_.seed), static_cast<uint32_t>(row_.seed >> 32)});
    const uint64_t uniform = (uint64_t{bits[0]} << 32 | bits[1]) >> 11;  // 53 bits
    return __umul64hi(uniform << 11, total);
  }

  __device__ void draw(uint64_t best) {
    const float max_logit = key_logit(rank_key(best)), temperature = row_.temperature;
    const auto scale = WeightScale::of(max_logit, row_.inverse_temperature);
    const float floor = fminf(max_logit, max_logit + row_.min_p_offset);
    const bool has_top_p = row_.top_p < 1.f;
    if (row_.top_k == 0 && !has_top_p) {
      return draw_from_slices<false>(scale, temperature, {floor, UINT32_MAX});
    }

    // Of what a nucleus is taken from; with top_k that is known when the candidates are.
    uint64_t total = 0;
    if (row_.top_k == 0) {
      total = exchange_sum(lane_weight<false>(scale, temperature, {floor, UINT32_MAX}));
    }
    const int wanted = row_.top_k > 0 ? row_.top_k : kNucleusGuess;
    if (wanted <= kSlots) {
      const auto found = static_cast<int>(gather({fmaxf(bound_of(wanted), floor), UINT32_MAX}));
      if (found <= kMaxCandidates && (row_.top_k > 0 || hold_nucleus(scale, found, total))) {
        if (cta_ != 0) return;
        if (found <= 2 * WarpTeam::kSize) {
          if (warp_ == 0) draw_from_candidates(WarpTeam{}, scale, found, total);
        } else {
          draw_from_candidates(block_, scale, found, total);
        }
        return;
      }
    }

    // Tokens without weight cannot be drawn: whether they are kept makes no difference.
    uint64_t low = rank_at_least(fmaxf(floor, max_logit - kLastWeight * temperature));
    if (row_.top_k > 0) {
      const Selection top = select(scale, low, best, {row_.top_k});
      low = top.rank;
      total = top.weight;
    }
    if (has_top_p) {
      // Leaving out all tokens below w, each at most w, loses at most vocab * w. So the nucleus
      // lies above w = (1 - top_p) * total / vocab; a tenth in the exponent allows for rounding.
      const float mass = static_cast<float>(total) * 0x1p-40f;
      const float depth =
          logf(static_cast<float>(launch_.vocab) / ((1.f - row_.top_p) * mass)) + 0.1f;
      low = max(low, rank_at_least(max_logit - fmaxf(depth, 0.f) * temperature));
      low = select(scale, low, best, {0, nucleus_of(total)}).rank;
    }
    draw_from_slices<true>(scale, temperature, cut_at(low));
  }

  __device__ double nucleus_of(uint64_t total) const {
    return double{row_.top_p} * static_cast<double>(total);
  }

  // Whether the candidates in block 0 weigh enough for the nucleus. All blocks ask.
  __device__ bool hold_nucleus(WeightScale scale, int found, uint64_t total) {
    uint64_t weight = 0;
    if (cta_ == 0) {
      for (int i = static_cast<int>(threadIdx.x); i < found; i += kThreads) {
        weight += candidate_weight(scale, work_[i]);
      }
    }
    exchange(warp_sum(weight));
    uint64_t sum = 0;
    for (int i = 0; i < kLaneSlots; ++i) sum += values_[i];
    return static_cast<double>(warp_sum(sum)) >= nucleus_of(total);
  }

  static __device__ uint64_t candidate_weight(WeightScale scale, uint64_t rank) {
    return fixed_point(scale.weight(key_logit(rank_key(rank))));
  }

  // Walks the warps' sums to the warp that holds the point; that one walks its tokens.
  template <bool kTies>
  __device__ void draw_from_slices(WeightScale scale, float temperature, Cut cut) {
    exchange(warp_sum(fixed_point(lane_weight<kTies>(scale, temperature, cut))));
    uint64_t lane_sum = 0;
    for (int i = 0; i < kLaneSlots; ++i) lane_sum += values_[i];
    const uint64_t sum = warp_inclusive_sum(lane_sum);
    uint64_t point = point_of(__shfl_sync(kFullWarp, sum, 31));
    const int owner = __ffs(static_cast<int>(__ballot_sync(kFullWarp, sum > point))) - 1;
    point -= __shfl_sync(kFullWarp, sum - lane_sum, owner);
    int slot = 0;
    for (; slot < kLaneSlots - 1; ++slot) {
      const uint64_t value = __shfl_sync(kFullWarp, values_[slot], owner);
      if (value > point) break;
      point -= value;
    }
    if (owner * kLaneSlots + slot != cta_ * kWarps + warp_) return;

    int32_t last = -1;  // of this lane's tokens with weight
    for (int step = first_step_; step < last_step_; ++step) {
      const int at = step * kStep + lane_ * 4;
      uint64_t weights[4];
      uint64_t own = 0;
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float logit = slice_[at + i];
        weights[i] = cut.keeps(logit, base_ + at + i) ? fixed_point(scale.weight(logit)) : 0;
        own += weights[i];
        if (weights[i] > 0) last = base_ + at + i;
      }
      const uint64_t step_sum = warp_sum_of_small(own);
      if (step_sum <= point) {
        point -= step_sum;
        continue;
      }
      const uint64_t up_to = warp_inclusive_sum(own);
      uint64_t before = up_to - own;
      if (point < before || point >= up_to) return;  // another lane
      int32_t token = base_ + at;
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        before += weights[i];
        if (before <= point) ++token;
      }
      choose(token);
      return;
    }
    // The warp's sum was rounded up by more than its last tokens weigh: the last one then.
    const int32_t chosen = __reduce_max_sync(kFullWarp, last);
    if (lane_ == 0) choose(chosen);
  }

  // Block 0 alone. The candidates lie in work_ in order of ids; they are the first tokens in order
  // of rank, at least top_k of them or all above the floor. total: what the nucleus is taken from,
  // where it is not they.
  template <typename Team>
  __device__ void draw_from_candidates(const Team& team, WeightScale scale, int found,
                                       uint64_t total) {
    auto* by_id = reinterpret_cast<uint64_t*>(slice_);
    for (int i = static_cast<int>(threadIdx.x); i < found; i += Team::kSize) by_id[i] = work_[i];
    sort_candidates(team, found);

    const int kept = row_.top_k > 0 ? min(row_.top_k, found) : found;
    const int at = 2 * static_cast<int>(threadIdx.x);
    const uint64_t first = at < kept ? candidate_weight(scale, work_[at]) : 0;
    const uint64_t second = at + 1 < kept ? candidate_weight(scale, work_[at + 1]) : 0;
    const uint64_t up_to = team.inclusive_sum(first + second);
    if (static_cast<int>(threadIdx.x) == (kept - 1) / 2) shared_.found[0] = up_to;
    team.sync();
    uint64_t weight = shared_.found[0];
    uint64_t last = work_[kept - 1];
    if (row_.top_p < 1.f) {
      const double aim = nucleus_of(row_.top_k > 0 ? weight : total);
      const bool second_reaches = static_cast<double>(up_to) >= aim;
      const bool first_reaches = static_cast<double>(up_to - second) >= aim;
      const int owner = team.count(!second_reaches);  // all of them reach it: a thread does
      if (static_cast<int>(threadIdx.x) == owner) {
        shared_.found[1] = first_reaches ? up_to - second : up_to;
        shared_.found[2] = work_[first_reaches ? at : at + 1];
      }
      team.sync();
      weight = shared_.found[1];
      last = shared_.found[2];
    }

    const uint64_t point = point_of(weight);
    const uint64_t a = at < found && by_id[at] >= last ? candidate_weight(scale, by_id[at]) : 0;
    const uint64_t b =
        at + 1 < found && by_id[at + 1] >= last ? candidate_weight(scale, by_id[at + 1]) : 0;
    const uint64_t sum = team.inclusive_sum(a + b);
    const uint64_t before = sum - a - b;
    if (point < before || point >= sum) return;
    choose(rank_token(by_id[point < before + a ? at : at + 1]));
  }

  // --- results ---------------------------------------------------------------------------------

  __device__ void choose(int32_t token) const {
    result_.token = token;
    result_.logprob = row_.num_logprobs >= 0 ? raw_[token] - normalizer_ : 0.f;
    result_.non_finite = 0;
    if (row_.num_logprobs < 0) result_.num_top = 0;
  }
  __device__ void fail() const {
    if (cta_ != 0 || threadIdx.x != 0) return;
    result_.token = -1;
    result_.logprob = 0.f;
    result_.non_finite = 1;
    result_.num_top = 0;
  }

  const SamplingLaunch& launch_;
  const DeviceSamplingRow& source_;
  const float* raw_;  // [vocab]
  DeviceSampledToken& result_;
  Shared& shared_;
  const DeviceSamplingRow& row_;  // a copy of source_
  const Block block_;
  cg::cluster_group cluster_ = cg::this_cluster();
  const int cta_, lane_, warp_;
  const int slice_size_, base_;       // logits of this block: ids [base_, base_ + slice_size_)
  const int first_step_, last_step_;  // of them, this warp's
  float* slice_;                      // [slice_size_]
  uint64_t* work_;                    // work_bytes()
  int phase_ = 0;                     // the half of the slots in use
  uint64_t values_[kLaneSlots];       // of the last exchange, this lane's
  uint32_t best_keys_[kLaneSlots];    // of the last exchange_max()
  float normalizer_ = 0.f;            // log of the sum of e^logit over the raw row
};

template <int kCtas, int kThreads>
__global__ __launch_bounds__(kThreads, 1024 / kThreads) void sample_kernel(
    const __grid_constant__ SamplingLaunch launch) {
  __shared__ typename RowSampler<kCtas, kThreads>::Shared shared;
  extern __shared__ __align__(16) std::byte dynamic[];
  const int row = static_cast<int>(blockIdx.x) / kCtas;
  if (row >= launch.step->num_rows) return;  // fills the batch up
  RowSampler<kCtas, kThreads>(launch, row, shared, dynamic).run();
}

constexpr int kClusterBlocks = 8;   // the largest portable cluster
constexpr int kBlockThreads = 512;  // two blocks an SM

int dynamic_bytes(int vocab) {
  const int slice = slice_of(vocab, kClusterBlocks);
  return slice_bytes(slice, kBlockThreads) + work_bytes(slice, kBlockThreads);
}

}  // namespace

void prepare_sampling(int vocab) {
  CHECK(vocab > 0 && vocab <= kMaxSamplingVocab, "sampling: the vocabulary");
  int device = 0, major = 0;
  CUDA_CHECK(cudaGetDevice(&device));
  CUDA_CHECK(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device));
  if (major < 9) throw std::runtime_error("sampling on the GPU needs compute capability 9.0");
  const auto kernel = sample_kernel<kClusterBlocks, kBlockThreads>;
  CUDA_CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                  dynamic_bytes(vocab)));
}

void launch_sampling(cudaStream_t stream, const SamplingLaunch& launch) {
  if (launch.num_rows == 0) return;
  cudaLaunchAttribute cluster{};
  cluster.id = cudaLaunchAttributeClusterDimension;
  cluster.val.clusterDim = {kClusterBlocks, 1, 1};
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(launch.num_rows * kClusterBlocks));
  config.blockDim = dim3(kBlockThreads);
  config.dynamicSmemBytes = static_cast<size_t>(dynamic_bytes(launch.vocab));
  config.stream = stream;
  config.attrs = &cluster;
  config.numAttrs = 1;
  CUDA_CHECK(cudaLaunchKernelEx(&config, sample_kernel<kClusterBlocks, kBlockThreads>, launch));
  CUDA_CHECK(cudaGetLastError());
}

}  // namespace kvarn::cuda
