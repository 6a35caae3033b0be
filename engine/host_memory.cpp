#include "engine/host_memory.h"

#include <algorithm>
#include <charconv>
#include <fstream>
#include <iterator>
#include <string>

namespace kvarn {
namespace {

std::optional<std::string> read_text(const std::filesystem::path& path) {
  std::ifstream in(path);
  if (!in) return std::nullopt;
  return std::string(std::istreambuf_iterator<char>(in), {});
}

std::optional<uint64_t> leading_number(std::string_view text) {
  text.remove_prefix(std::min(text.find_first_not_of(" \t"), text.size()));
  uint64_t value = 0;
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), value);
  if (error != std::errc()) return std::nullopt;  // "max": no limit
  return value;
}

std::optional<uint64_t> read_number(const std::filesystem::path& path) {
  const std::optional<std::string> text = read_text(path);
  return text ? leading_number(*text) : std::nullopt;
}

// File pages that the kernel drops before it kills anybody: mapped weights just read would
// otherwise count as taken. "name value" lines; 0 where the name is missing.
uint64_t stat_value(const std::filesystem::path& stat, std::string_view name) {
  std::ifstream in(stat);
  std::string key;
  for (uint64_t value = 0; in >> key >> value;) {
    if (key == name) return value;
  }
  return 0;
}

}  // namespace

std::optional<uint64_t> parse_mem_available(std::string_view meminfo) {
  constexpr std::string_view kKey = "MemAvailable:";
  const size_t at = meminfo.find(kKey);
  if (at == std::string_view::npos) return std::nullopt;
  const std::optional<uint64_t> kib = leading_number(meminfo.substr(at + kKey.size()));
  if (!kib) return std::nullopt;
  return *kib * 1024;
}

std::optional<uint64_t> cgroup_memory_left(const std::filesystem::path& cgroup) {
  std::optional<uint64_t> limit = read_number(cgroup / "memory.max");
  std::optional<uint64_t> usage = read_number(cgroup / "memory.current");
  uint64_t reclaimable = stat_value(cgroup / "memory.stat", "inactive_file");
  if (!limit || !usage) {
    limit = read_number(cgroup / "memory" / "memory.limit_in_bytes");
    usage = read_number(cgroup / "memory" / "memory.usage_in_bytes");
    reclaimable = stat_value(cgroup / "memory" / "memory.stat", "total_inactive_file");
  }
  constexpr uint64_t kUnlimited = uint64_t{1} << 60;  // version 1 writes a huge number for none
  if (!limit || !usage || *limit >= kUnlimited) return std::nullopt;
  const uint64_t held = *usage - std::min(*usage, reclaimable);
  return *limit > held ? *limit - held : 0;
}

uint64_t available_host_memory() {
  const std::optional<std::string> meminfo = read_text("/proc/meminfo");
  uint64_t available = meminfo ? parse_mem_available(*meminfo).value_or(0) : 0;
  if (const auto left = cgroup_memory_left("/sys/fs/cgroup")) {
    available = available == 0 ? *left : std::min(available, *left);
  }
  return available;
}

}  // namespace kvarn
