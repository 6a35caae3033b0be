#include "engine/kv_pool.h"

#include <gtest/gtest.h>

namespace kvarn {
namespace {

TEST(KvPoolTest, LayersLieBesideEachOtherInOneBufferOfExactSize) {
  const std::unique_ptr<Backend> backend = make_cpu_backend({.threads = 1});
  const KvLayout layout = make_kv_layout(KvFormat::kKvarnK4V2, 128);
  const KvPool pool(*backend, layout, /*num_layers=*/3, /*kv_heads=*/2, /*num_pages=*/5);
  EXPECT_EQ(KvPool::page_id_bytes(layout, 3, 2), 3u * 2 * 13824);
  EXPECT_EQ(pool.bytes(), 5u * 3 * 2 * 13824);
  const KvCacheView view = pool.view();
  ASSERT_EQ(view.layers.size(), 3u);
  for (size_t layer = 0; layer < 3; ++layer) {
    EXPECT_EQ(view.layers[layer].num_pages, 5);
    EXPECT_EQ(view.layers[layer].kv_heads, 2);
    EXPECT_EQ(view.layers[layer].data - view.layers[0].data,
              static_cast<std::ptrdiff_t>(layer) * 5 * 2 * 13824);
  }
}

}  // namespace
}  // namespace kvarn
