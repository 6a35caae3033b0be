// Rows reach exactly the places that their slots name, in the device's order, for random tables.
#include <gtest/gtest.h>

#include <algorithm>
#include <cstring>
#include <numeric>
#include <random>

#include "kernels/ops_cuda.h"
#include "tests/support/cuda_fixture.h"
#include "tests/support/device_pages.h"

namespace kvarn {
namespace {

using test::DeviceArray;
using CudaKvWriteTest = test::CudaTest;

TEST_F(CudaKvWriteTest, WritesEachRowToItsSlotAndNothingElse) {
  struct Case {
    KvFormat format;
    int head_dim, heads, pages;
    size_t rows;
  };
  const Case cases[] = {
      {KvFormat::kKvarnK4V2, 128, 1, 3, 0},   {KvFormat::kKvarnK4V2, 128, 3, 2, 1},
      {KvFormat::kKvarnK4V2, 128, 8, 9, 127}, {KvFormat::kKvarnK4V4, 128, 4, 9, 128},
      {KvFormat::kKvarnK4V4, 128, 1, 9, 129}, {KvFormat::kFp16, 64, 2, 9, 128},
      {KvFormat::kFp16, 128, 8, 9, 129},      {KvFormat::kFp16, 256, 1, 5, 127}};
  std::mt19937_64 engine(7);
  for (const Case& c : cases) {
    SCOPED_TRACE(testing::Message()
                 << kv_format_name(c.format) << ", head_dim " << c.head_dim << ", rows " << c.rows);
    const KvLayout layout = make_kv_layout(c.format, c.head_dim);
    const auto heads = static_cast<size_t>(c.heads), dim = static_cast<size_t>(c.head_dim);
    const size_t page_bytes = static_cast<size_t>(layout.page_bytes);
    std::vector<int64_t> slots(static_cast<size_t>(c.pages * layout.exact_rows));
    std::iota(slots.begin(), slots.end(), 0);
    std::shuffle(slots.begin(), slots.end(), engine);
    ASSERT_LE(c.rows, slots.size());
    slots.resize(c.rows);
    for (int64_t& slot : slots)
      if (engine() % 5 == 0) slot = -1;
    std::vector<half> k(c.rows * heads * dim), v(k.size());
    for (std::vector<half>* x : {&k, &v})
      for (half& h : *x) h.bits = static_cast<uint16_t>(engine());  // NaN too: bytes are copied
    std::vector<std::byte> expected(static_cast<size_t>(c.pages) * heads * page_bytes,
                                    std::byte{0xff});
    for (size_t r = 0; r < c.rows; ++r) {
      if (slots[r] < 0) continue;
      const auto page = static_cast<size_t>(slots[r] / layout.exact_rows);
      const int row = static_cast<int>(slots[r] % layout.exact_rows);
      for (size_t h = 0; h < heads; ++h) {
        std::byte* to = expected.data() + (page * heads + h) * page_bytes;
        std::memcpy(to + layout.k_row_offset(row), &k[(r * heads + h) * dim], 2 * dim);
        std::memcpy(to + layout.v_row_offset(row), &v[(r * heads + h) * dim], 2 * dim);
      }
    }
    for (size_t at = 0; at < expected.size(); at += page_bytes) {
      const auto page = test::exact_page_to_device(layout, expected.data() + at);
      std::copy(page.begin(), page.end(), expected.begin() + static_cast<ptrdiff_t>(at));
    }
    const DeviceArray<half> device_k(k), device_v(v);
    const DeviceArray<int64_t> device_slots(slots);
    const DeviceArray<std::byte> pages(expected.size());
    const auto n = static_cast<int64_t>(c.rows);
    cuda::kv_write(stream_, {Tensor::of(device_k.data(), {n, c.heads, c.head_dim}),
                             Tensor::of(device_v.data(), {n, c.heads, c.head_dim}),
                             device_slots.data(),
                             {pages.data(), c.pages, c.heads, layout}});
    wait();
    ASSERT_TRUE(pages.host() == expected);
  }
}

}  // namespace
}  // namespace kvarn
