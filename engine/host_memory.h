// How much memory this process may still take: what the kernel calls available, and no more than
// the container's limit leaves.
#pragma once

#include <cstdint>
#include <filesystem>
#include <optional>
#include <string_view>

namespace kvarn {

// Bytes; 0 when nothing can be read (no /proc).
uint64_t available_host_memory();

// MemAvailable of a /proc/meminfo text, in bytes.
std::optional<uint64_t> parse_mem_available(std::string_view meminfo);
// limit - usage of the control group whose files lie in `cgroup` (version 2 or 1); none without a
// limit.
std::optional<uint64_t> cgroup_memory_left(const std::filesystem::path& cgroup);

}  // namespace kvarn
