// Pages between the CPU's order (kv_layout.h) and the GPU's (kv_device_layout.h), for tests that
// compare the two backends.
#pragma once

#include <cstddef>
#include <vector>

#include "kernels/kv_layout.h"

namespace kvarn::test {

// One page: a coded tile, or exact rows.
std::vector<std::byte> coded_page_to_device(const KvLayout& layout, const std::byte* cpu_page);
std::vector<std::byte> coded_page_to_cpu(const KvLayout& layout, const std::byte* device_page);
std::vector<std::byte> exact_page_to_device(const KvLayout& layout, const std::byte* cpu_page);
std::vector<std::byte> exact_page_to_cpu(const KvLayout& layout, const std::byte* device_page);

}  // namespace kvarn::test
