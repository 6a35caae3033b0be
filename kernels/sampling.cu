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

#include <stdexcept>

#include "kernels/core/check.h"
#include "kernels/cuda_check.h"
#include "kernels/philox.h"
#include "kernels/sampling_device.cuh"
#include "kernels/sampling_step_cuda.h"

namespace kvarn::cuda {
namespace {

namespace cg = cooperative_groups;

constexpr int kThreads = 512, kWarps = kThreads / 32;
constexpr int kStep = 128;            // logits a warp takes at once: four a lane
constexpr int kLoads = 5;             // 16-byte loads of a thread in flight: 80 KB an SM
constexpr int kMaxCandidates = 1024;  // two a thread
constexpr int kBuckets = 512;         // of a histogram: one a thread
constexpr int kCountWindow = 1024;    // distinct output tokens counted in one walk of the list
static_assert(kBuckets == kThreads && kMaxCandidates == 2 * kThreads);

struct Histogram {
  uint32_t count[kBuckets], weight_low[kBuckets], weight_high[kBuckets];
};

constexpr int slice_of(int vocab, int ctas) {
  const int share = (vocab + ctas - 1) / ctas;
  return (share + kStep - 1) / kStep * kStep;
}
// The work area holds one of: candidates; two histograms; the marks of a penalty (a bit a token,
// marks before each word) and a window of counts.
constexpr int work_bytes(int slice) {
  constexpr int kFixed = 2 * static_cast<int>(sizeof(Histogram));
  static_assert(kFixed >= kMaxCandidates * 8);
  const int marks = slice / 32 * 8 + kCountWindow * 4;
  return (marks > kFixed ? marks : kFixed) / 16 * 16 + 16;
}
// A block that sorts candidates keeps a second copy of them where its slice was.
constexpr int slice_bytes(int slice) {
  return slice * 4 > kMaxCandidates * 8 ? slice * 4 : kMaxCandidates * 8;
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

template <int kCtas>
class RowSampler {
 public:
  static constexpr int kSlots = kCtas * kWarps;  // of an exchange: one a warp of the cluster
  static constexpr int kLaneSlots = kSlots / 32;

  struct Shared {
    uint64_t slots[2][kSlots];
    uint64_t partials[kWarps];
    uint64_t found[4];  // what one thread found out for its block
  };

  __device__ RowSampler(const SamplingLaunch& launch, int row, Shared& shared, std::byte* dynamic)
      : launch_(launch),
        row_(launch.rows[row]),
        raw_(launch.logits + int64_t{row} * launch.vocab),
        result_(launch.results[row]),
        shared_(shared),
        cta_(static_cast<int>(cluster_.block_rank())),
        lane_(static_cast<int>(threadIdx.x % 32)),
        warp_(static_cast<int>(threadIdx.x / 32)),
        slice_size_(slice_of(launch.vocab, kCtas)),
        base_(cta_ * slice_size_),
        first_step_(warp_ * (slice_size_ / kStep) / kWarps),
        last_step_((warp_ + 1) * (slice_size_ / kStep) / kWarps),
        slice_(reinterpret_cast<float*>(dynamic)),
        work_(reinterpret_cast<uint64_t*>(dynamic + slice_bytes(slice_size_))) {}

  __device__ void run() {
    cluster_.barrier_arrive();  // every block has started before one writes into another
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

  struct Best {
    float logit = -INFINITY;
    int32_t token = 0;
    bool nan = false;
    __device__ void take(int32_t first, const float4& x) {
      const float logits[4] = {x.x, x.y, x.z, x.w};
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        if (logits[i] > logit) logit = logits[i], token = first + i;
        nan |= logits[i] != logits[i];
      }
    }
    __device__ uint64_t rank() const { return nan ? kNaNRank : rank_of(order_key(logit), token); }
  };

  // Fills the slice, -inf beyond the vocabulary. Returns the first token of this lane.
  template <bool kAligned>
  __device__ uint64_t load() {
    const float* source = raw_ + base_;
    const int count = min(slice_size_, launch_.vocab - base_);  // may be negative
    Best best;
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
    return best.rank();
  }

  __device__ uint64_t scan() const {
    Best best;
    for_each([&](int32_t first, const float4& x) { best.take(first, x); });
    return best.rank();
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
    uint64_t best = values_[0];
    for (int i = 1; i < kLaneSlots; ++i) best = max(best, values_[i]);
    return warp_max(best);
  }
  __device__ uint64_t exchange_sum(uint64_t lane_value) {
    exchange(warp_sum(lane_value));
    uint64_t sum = 0;
    for (int i = 0; i < kLaneSlots; ++i) sum += values_[i];
    return warp_sum(sum);
  }

  // --- logprobs --------------------------------------------------------------------------------

  __device__ uint64_t lane_weight(WeightScale scale, Cut cut) const {
    uint64_t sum = 0;
    for_each([&](int32_t first, const float4& x) {
      const float logits[4] = {x.x, x.y, x.z, x.w};
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        if (cut.keeps(logits[i], first + i)) sum += fixed_weight(logits[i], scale);
      }
    });
    return sum;
  }

  __device__ void report_logprobs(float max) {
    const int wanted = min(row_.num_logprobs, launch_.vocab);
    const uint32_t bound = wanted > 0 ? bound_of(wanted) : 0;
    const uint64_t total = exchange_sum(lane_weight({max, 1.f}, {-INFINITY, UINT32_MAX}));
    normalizer_ = max + static_cast<float>(log(static_cast<double>(total) * 0x1p-40));
    if (wanted == 0) {
      if (cta_ == 0 && threadIdx.x == 0) result_.num_top = 0;
      return;
    }
    uint32_t found = gather(uint64_t{bound} << 32);
    if (found > kMaxCandidates) {  // ties beyond number: find the exact cut
      const Selection top =
          select({max, 1.f}, rank_of(kLowestKey, INT32_MAX), rank_of(order_key(max), 0), {wanted});
      found = gather(top.rank);
    }
    if (cta_ != 0) return;
    sort_candidates(found);
    const int num_top = min(wanted, static_cast<int>(found));
    if (threadIdx.x == 0) result_.num_top = num_top;
    for (int i = static_cast<int>(threadIdx.x); i < num_top; i += kThreads) {
      result_.top_tokens[i] = rank_token(work_[i]);
      result_.top_logprobs[i] = raw_[rank_token(work_[i])] - normalizer_;
    }
  }

  // --- candidates ------------------------------------------------------------------------------

  // A bound from below of the key of the count-th token; right after exchange_max(), whose values
  // it reads. Each warp has the maximum of its own tokens: `count` maxima reach the bound.
  __device__ uint32_t bound_of(int count) const {
    if (count > kSlots) return 0;
    uint32_t bound = 0;
    constexpr int kLowestBit = 10;  // the rest of the mantissa would exclude next to nothing
    for (int bit = 31; bit >= kLowestBit; --bit) {
      const uint32_t raised = bound | 1u << bit;
      int reaching = 0;
      for (int i = 0; i < kLaneSlots; ++i) {
        reaching += __popc(__ballot_sync(kFullWarp, rank_key(values_[i]) >= raised));
      }
      if (reaching >= count) bound = raised;
    }
    return bound;
  }

  // Writes the ranks of all tokens from `last` on (but none of -inf), in order of ids, into the
  // work area of block 0, unless they are more than kMaxCandidates. Returns their number.
  __device__ uint32_t gather(uint64_t last) {
    last = max(last, uint64_t{kLowestKey} << 32);
    const float least = key_logit(rank_key(last));
    uint32_t count = 0;
    for_each([&](int32_t first, const float4& x) {
      const float logits[4] = {x.x, x.y, x.z, x.w};
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        count += logits[i] >= least && rank_of(order_key(logits[i]), first + i) >= last ? 1 : 0;
      }
    });
    exchange(__reduce_add_sync(kFullWarp, count));
    uint32_t lane_total = 0;
    for (int i = 0; i < kLaneSlots; ++i) lane_total += static_cast<uint32_t>(values_[i]);
    const auto total = __reduce_add_sync(kFullWarp, lane_total);
    if (total > kMaxCandidates) return total;

    const int own = cta_ * kWarps + warp_;
    uint32_t before = 0;
    for (int i = 0; i < kLaneSlots; ++i) {
      if (lane_ * kLaneSlots + i < own) before += static_cast<uint32_t>(values_[i]);
    }
    before = __reduce_add_sync(kFullWarp, before);
    uint64_t* target = cluster_.map_shared_rank(work_, 0);
    if (__any_sync(kFullWarp, count > 0)) {
      for_each([&](int32_t first, const float4& x) {
        const float logits[4] = {x.x, x.y, x.z, x.w};
        if (!__any_sync(kFullWarp, logits[0] >= least || logits[1] >= least || logits[2] >= least ||
                                       logits[3] >= least)) {
          return;
        }
        uint64_t ranks[4];
        uint32_t place = before;
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          ranks[i] = rank_of(order_key(logits[i]), first + i);
          const uint32_t taking = __ballot_sync(kFullWarp, ranks[i] >= last);
          place += __popc(taking & lanes_below());
          before += __popc(taking);
        }
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          if (ranks[i] >= last) target[place++] = ranks[i];
        }
      });
    }
    cluster_.sync();
    return total;
  }

  // Block 0 alone: work_[0, found) in descending order, zeros up to a power of two of at least 2.
  __device__ void sort_candidates(uint32_t found) {
    const int size = power_of_two(found);
    for (int i = static_cast<int>(threadIdx.x + found); i < size; i += kThreads) work_[i] = 0;
    __syncthreads();
    block_sort_descending(work_, size);
  }
  static __device__ int power_of_two(uint32_t count) {
    return count <= 2 ? 2 : 1 << (32 - __clz(static_cast<int>(count - 1)));
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
    auto* histograms = reinterpret_cast<Histogram*>(work_);
    uint64_t tokens = 0, weight = 0;  // above `high`
    for (;;) {
      // Two histograms in turn: who has passed the barrier of the cluster below has read the one
      // before, here and in the previous selection.
      histogram_ ^= 1;
      Histogram& own = histograms[histogram_];
      const int bits = 64 - __clzll(static_cast<long long>(high - low));
      const int shift = max(bits - 9, 0);
      own.count[threadIdx.x] = own.weight_low[threadIdx.x] = own.weight_high[threadIdx.x] = 0;
      __syncthreads();
      const float least = key_logit(rank_key(low)), most = key_logit(rank_key(high));
      for_each([&](int32_t first, const float4& x) {
        const float logits[4] = {x.x, x.y, x.z, x.w};
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          if (!(logits[i] >= least && logits[i] <= most)) continue;
          const uint64_t rank = rank_of(order_key(logits[i]), first + i);
          if (rank < low || rank > high) continue;
          const auto bucket = static_cast<int>((rank - low) >> shift);
          const uint64_t w = fixed_weight(logits[i], scale);
          const auto w_low = static_cast<uint32_t>(w);
          atomicAdd(&own.count[bucket], 1u);
          const uint32_t sum_low = atomicAdd(&own.weight_low[bucket], w_low) + w_low;
          const uint32_t carry = static_cast<uint32_t>(w >> 32) + (sum_low < w_low ? 1u : 0u);
          if (carry != 0) atomicAdd(&own.weight_high[bucket], carry);
        }
      });
      cluster_.sync();
      // Thread t takes bucket 511 - t: in order of rank.
      const int bucket = kBuckets - 1 - static_cast<int>(threadIdx.x);
      uint64_t bucket_tokens = 0, bucket_weight = 0;
      for (int cta = 0; cta < kCtas; ++cta) {
        const Histogram* of = cluster_.map_shared_rank(&own, cta);
        bucket_tokens += of->count[bucket];
        bucket_weight += of->weight_low[bucket] + (uint64_t{of->weight_high[bucket]} << 32);
      }
      const uint64_t sum_tokens =
          tokens + block_inclusive_sum<kWarps>(bucket_tokens, shared_.partials);
      const uint64_t sum_weight =
          weight + block_inclusive_sum<kWarps>(bucket_weight, shared_.partials);
      const int first = __syncthreads_count(!aim.reached(sum_tokens, sum_weight));
      if (static_cast<int>(threadIdx.x) == min(first, kBuckets - 1)) {
        shared_.found[0] = sum_tokens;
        shared_.found[1] = sum_weight;
        shared_.found[2] = bucket_tokens;
        shared_.found[3] = bucket_weight;
      }
      __syncthreads();
      if (first == kBuckets) return {low, shared_.found[1]};
      low += uint64_t{static_cast<uint32_t>(kBuckets - 1 - first)} << shift;
      if (shift == 0 || shared_.found[2] == 1) return {low, shared_.found[1]};
      high = min(high, low + ((uint64_t{1} << shift) - 1));
      tokens = shared_.found[0] - shared_.found[2];
      weight = shared_.found[1] - shared_.found[3];
    }
  }

  // --- masks, bias, penalties ------------------------------------------------------------------

  __device__ bool has_rules() const {
    return row_.banned.count + row_.bias.count + row_.prompt.count + row_.output.count > 0;
  }

  // Calls fn(place in the slice) for the tokens of a list that lie in the slice.
  template <typename Fn>
  __device__ void for_listed(WordRange list, Fn fn) const {
    const uint32_t* words = launch_.step->words + list.begin;
    const int count = min(slice_size_, launch_.vocab - base_);
    for (uint32_t i = threadIdx.x; i < list.count; i += kThreads) {
      const auto token = static_cast<int32_t>(words[i]);
      if (token >= base_ && token - base_ < count) fn(token - base_);
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
    if (row_.repetition_penalty != 1.f) {
      mark(row_.prompt, row_.output);
      const float penalty = row_.repetition_penalty;
      for_marked([&](int at) {
        const float x = slice_[at];
        slice_[at] = x > 0.f ? __fdiv_rn(x, penalty) : __fmul_rn(x, penalty);
      });
      __syncthreads();
    }
    if (row_.presence_penalty != 0.f || row_.frequency_penalty != 0.f) penalize_output();
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

  __device__ uint32_t* marks() const { return reinterpret_cast<uint32_t*>(work_); }
  // Calls fn(place in the slice) for the marked tokens, each once.
  template <typename Fn>
  __device__ void for_marked(Fn fn) const {
    for (int word = static_cast<int>(threadIdx.x); word < slice_size_ / 32; word += kThreads) {
      for (uint32_t bits = marks()[word]; bits != 0; bits &= bits - 1) {
        fn(word * 32 + __ffs(static_cast<int>(bits)) - 1);
      }
    }
  }
  __device__ void mark(WordRange first, WordRange second) {
    for (int i = static_cast<int>(threadIdx.x); i < slice_size_ / 32; i += kThreads) marks()[i] = 0;
    __syncthreads();
    const auto set = [&](int at) { atomicOr(&marks()[at / 32], 1u << (at % 32)); };
    for_listed(first, set);
    for_listed(second, set);
    __syncthreads();
  }

  // Counts lie packed, by the place of a token among the marked ones: as many as there are distinct
  // output tokens, a window at a time.
  __device__ void penalize_output() {
    mark(row_.output, {0, 0});
    const int num_words = slice_size_ / 32;
    uint32_t* before = marks() + num_words;  // marked tokens before each word
    uint32_t* counts = before + num_words;
    int distinct = 0;
    for (int start = 0; start < num_words; start += kThreads) {
      const int word = start + static_cast<int>(threadIdx.x);
      const int own = word < num_words ? __popc(marks()[word]) : 0;
      const auto sum = static_cast<int>(
          block_inclusive_sum<kWarps>(static_cast<uint64_t>(own), shared_.partials));
      if (word < num_words) before[word] = static_cast<uint32_t>(distinct + sum - own);
      if (threadIdx.x == kThreads - 1) shared_.found[0] = static_cast<uint64_t>(sum);
      __syncthreads();
      distinct += static_cast<int>(shared_.found[0]);
    }
    const auto place = [&](int at) {
      return static_cast<int>(before[at / 32]) +
             __popc(marks()[at / 32] & ((1u << (at % 32)) - 1u));
    };
    for (int window = 0; window < distinct; window += kCountWindow) {
      for (int i = static_cast<int>(threadIdx.x); i < kCountWindow; i += kThreads) counts[i] = 0;
      __syncthreads();
      for_listed(row_.output, [&](int at) {
        const int i = place(at) - window;
        if (i >= 0 && i < kCountWindow) atomicAdd(&counts[i], 1u);
      });
      __syncthreads();
      for_marked([&](int at) {
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
    const float max_logit = key_logit(rank_key(best));
    const WeightScale scale{max_logit, row_.inverse_temperature};
    Cut cut{fminf(max_logit, max_logit + row_.min_p_offset), UINT32_MAX};
    const bool has_top_p = row_.top_p < 1.f;
    if (row_.top_k > 0 && row_.top_k <= kSlots) {
      const uint32_t least = max(bound_of(row_.top_k), order_key(cut.logit));
      const uint32_t found = gather(uint64_t{least} << 32);
      if (found <= kMaxCandidates) {
        if (cta_ == 0) draw_from_candidates(scale, static_cast<int>(found));
        return;
      }
    }
    if (row_.top_k > 0 || has_top_p) {
      // Tokens without weight cannot be drawn: whether they are kept makes no difference.
      uint64_t low = rank_at_least(fmaxf(cut.logit, max_logit - kLastWeight * row_.temperature));
      uint64_t total = 0;
      if (row_.top_k > 0) {
        const Selection top = select(scale, low, best, {row_.top_k});
        low = top.rank;
        total = top.weight;
      } else {
        total = exchange_sum(lane_weight(scale, cut));
      }
      if (has_top_p) {
        // Leaving out all tokens below w, each at most w, loses at most vocab * w. So the nucleus
        // lies above w = (1 - top_p) * total / vocab; a tenth in the exponent allows for rounding.
        const float mass = static_cast<float>(total) * 0x1p-40f;
        const float depth =
            logf(static_cast<float>(launch_.vocab) / ((1.f - row_.top_p) * mass)) + 0.1f;
        low = max(low, rank_at_least(max_logit - fmaxf(depth, 0.f) * row_.temperature));
        low = select(scale, low, best, {0, double{row_.top_p} * static_cast<double>(total)}).rank;
      }
      cut = {key_logit(rank_key(low)), static_cast<uint32_t>(rank_token(low))};
    }
    draw_from_slices(scale, cut);
  }

  static __device__ uint64_t rank_at_least(float logit) {
    return uint64_t{max(order_key(logit), kLowestKey)} << 32;
  }

  // Walks the warps' sums to the warp that holds the point; that one walks its tokens.
  __device__ void draw_from_slices(WeightScale scale, Cut cut) {
    exchange(warp_sum(lane_weight(scale, cut)));
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

    for (int step = first_step_; step < last_step_; ++step) {
      const int at = step * kStep + lane_ * 4;
      uint64_t weights[4];
      uint64_t own = 0;
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float logit = slice_[at + i];
        weights[i] = cut.keeps(logit, base_ + at + i) ? fixed_weight(logit, scale) : 0;
        own += weights[i];
      }
      const uint64_t up_to = warp_inclusive_sum(own);
      const uint64_t step_sum = __shfl_sync(kFullWarp, up_to, 31);
      if (step_sum <= point) {
        point -= step_sum;
        continue;
      }
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
  }

  // Block 0 alone. The candidates lie in work_ in order of ids; they are the first tokens in order
  // of rank, at least top_k of them or all above the floor.
  __device__ void draw_from_candidates(WeightScale scale, int found) {
    auto* by_id = reinterpret_cast<uint64_t*>(slice_);
    for (int i = static_cast<int>(threadIdx.x); i < found; i += kThreads) by_id[i] = work_[i];
    sort_candidates(static_cast<uint32_t>(found));

    const int kept = min(row_.top_k, found);
    const int at = 2 * static_cast<int>(threadIdx.x);
    const auto weight = [&](uint64_t rank) {
      return fixed_weight(key_logit(rank_key(rank)), scale);
    };
    const uint64_t first = at < kept ? weight(work_[at]) : 0;
    const uint64_t second = at + 1 < kept ? weight(work_[at + 1]) : 0;
    const uint64_t up_to = block_inclusive_sum<kWarps>(first + second, shared_.partials);
    if (static_cast<int>(threadIdx.x) == (kept - 1) / 2) shared_.found[0] = up_to;
    __syncthreads();
    uint64_t total = shared_.found[0];
    uint64_t last = work_[kept - 1];
    if (row_.top_p < 1.f) {
      const double aim = double{row_.top_p} * static_cast<double>(total);
      const bool second_reaches = static_cast<double>(up_to) >= aim;
      const bool first_reaches = static_cast<double>(up_to - second) >= aim;
      const int owner = __syncthreads_count(!second_reaches);  // total reaches it: a thread does
      if (static_cast<int>(threadIdx.x) == owner) {
        shared_.found[1] = first_reaches ? up_to - second : up_to;
        shared_.found[2] = work_[first_reaches ? at : at + 1];
      }
      __syncthreads();
      total = shared_.found[1];
      last = shared_.found[2];
    }

    const uint64_t point = point_of(total);
    const uint64_t a = at < found && by_id[at] >= last ? weight(by_id[at]) : 0;
    const uint64_t b = at + 1 < found && by_id[at + 1] >= last ? weight(by_id[at + 1]) : 0;
    const uint64_t sum = block_inclusive_sum<kWarps>(a + b, shared_.partials);
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
  const DeviceSamplingRow& row_;
  const float* raw_;  // [vocab]
  DeviceSampledToken& result_;
  Shared& shared_;
  cg::cluster_group cluster_ = cg::this_cluster();
  const int cta_, lane_, warp_;
  const int slice_size_, base_;       // logits of this block: ids [base_, base_ + slice_size_)
  const int first_step_, last_step_;  // of them, this warp's
  float* slice_;                      // [slice_size_]
  uint64_t* work_;                    // work_bytes()
  int phase_ = 0, histogram_ = 0;     // which of two is in use
  uint64_t values_[kLaneSlots];       // of the last exchange, this lane's
  float normalizer_ = 0.f;            // log of the sum of e^logit over the raw row
};

template <int kCtas>
__global__ __launch_bounds__(kThreads,
                             2) void sample_kernel(const __grid_constant__ SamplingLaunch launch) {
  __shared__ typename RowSampler<kCtas>::Shared shared;
  extern __shared__ __align__(16) std::byte dynamic[];
  const int row = static_cast<int>(blockIdx.x) / kCtas;
  if (row >= launch.step->num_rows) return;  // fills the batch up
  RowSampler<kCtas>(launch, row, shared, dynamic).run();
}

constexpr int kClusterBlocks = 8;  // the largest portable cluster

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
  CUDA_CHECK(cudaFuncSetAttribute(sample_kernel<kClusterBlocks>,
                                  cudaFuncAttributeMaxDynamicSharedMemorySize,
                                  dynamic_bytes(vocab)));
}

void launch_sampling(cudaStream_t stream, const SamplingLaunch& launch) {
  if (launch.num_rows == 0) return;
  cudaLaunchAttribute cluster{};
  cluster.id = cudaLaunchAttributeClusterDimension;
  cluster.val.clusterDim = {kClusterBlocks, 1, 1};
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(launch.num_rows * kClusterBlocks));
  config.blockDim = dim3(kThreads);
  config.dynamicSmemBytes = static_cast<size_t>(dynamic_bytes(launch.vocab));
  config.stream = stream;
  config.attrs = &cluster;
  config.numAttrs = 1;
  CUDA_CHECK(cudaLaunchKernelEx(&config, sample_kernel<kClusterBlocks>, launch));
  CUDA_CHECK(cudaGetLastError());
}

}  // namespace kvarn::cuda
