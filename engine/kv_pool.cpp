#include "engine/kv_pool.h"

namespace kvarn {

size_t KvPool::page_id_bytes(const KvLayout& layout, int num_layers, int kv_heads) {
  return static_cast<size_t>(layout.page_bytes) * static_cast<size_t>(num_layers) *
         static_cast<size_t>(kv_heads);
}

KvPool::KvPool(Backend& backend, const KvLayout& layout, int num_layers, int kv_heads,
               int64_t num_pages)
    : layout_(layout),
      num_pages_(num_pages),
      buffer_(backend.allocate(page_id_bytes(layout, num_layers, kv_heads) *
                               static_cast<size_t>(num_pages))) {
  const size_t layer_bytes = page_id_bytes(layout, 1, kv_heads) * static_cast<size_t>(num_pages);
  for (int layer = 0; layer < num_layers; ++layer) {
    layers_.push_back(
        {buffer_.data() + static_cast<size_t>(layer) * layer_bytes, num_pages, kv_heads, layout});
  }
}

}  // namespace kvarn
