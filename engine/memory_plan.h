// How much memory the KV pool gets: what was asked for, or a share of what the device has left, and
// never more than max_num_seqs sequences of full length can use. Errors name the flag and the
// number that would fit. Pure but for reading how much host memory is free.
#pragma once

#include <cstddef>
#include <cstdint>

#include "engine/config.h"
#include "kernels/backend.h"

namespace kvarn {

// What start-up decided about memory; printed by `serve` and `inspect`.
struct MemoryPlan {
  size_t weight_bytes = 0, workspace_bytes = 0, pool_bytes = 0;
  int64_t num_pages =
      0;  // of one (layer set): each id has page_bytes for every (layer, local KV head)
  size_t page_id_bytes = 0;  // bytes of one page id over all layers and KV heads
};

// What the pool is for.
struct PoolDemand {
  KvLayout layout;
  int max_len = 0;           // tokens of the longest sequence
  size_t page_id_bytes = 0;  // over all layers and heads
};

// Recorded steps, and what the driver takes while serving: kept out of the pool's share.
constexpr size_t kDeviceMarginBytes = size_t{256} << 20;

// On the host: `other_bytes` (workspace) are still to be taken.
Result<int64_t> host_pool_pages(const EngineConfig& config, const PoolDemand& demand,
                                size_t other_bytes);
// On a GPU, with weights, workspace and a warmed-up library taken already: `now`.
Result<int64_t> device_pool_pages(const EngineConfig& config, const PoolDemand& demand,
                                  const DeviceMemory& now);

}  // namespace kvarn
