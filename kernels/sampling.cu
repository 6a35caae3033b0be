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
constexpr int kMaxCandidates = 512;  // each is compared with each
// The work area holds one of: candidates; a histogram and its sums; the marks of the penalties (two
// bits a token, marks before each word) and a window of counts.
constexpr int work_bytes(int slice) {
  const int histogram = static_cast<int>(sizeof(Histogram) + sizeof(HistogramSums));
  const int marks = slice / 32 * 12 + kCountWindow * 4;
  return std::max({histogram, marks, kMaxCandidates * 8}) / 16 * 16 + 16;
}
// A block that orders candidates keeps two numbers of each where its slice was.
constexpr int slice_bytes(int slice) { return std::max(slice * 4, kMaxCandidates * 16); }

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

  struct alignas(16) Slot {
    uint64_t value, weight;
  };
  struct Shared {
    Slot slots[2][kSlots];
    uint64_t partials[kWarps];
    CopyBarrier copies[kWarps];  // of each warp's part of the slice
    uint64_t found[3];           // what one thread found out for its block
    uint64_t uniform;            // of the draw, 53 bits from the top
    uint32_t bounds[2];          // of the two calls of bound_of()
    int distinct;                // output tokens in the slice
    DeviceSamplingRow row;
  };

  __device__ RowSampler(const SamplingLaunch& launch, int row, Shared& shared, std::byte* dynamic)
      : launch_(launch),
        source_(launch.rows[row]),
        raw_(launch.logits + int64_t{row} * launch.vocab),
        result_(launch.results[row]),
        shared_(shared),
        row_(shared.row),
        cta_(static_cast<int>(cluster_.block_rank())),
        lane_(static_cast<int>(threadIdx.x % 32)),
        warp_(static_cast<int>(threadIdx.x / 32)),
        slice_size_(slice_of(launch.vocab, kCtas)),
        base_(cta_ * slice_size_),
        first_step_(warp_ * (slice_size_ / kStep) / kWarps),
        last_step_((warp_ + 1) * (slice_size_ / kStep) / kWarps),
        slice_(reinterpret_cast<float*>(dynamic)),
        work_(reinterpret_cast<uint64_t*>(dynamic + slice_bytes(slice_size_))) {}

  // Starts what does not depend on the row's parameters.
  __device__ void start() {
    cluster_.barrier_arrive();  // every block has started before one writes into another
    load();
  }
  // Instead of run(): the row only fills the batch up.
  __device__ void abandon() {
    shared_.copies[warp_].wait();
    cluster_.barrier_wait();
  }

  __device__ void run() {
    constexpr int kRowWords = sizeof(DeviceSamplingRow) / sizeof(uint32_t);
    static_assert(kRowWords <= kThreads);
    if (threadIdx.x < kRowWords) {
      reinterpret_cast<uint32_t*>(&shared_.row)[threadIdx.x] =
          reinterpret_cast<const uint32_t*>(&source_)[threadIdx.x];
    }
    if (threadIdx.x < 2) shared_.bounds[threadIdx.x] = 0;
    __syncthreads();
    if (warp_ == kWarps - 1) make_uniform();
    const bool wants_logprobs = row_.num_logprobs >= 0;
    // The lists are walked while the logits come, but not where logprobs need the work area first.
    if (has_marks() && !wants_logprobs) mark_lists();
    shared_.copies[warp_].wait();
    cluster_.barrier_wait();

    uint64_t best = 0;
    bool has_weights = false;  // in weights_, for the draw
    // The raw row for logprobs, then the row that rules have changed: one of them if it does.
#pragma unroll 1
    for (int pass = wants_logprobs ? 0 : 1; pass < 2; ++pass) {
      float inverse_temperature = 1.f;
      if (pass == 1) {
        if (wants_logprobs && !has_rules()) break;
        if (has_rules()) {
          if (has_marks() && wants_logprobs) mark_lists();
          __syncthreads();
          apply_rules();
          __syncthreads();
        }
        // The draw's weights come along where they depend on nothing but their warp's maximum.
        has_weights = row_.greedy == 0 && row_.top_k == 0 && row_.min_p_offset == -INFINITY;
        inverse_temperature = row_.inverse_temperature;
      }
      best = exchange_best(pass == 0 || has_weights, inverse_temperature);
      if (!is_finite(best)) return fail();
      if (pass == 0) report_logprobs(key_logit(rank_key(best)));
    }
    if (row_.greedy != 0) {
      if (cta_ == 0 && threadIdx.x == 0) choose(rank_token(best));
      return;
    }
    draw(best, has_weights);
  }

 private:
  // --- the slice -------------------------------------------------------------------------------

  // Calls fn(first id of four, the four logits) for the steps of this warp.
  template <typename Fn>
  __device__ void for_each(Fn fn) const {
#pragma unroll 2
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
    if (best.logit == -INFINITY) return rank_of(kMinusInfKey, best.token);
    const float4 x = *reinterpret_cast<const float4*>(slice_ + (best.token - base_));
    const int place = x.x == best.logit ? 0 : x.y == best.logit ? 1 : x.z == best.logit ? 2 : 3;
    return rank_of(order_key(best.logit), best.token + place);
  }

  // Fills the slice, -inf beyond the vocabulary. Each warp copies its own part, to be waited for.
  __device__ void load() {
    const bool aligned = launch_.vocab % 4 == 0;
    const float* source = raw_ + base_;
    const int count = min(slice_size_, launch_.vocab - base_);  // may be negative
    const int begin = first_step_ * kStep, end = last_step_ * kStep;
    const int copied = aligned ? max(min(end, count), begin) : begin;
    if (lane_ == 0) {
      shared_.copies[warp_].start(slice_ + begin, source + begin,
                                  static_cast<uint32_t>(copied - begin) * sizeof(float));
    }
    __syncwarp();
#pragma unroll 1
    for (int at = copied + lane_; at < end; at += 32) {
      slice_[at] = at < count ? source[at] : -INFINITY;
    }
    __syncwarp();
  }

  static __device__ bool is_finite(uint64_t best) {
    return rank_key(best) > kMinusInfKey && rank_key(best) < kPlusInfKey;
  }

  // --- exchange between the warps of the cluster -----------------------------------------------

  // Gives `value` and `weight` (of lane 0) of every warp of the cluster to all of them, in order of
  // ids; returns those of this lane. They stand until this thread enters the next exchange. A
  // barrier of the cluster.
  __device__ const Slot* exchange(uint64_t value, uint64_t weight = 0) {
    phase_ ^= 1;
    value = __shfl_sync(kFullWarp, value, 0);
    weight = __shfl_sync(kFullWarp, weight, 0);
    Slot* slot = &shared_.slots[phase_][cta_ * kWarps + warp_];
    if (lane_ < kCtas) store_shared(slot, lane_, value, weight);
    sync_cluster();
    return &shared_.slots[phase_][lane_ * kLaneSlots];
  }

  // The rank of the row's first token, or kNaNRank. Keeps the warps' maxima, and with_weights the
  // warps' weights: each adds them up below its own maximum, so one exchange does for both.
  __device__ uint64_t exchange_best(bool with_weights, float inverse_temperature) {
    Best best{-INFINITY, base_ + lane_ * 4};
    for_each([&](int32_t first, const float4& x) { best.take(first, x); });
    const uint64_t own = warp_max(rank_of_best(best));
    auto scale = WeightScale::of(key_logit(rank_key(own)), inverse_temperature);
    uint64_t weight = 0;
    if (with_weights && is_finite(own)) {
      weight = warp_sum_of_small(fixed_point(lane_weight(scale, {-INFINITY, UINT32_MAX})));
    }
    const Slot* slots = exchange(own, weight);
    uint64_t all = 0;
#pragma unroll
    for (int i = 0; i < kLaneSlots; ++i) {
      best_keys_[i] = rank_key(slots[i].value);
      all = max(all, slots[i].value);
    }
    all = warp_max(all);
    if (with_weights) {
      scale.max = key_logit(rank_key(all));
#pragma unroll
      for (int i = 0; i < kLaneSlots; ++i) {
        const float below = static_cast<float>(slots[i].weight) * 0x1p-40f;
        weights_[i] = below > 0.f ? fixed_point(below * scale.weight(key_logit(best_keys_[i]))) : 0;
      }
    }
    return all;
  }
  // Keeps the warps' weights.
  __device__ void exchange_weights(float lane_value) {
    const Slot* slots = exchange(warp_sum_of_small(fixed_point(lane_value)));
    for (int i = 0; i < kLaneSlots; ++i) weights_[i] = slots[i].value;
  }
  __device__ uint64_t sum_of_weights() const {
    uint64_t sum = 0;
    for (int i = 0; i < kLaneSlots; ++i) sum += weights_[i];
    return warp_sum(sum);
  }

  // --- logprobs --------------------------------------------------------------------------------

  // The weight of this lane's tokens that `cut` keeps. In fp32: a lane has some forty tokens, and
  // always the same.
  __device__ float lane_weight(WeightScale scale, Cut cut) const {
    const float least = fmaxf(cut.logit, scale.least());
    float sum = 0.f;
    for_each([&](int32_t first, const float4& x) {
      if (!(max_of(x) >= least)) return;
      const float logits[4] = {x.x, x.y, x.z, x.w};
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        sum += cut.keeps(logits[i], first + i) ? scale.weight(logits[i]) : 0.f;
      }
    });
    return sum;
  }

  // weights_ hold the raw row's.
  __device__ void report_logprobs(float max_logit) {
    normalizer_ = max_logit + logf(static_cast<float>(sum_of_weights()) * 0x1p-40f);
    const int wanted = min(row_.num_logprobs, launch_.vocab);
    if (wanted == 0) {
      if (cta_ == 0 && threadIdx.x == 0) result_.num_top = 0;
      return;
    }
    const int found = gather({bound_of(wanted, 0), UINT32_MAX});
    if (found > kMaxCandidates) return report_ties(wanted);
    if (cta_ != 0) return;
    if (threadIdx.x == 0) result_.num_top = min(wanted, found);
    order_candidates<false>({}, found, [&](int i, int place, uint64_t) {
      if (place >= wanted) return;
      result_.top_tokens[place] = rank_token(work_[i]);
      result_.top_logprobs[place] = key_logit(rank_key(work_[i])) - normalizer_;
    });
    __syncthreads();  // the work area is free again
  }

  // More tokens tie than can be gathered: one after another, an exchange each.
  __device__ void report_ties(int wanted) {
    uint64_t last = ~uint64_t{0};
    int found = 0;
#pragma unroll 1
    for (; found < wanted; ++found) {
      uint64_t next = 0;
#pragma unroll 1
      for (int step = first_step_; step < last_step_; ++step) {
        for (int i = 0; i < 4; ++i) {
          const int at = step * kStep + lane_ * 4 + i;
          const uint64_t rank = rank_of(order_key(slice_[at]), base_ + at);
          if (rank < last && rank > next) next = rank;
        }
      }
      const Slot* slots = exchange(warp_max(next));
      next = 0;
      for (int i = 0; i < kLaneSlots; ++i) next = max(next, slots[i].value);
      last = warp_max(next);
      if (rank_key(last) < kLowestKey) break;  // the rest is -inf
      if (cta_ == 0 && threadIdx.x == 0) {
        result_.top_tokens[found] = rank_token(last);
        result_.top_logprobs[found] = key_logit(rank_key(last)) - normalizer_;
      }
    }
    if (cta_ == 0 && threadIdx.x == 0) result_.num_top = found;
  }

  // --- candidates ------------------------------------------------------------------------------

  static __device__ uint64_t rank_at_least(float logit) {
    return uint64_t{max(order_key(logit), kLowestKey)} << 32;
  }
  static __device__ Cut cut_at(uint64_t rank) {
    return {key_logit(rank_key(rank)), static_cast<uint32_t>(rank_token(rank))};
  }

  // A bound from below of the logit of the count-th token. Each warp has the maximum of its own
  // tokens: `count` maxima reach the bound. Never below the lowest finite number. Each call has a
  // place in shared_.bounds. A barrier of the block.
  __device__ float bound_of(int count, int call) {
    uint32_t bound = 0;
#pragma unroll
    for (int i = 0; i < kSlots / kWarps; ++i) {  // each warp tries some of the maxima
      const uint32_t key = __shfl_sync(kFullWarp, best_keys_[i % kLaneSlots],
                                       warp_ * (kSlots / kWarps / kLaneSlots) + i / kLaneSlots);
      int reaching = 0;
      for (int j = 0; j < kLaneSlots; ++j) {
        reaching += __popc(__ballot_sync(kFullWarp, best_keys_[j] >= key));
      }
      if (reaching >= count) bound = max(bound, key);
    }
    if (lane_ == 0) atomicMax(&shared_.bounds[call], bound);
    __syncthreads();
    return key_logit(max(shared_.bounds[call], kLowestKey));
  }

  // Writes the ranks of the tokens that `cut` keeps, in order of ids, into the work area of block
  // 0, unless they are more than kMaxCandidates. Returns their number.
  __device__ int gather(Cut cut) {
    static_assert(slice_of(kMaxSamplingVocab, kCtas) / kStep / kWarps < 32);  // bits of `hits`
    uint32_t hits = 0, count = 0;
    for_each([&](int32_t first, const float4& x) {
      if (!(max_of(x) >= cut.logit)) return;
      const int kept = cut.keeps(x.x, first) + cut.keeps(x.y, first + 1) +
                       cut.keeps(x.z, first + 2) + cut.keeps(x.w, first + 3);
      count += static_cast<uint32_t>(kept);
      if (kept > 0) hits |= 1u << ((first - base_) / kStep - first_step_);
    });
    hits = __reduce_or_sync(kFullWarp, hits);
    const Slot* slots = exchange(__reduce_add_sync(kFullWarp, count));
    const int own = cta_ * kWarps + warp_;
    uint32_t total = 0, place = 0;
    for (int i = 0; i < kLaneSlots; ++i) {
      const auto value = static_cast<uint32_t>(slots[i].value);
      total += value;
      if (lane_ * kLaneSlots + i < own) place += value;
    }
    total = __reduce_add_sync(kFullWarp, total);
    if (total > kMaxCandidates) return static_cast<int>(total);

    place = __reduce_add_sync(kFullWarp, place);
    uint64_t* target = cluster_.map_shared_rank(work_, 0);
#pragma unroll 1
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
    sync_cluster();
    return static_cast<int>(total);
  }

  // Block 0 alone. Calls fn(i, place in the order of rank, weight of all before it) for each of the
  // candidates work_[0, found), with kWeights; without, the weight is not known. Eight lanes
  // compare one candidate with all of them, one of these calls. The slice is overwritten.
  template <bool kWeights, typename Fn>
  __device__ void order_candidates(WeightScale scale, int found, Fn fn) {
    constexpr int kLanes = 8;
    auto* weights = reinterpret_cast<uint64_t*>(slice_);
    if (kWeights) {
#pragma unroll 1
      for (int i = static_cast<int>(threadIdx.x); i < found; i += kThreads) {
        weights[i] = candidate_weight(scale, work_[i]);
      }
      __syncthreads();
    }
#pragma unroll 1
    for (int start = 0; start < found; start += kThreads / kLanes) {
      const int i = start + static_cast<int>(threadIdx.x) / kLanes;
      const uint64_t own = i < found ? work_[i] : ~uint64_t{0};
      int place = 0;
      uint64_t before = 0;
#pragma unroll 1
      for (int j = lane_ % kLanes; j < found; j += kLanes) {
        if (work_[j] <= own) continue;
        ++place;
        if (kWeights) before += weights[j];
      }
      for (int delta = kLanes / 2; delta > 0; delta /= 2) {
        place += __shfl_xor_sync(kFullWarp, place, delta);
        if (kWeights) before += __shfl_xor_sync(kFullWarp, before, delta);
      }
      if (i < found && lane_ % kLanes == 0) fn(i, place, before);
    }
  }
  static __device__ uint64_t candidate_weight(WeightScale scale, uint64_t rank) {
    return fixed_point(scale.weight(key_logit(rank_key(rank))));
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
#pragma unroll 1
    for (;;) {
      const int bits = 64 - __clzll(static_cast<long long>(high - low));
      const int shift = max(bits - 9, 0);
#pragma unroll 1
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
      sync_cluster();
      add_histograms(own, sums);
      sync_cluster();

      // Thread t takes its buckets from 511 - kEach * t down: in order of rank.
      constexpr int kEach = kBuckets / kThreads;
      static_assert(kEach >= 1 && kBuckets % kThreads == 0);
      const int top = kBuckets - 1 - kEach * static_cast<int>(threadIdx.x);
      uint64_t own_tokens = 0, own_weight = 0;
      for (int i = 0; i < kEach; ++i) {
        own_tokens += sums.count[top - i];
        own_weight += sums.weight[top - i];
      }
      uint64_t sum_tokens = tokens + block_inclusive_sum<kWarps>(own_tokens, shared_.partials);
      uint64_t sum_weight = weight + block_inclusive_sum<kWarps>(own_weight, shared_.partials);
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

  __device__ bool has_marks() const { return row_.prompt.count + row_.output.count > 0; }
  __device__ bool has_rules() const {
    return has_marks() || row_.banned.count + row_.bias.count > 0;
  }

  // Calls fn(place in the slice) for the tokens of a list that lie in the slice.
  template <typename Fn>
  __device__ void for_listed(WordRange list, Fn fn) const {
    constexpr uint32_t kAhead = 4;  // loads in flight
    const uint32_t* words = launch_.step->words + list.begin;
    const int count = min(slice_size_, launch_.vocab - base_);
#pragma unroll 1
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
    if (has_marks()) penalize();
  }

  __device__ void add_bias() {
    const uint32_t* words = launch_.step->words + row_.bias.begin;  // pairs, sorted by token
    const uint32_t pairs = row_.bias.count / 2;
    const int count = min(slice_size_, launch_.vocab - base_);
#pragma unroll 1
    for (uint32_t i = threadIdx.x; i < pairs; i += kThreads) {
      const auto token = static_cast<int32_t>(words[2 * i]);
      if (token < base_ || token - base_ >= count) continue;
      if (i > 0 && words[2 * i - 2] == words[2 * i]) continue;  // the first of its token adds all
#pragma unroll 1
      for (uint32_t j = i; j < pairs && words[2 * j] == words[2 * i]; ++j) {
        slice_[token - base_] = __fadd_rn(slice_[token - base_], __uint_as_float(words[2 * j + 1]));
      }
    }
  }

  // What the penalties ask of a token: whether it is in prompt or output, in the output, how often.
  // Counts lie packed, by the place of a token among the marked output tokens, a window at a time.
  struct Marks {
    uint32_t* anywhere;   // a bit a token
    uint32_t* in_output;  // the same
    uint32_t* before;     // marked output tokens before each word
    uint32_t* counts;     // [kCountWindow]
    __device__ int place(int at) const {
      return static_cast<int>(before[at / 32]) +
             __popc(in_output[at / 32] & ((1u << (at % 32)) - 1u));
    }
  };
  __device__ Marks marks() const {
    const int num_words = slice_size_ / 32;
    auto* words = reinterpret_cast<uint32_t*>(work_);
    return {words, words + num_words, words + 2 * num_words, words + 3 * num_words};
  }

  // Needs no logits. Counts the first window.
  __device__ void mark_lists() {
    const Marks marked = marks();
    const int num_words = slice_size_ / 32;
#pragma unroll 1
    for (int i = static_cast<int>(threadIdx.x); i < 2 * num_words; i += kThreads) {
      marked.anywhere[i] = 0;
    }
    __syncthreads();
    const auto mark = [](uint32_t* bits, int at) { atomicOr(&bits[at / 32], 1u << (at % 32)); };
    for_listed(row_.prompt, [&](int at) { mark(marked.anywhere, at); });
    for_listed(row_.output, [&](int at) {
      mark(marked.anywhere, at);
      mark(marked.in_output, at);
    });
    __syncthreads();
    if (row_.presence_penalty == 0.f && row_.frequency_penalty == 0.f) return;
    int distinct = 0;
#pragma unroll 1
    for (int start = 0; start < num_words; start += kThreads) {
      const int word = start + static_cast<int>(threadIdx.x);
      const int own = word < num_words ? __popc(marked.in_output[word]) : 0;
      const auto sum = static_cast<int>(
          block_inclusive_sum<kWarps>(static_cast<uint64_t>(own), shared_.partials));
      if (word < num_words) marked.before[word] = static_cast<uint32_t>(distinct + sum - own);
      if (threadIdx.x == kThreads - 1) shared_.distinct = sum;
      __syncthreads();
      distinct += shared_.distinct;
    }
    __syncthreads();
    if (threadIdx.x == 0) shared_.distinct = distinct;
    count_output(marked, 0);
  }
  __device__ void count_output(const Marks& marked, int window) {
#pragma unroll 1
    for (int i = static_cast<int>(threadIdx.x); i < kCountWindow; i += kThreads) {
      marked.counts[i] = 0;
    }
    __syncthreads();
    if (row_.frequency_penalty != 0.f) {
      for_listed(row_.output, [&](int at) {
        const int i = marked.place(at) - window;
        if (i >= 0 && i < kCountWindow) atomicAdd(&marked.counts[i], 1u);
      });
    }
    __syncthreads();
  }

  // Calls fn(place in the slice) for the marked tokens. A thread has the same words in every call.
  template <typename Fn>
  __device__ void for_marked(const uint32_t* bits, Fn fn) const {
#pragma unroll 1
    for (int word = static_cast<int>(threadIdx.x); word < slice_size_ / 32; word += kThreads) {
#pragma unroll 1
      for (uint32_t rest = bits[word]; rest != 0; rest &= rest - 1) {
        fn(word * 32 + __ffs(static_cast<int>(rest)) - 1);
      }
    }
  }

  __device__ void penalize() {
    const Marks marked = marks();
    if (row_.repetition_penalty != 1.f) {
      const float penalty = row_.repetition_penalty;
      for_marked(marked.anywhere, [&](int at) {
        const float x = slice_[at];
        slice_[at] = x > 0.f ? __fdiv_rn(x, penalty) : __fmul_rn(x, penalty);
      });
    }
    if (row_.presence_penalty == 0.f && row_.frequency_penalty == 0.f) return;
    const int distinct = shared_.distinct;
#pragma unroll 1
    for (int window = 0; window < distinct; window += kCountWindow) {
      if (window > 0) {
        __syncthreads();
        count_output(marked, window);
      }
      for_marked(marked.in_output, [&](int at) {
        const int i = marked.place(at) - window;
        if (i < 0 || i >= kCountWindow) return;
        const auto count = static_cast<float>(marked.counts[i]);
        slice_[at] = __fsub_rn(__fsub_rn(slice_[at], row_.presence_penalty),
                               __fmul_rn(row_.frequency_penalty, count));
      });
    }
  }

  // --- the draw --------------------------------------------------------------------------------

  // Of a whole warp.
  __device__ void make_uniform() const {
    const PhiloxCounter bits =
        philox4x32_10({row_.output_position, row_.choice, 0, 0},
                      {static_cast<uint32_t>(row_.seed), static_cast<uint32_t>(row_.seed >> 32)});
    if (lane_ == 0) shared_.uniform = (uint64_t{bits[0]} << 32 | bits[1]) >> 11 << 11;
  }
  // The row's uniform number times `total`, rounded down: below `total`.
  __device__ uint64_t point_of(uint64_t total) const { return __umul64hi(shared_.uniform, total); }

  __device__ void draw(uint64_t best, bool has_weights) {
    const float max_logit = key_logit(rank_key(best));
    const auto scale = WeightScale::of(max_logit, row_.inverse_temperature);
    const float floor = fminf(max_logit, max_logit + row_.min_p_offset);
    const bool has_top_p = row_.top_p < 1.f;
    if (row_.top_k == 0 && !has_weights) {
      exchange_weights(lane_weight(scale, {floor, UINT32_MAX}));
    }
    if (row_.top_k == 0 && !has_top_p) return draw_from_slices(scale, {floor, UINT32_MAX});

    // Of what a nucleus is taken from; with top_k that is known when the candidates are.
    uint64_t total = row_.top_k == 0 ? sum_of_weights() : 0;
    const int wanted = row_.top_k > 0 ? row_.top_k : kNucleusGuess;
    if (wanted <= kSlots) {
      const int found = gather({fmaxf(bound_of(wanted, 1), floor), UINT32_MAX});
      if (found <= kMaxCandidates && (row_.top_k > 0 || hold_nucleus(scale, found, total))) {
        if (cta_ == 0) draw_from_candidates(scale, found, total);
        return;
      }
    }

    // Tokens without weight cannot be drawn: whether they are kept makes no difference.
    uint64_t low = rank_at_least(fmaxf(floor, scale.least()));
    bool by_count = row_.top_k > 0;  // then, of those, the nucleus
#pragma unroll 1
    for (;;) {
      Aim aim{row_.top_k};
      if (!by_count) {
        // Leaving out all tokens below w, each at most w, loses at most vocab * w. So the nucleus
        // lies above w = (1 - top_p) * total / vocab; a tenth in the exponent allows for rounding.
        const float mass = static_cast<float>(total) * 0x1p-40f;
        const float depth =
            logf(static_cast<float>(launch_.vocab) / ((1.f - row_.top_p) * mass)) + 0.1f;
        low = max(low, rank_at_least(max_logit - fmaxf(depth, 0.f) * row_.temperature));
        aim = {0, nucleus_of(total)};
      }
      const Selection selected = select(scale, low, best, aim);
      low = selected.rank;
      if (!by_count || !has_top_p) break;
      total = selected.weight;
      by_count = false;
    }
    exchange_weights(lane_weight(scale, cut_at(low)));
    draw_from_slices(scale, cut_at(low));
  }

  __device__ double nucleus_of(uint64_t total) const {
    return double{row_.top_p} * static_cast<double>(total);
  }

  // Whether the candidates in block 0 weigh enough for the nucleus. All blocks ask.
  __device__ bool hold_nucleus(WeightScale scale, int found, uint64_t total) {
    uint64_t weight = 0;
    if (cta_ == 0) {
#pragma unroll 1
      for (int i = static_cast<int>(threadIdx.x); i < found; i += kThreads) {
        weight += candidate_weight(scale, work_[i]);
      }
    }
    const Slot* slots = exchange(warp_sum(weight));
    uint64_t sum = 0;
    for (int i = 0; i < kLaneSlots; ++i) sum += slots[i].value;
    return static_cast<double>(warp_sum(sum)) >= nucleus_of(total);
  }

  // Walks weights_ to the warp that holds the point; the warps of its block take its steps.
  __device__ void draw_from_slices(WeightScale scale, Cut cut) {
    static_assert(slice_of(kMaxSamplingVocab, kCtas) / kStep <= kWarps * kWarps);
    uint64_t lane_sum = 0;
    for (int i = 0; i < kLaneSlots; ++i) lane_sum += weights_[i];
    const uint64_t sum = warp_inclusive_sum(lane_sum);
    uint64_t point = point_of(__shfl_sync(kFullWarp, sum, 31));
    const int owner = __ffs(static_cast<int>(__ballot_sync(kFullWarp, sum > point))) - 1;
    point -= __shfl_sync(kFullWarp, sum - lane_sum, owner);
    int slot = owner * kLaneSlots;
#pragma unroll
    for (int i = 0; i < kLaneSlots - 1; ++i) {
      const uint64_t value = __shfl_sync(kFullWarp, weights_[i], owner);
      if (slot < owner * kLaneSlots + i || value > point) continue;
      point -= value;
      ++slot;
    }
    if (slot / kWarps != cta_) return;

    const int steps = slice_size_ / kStep, holder = slot % kWarps;
    const int step = holder * steps / kWarps + warp_;
    const int num_steps = (holder + 1) * steps / kWarps - holder * steps / kWarps;
    const int at = step * kStep + lane_ * 4;
    uint64_t weights[4];
    uint64_t own = 0;
    int32_t token = -1;  // this lane's last with weight
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      weights[i] = 0;
      if (warp_ >= num_steps || !cut.keeps(slice_[at + i], base_ + at + i)) continue;
      weights[i] = fixed_point(scale.weight(slice_[at + i]));
      own += weights[i];
      if (weights[i] > 0) token = base_ + at + i;
    }
    const uint64_t step_sum = warp_sum_of_small(own);
    if (lane_ == 0) shared_.partials[warp_] = step_sum;
    __syncthreads();
    uint64_t before = 0;
    bool is_last = true;  // step with weight
#pragma unroll 1
    for (int i = 0; i < kWarps; ++i) {
      if (i < warp_) before += shared_.partials[i];
      if (i > warp_ && shared_.partials[i] > 0) is_last = false;
    }
    if (step_sum == 0 || before > point) return;
    if (before + step_sum <= point) {
      // The warp's sum was rounded up, beyond what its tokens weigh: the last one then.
      if (!is_last) return;
      token = __reduce_max_sync(kFullWarp, token);
      if (lane_ == 0) choose(token);
      return;
    }
    const uint64_t up_to = before + warp_inclusive_sum(own);
    before = up_to - own;
    if (point < before || point >= up_to) return;  // another lane
    token = base_ + at;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      before += weights[i];
      if (before <= point) ++token;
    }
    choose(token);
  }

  // Block 0 alone. The candidates lie in work_ in order of ids; they are the first tokens in order
  // of rank, at least top_k of them or all above the floor. total: what the nucleus is taken from,
  // where it is not they.
  __device__ void draw_from_candidates(WeightScale scale, int found, uint64_t total) {
    auto* weights = reinterpret_cast<uint64_t*>(slice_);
    uint64_t* befores = weights + kMaxCandidates;  // weight before each in the order of rank
    const int kept = row_.top_k > 0 ? min(row_.top_k, found) : found;
    order_candidates<true>(scale, found, [&](int i, int place, uint64_t before) {
      befores[i] = place < kept ? before : ~uint64_t{0};
      if (place == kept - 1) shared_.found[0] = before + weights[i];
    });
    __syncthreads();
    if (warp_ != 0) return;

    // One warp draws, a run of candidates a lane: those before which the nucleus is not complete.
    const uint64_t all = shared_.found[0];
    const double aim = nucleus_of(row_.top_k > 0 ? all : total);
    const auto is_drawn = [&](int i) {
      return befores[i] != ~uint64_t{0} &&
             (row_.top_p >= 1.f || static_cast<double>(befores[i]) < aim);
    };
    const int run = (found + 31) / 32;
    const int begin = min(lane_ * run, found), end = min(begin + run, found);
    uint64_t own = 0;
#pragma unroll 1
    for (int i = begin; i < end; ++i) own += is_drawn(i) ? weights[i] : 0;
    const uint64_t up_to = warp_inclusive_sum(own);
    const uint64_t point = point_of(__shfl_sync(kFullWarp, up_to, 31));
    uint64_t before = up_to - own;
    if (point < before || point >= up_to) return;  // another lane
#pragma unroll 1
    for (int i = begin; i < end; ++i) {
      before += is_drawn(i) ? weights[i] : 0;
      if (before > point) return choose(rank_token(work_[i]));
    }
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
  cg::cluster_group cluster_ = cg::this_cluster();
  const int cta_, lane_, warp_;
  const int slice_size_, base_;       // logits of this block: ids [base_, base_ + slice_size_)
  const int first_step_, last_step_;  // of them, this warp's
  float* slice_;                      // [slice_size_]
  uint64_t* work_;                    // work_bytes()
  int phase_ = 0;                     // the half of the slots in use
  uint32_t best_keys_[kLaneSlots];    // of this lane's slots: the warps' maxima
  uint64_t weights_[kLaneSlots];      // and weights
  float normalizer_ = 0.f;            // log of the sum of e^logit over the raw row
};

template <int kCtas, int kThreads>
__global__ __launch_bounds__(kThreads, 1024 / kThreads) void sample_kernel(
    const __grid_constant__ SamplingLaunch launch) {
  __shared__ typename RowSampler<kCtas, kThreads>::Shared shared;
  extern __shared__ __align__(16) std::byte dynamic[];
  const int row = static_cast<int>(blockIdx.x) / kCtas;
  RowSampler<kCtas, kThreads> sampler(launch, row, shared, dynamic);
  // Rows that fill the batch up are not read where bandwidth counts; with few rows the latency of
  // their number does.
  constexpr int kFewRows = 8;
  if (launch.num_rows > kFewRows && row >= launch.step->num_rows) return;
  sampler.start();
  if (row >= launch.step->num_rows) return sampler.abandon();
  sampler.run();
}

constexpr int kClusterBlocks = 8;   // the largest portable cluster
constexpr int kBlockThreads = 512;  // two blocks an SM

int dynamic_bytes(int vocab) {
  const int slice = slice_of(vocab, kClusterBlocks);
  return slice_bytes(slice) + work_bytes(slice);
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
