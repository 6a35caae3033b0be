#include "engine/memory_plan.h"

#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <string>

#include "engine/host_memory.h"
#include "engine/kv_capacity.h"

namespace kvarn {
namespace {

std::string mib(size_t bytes) {
  return fmt::format("{:.1f} MiB", static_cast<double>(bytes) / (1 << 20));
}

size_t most_useful_bytes(const EngineConfig& config, const PoolDemand& demand) {
  return static_cast<size_t>(peak_pages(demand.layout, demand.max_len)) *
         static_cast<size_t>(config.max_num_seqs) * demand.page_id_bytes;
}

int64_t fewest_pages(const PoolDemand& demand) {
  return peak_pages(demand.layout, std::min(demand.max_len, kBlockTokens));
}

// `advice`: the flags that make room.
Result<int64_t> whole_pages(const PoolDemand& demand, size_t budget, const std::string& advice) {
  const auto pages = static_cast<int64_t>(budget / demand.page_id_bytes);
  const int64_t fewest = fewest_pages(demand);
  if (pages >= fewest) return pages;
  return Status::resource_exhausted(
      fmt::format("a KV pool of {} holds {} pages of {} but one sequence of {} tokens needs {}; {}",
                  mib(budget), pages, mib(demand.page_id_bytes),
                  std::min(demand.max_len, kBlockTokens), fewest, advice));
}

std::string set_kv_memory(const PoolDemand& demand) {
  return fmt::format("set --kv-memory to at least {} bytes",
                     static_cast<size_t>(fewest_pages(demand)) * demand.page_id_bytes);
}

}  // namespace

Result<int64_t> host_pool_pages(const EngineConfig& config, const PoolDemand& demand,
                                size_t other_bytes) {
  const uint64_t free_bytes = available_host_memory();
  if (!config.kv_memory.empty()) {
    KVARN_ASSIGN_OR_RETURN(const uint64_t asked, parse_bytes(config.kv_memory));
    if (free_bytes > 0 && asked + other_bytes > free_bytes) {
      return Status::resource_exhausted(
          fmt::format("--kv-memory {} and {} of workspace exceed the {} of free memory; lower "
                      "--kv-memory or --max-num-batched-tokens",
                      config.kv_memory, mib(other_bytes), mib(free_bytes)));
    }
    return whole_pages(demand, asked, set_kv_memory(demand));
  }
  if (free_bytes == 0) {
    return Status::failed_precondition(
        "cannot tell how much memory is free on this system; set --kv-memory, e.g. 1GiB");
  }
  return whole_pages(demand, std::min<size_t>(free_bytes / 4, most_useful_bytes(config, demand)),
                     set_kv_memory(demand));
}

Result<int64_t> device_pool_pages(const EngineConfig& config, const PoolDemand& demand,
                                  const DeviceMemory& now) {
  const size_t left = now.free_bytes - std::min(now.free_bytes, kDeviceMarginBytes);
  if (!config.kv_memory.empty()) {
    KVARN_ASSIGN_OR_RETURN(const uint64_t asked, parse_bytes(config.kv_memory));
    if (asked > left) {
      return Status::resource_exhausted(fmt::format(
          "--kv-memory {} exceeds what weights and workspace leave of the GPU's {}: at most {} "
          "bytes fit; lower it or --max-num-batched-tokens",
          config.kv_memory, mib(now.total_bytes), left));
    }
    return whole_pages(demand, asked, set_kv_memory(demand));
  }
  const auto share =
      static_cast<size_t>(config.gpu_memory_utilization * static_cast<double>(now.total_bytes));
  const size_t taken = now.total_bytes - now.free_bytes + kDeviceMarginBytes;
  const size_t budget = share - std::min(share, taken);
  const size_t least = taken + static_cast<size_t>(fewest_pages(demand)) * demand.page_id_bytes;
  return whole_pages(
      demand, std::min(budget, most_useful_bytes(config, demand)),
      fmt::format(
          "{} of the GPU's {} are taken before it: raise --gpu-memory-utilization ({:.2f}, "
          "at least {:.3f}), or lower --max-num-batched-tokens or --max-num-seqs",
          mib(taken), mib(now.total_bytes), config.gpu_memory_utilization,
          std::ceil(1e3 * static_cast<double>(least) / static_cast<double>(now.total_bytes)) /
              1e3));
}

}  // namespace kvarn
