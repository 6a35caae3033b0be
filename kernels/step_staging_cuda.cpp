#include "kernels/step_staging_cuda.h"

#include <cstring>

#include "kernels/core/check.h"
#include "kernels/cuda_check.h"
#include "kernels/cuda_memory.h"

namespace kvarn::cuda {
namespace {

constexpr size_t kAlignment = 256;  // of every array: whole memory sectors, any vector load
// A copy costs its launch, about 2 us; in that time PCIe moves this many bytes. Gaps up to here are
// copied with their neighbours.
constexpr size_t kCheaperThanACopy = size_t{32} << 10;

template <typename T>
size_t bytes_of(int64_t count) {
  return static_cast<size_t>(count) * sizeof(T);
}

}  // namespace

StepStaging::StepStaging(const StepLimits& limits, size_t max_decode_plan, size_t max_prefill_plan)
    : token_ids_(place(bytes_of<int32_t>(limits.max_rows))),
      positions_(place(bytes_of<int32_t>(limits.max_rows))),
      slots_(place(bytes_of<int64_t>(limits.max_rows))),
      sequences_(place(bytes_of<AttentionSequence>(limits.max_sequences))),
      logit_rows_(place(bytes_of<int32_t>(limits.max_logit_rows))),
      tiles_(place(bytes_of<EncodeTile>(limits.max_encode_tiles))),
      decode_plan_(place(max_decode_plan)),
      prefill_plan_(place(max_prefill_plan)),
      block_pages_(place(bytes_of<BlockPages>(limits.max_blocks))),
      host_(allocate_pinned(size_)),
      device_(allocate_device(size_)) {
  std::memset(host_.data(), 0, size_);  // gaps are copied too
}

StepStaging::Region StepStaging::place(size_t bytes) {
  const Region region{size_, bytes};
  size_ += (bytes + kAlignment - 1) / kAlignment * kAlignment;
  return region;
}

StepInput StepStaging::send(cudaStream_t stream, const StepInput& step, size_t decode_plan_bytes,
                            size_t prefill_plan_bytes) {
  stream_ = stream;
  copy_begin_ = copy_end_ = 0;
  StepInput sent = step;
  // In the order of their offsets.
  sent.token_ids = stage(step.token_ids, token_ids_);
  sent.positions = stage(step.positions, positions_);
  sent.slots = stage(step.slots, slots_);
  sent.sequences = stage(step.sequences, sequences_);
  sent.logit_rows = stage(step.logit_rows, logit_rows_);
  sent.encode_before = stage(step.encode_before, tiles_);
  sent.encode_in_layer = stage(step.encode_in_layer, tiles_, step.encode_before.size());
  use(decode_plan_, decode_plan_bytes);
  use(prefill_plan_, prefill_plan_bytes);
  sent.block_pages = stage(step.block_pages, block_pages_);
  flush();
  return sent;
}

// Elements of `from` behind `skip` others of the region.
template <typename T>
std::span<const T> StepStaging::stage(std::span<const T> from, const Region& region, size_t skip) {
  const size_t begin = region.offset + skip * sizeof(T);
  CHECK(skip * sizeof(T) + from.size_bytes() <= region.bytes,
        "the step is within the limits of reserve()");
  if (!from.empty()) {
    std::memcpy(host_.data() + begin, from.data(), from.size_bytes());
    use({begin, from.size_bytes()}, from.size_bytes());
  }
  return {reinterpret_cast<const T*>(device_.data() + begin), from.size()};
}

// Adds the first bytes of a region to the copy, or begins the next one.
void StepStaging::use(const Region& region, size_t bytes) {
  CHECK(bytes <= region.bytes, "a plan is within its max_plan_bytes()");
  if (bytes == 0) return;
  if (copy_end_ > copy_begin_ && region.offset - copy_end_ > kCheaperThanACopy) flush();
  if (copy_end_ == copy_begin_) copy_begin_ = region.offset;
  copy_end_ = region.offset + bytes;
}

void StepStaging::flush() {
  if (copy_end_ > copy_begin_) {
    CUDA_CHECK(cudaMemcpyAsync(device_.data() + copy_begin_, host_.data() + copy_begin_,
                               copy_end_ - copy_begin_, cudaMemcpyHostToDevice, stream_));
  }
  copy_begin_ = copy_end_ = 0;
}

}  // namespace kvarn::cuda
