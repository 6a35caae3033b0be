// The bytes behind page ids: one buffer, allocated once, never grown. Page id p of layer l and KV
// head h lies at ((l * num_pages + p) * kv_heads + h) * page_bytes, so a layer's pages are
// [page][kv_head][page_bytes] and every id owns the same room in every layer. Who holds which id is
// the block manager's business. Immutable after construction; the bytes are the worker thread's.
#pragma once

#include <cstdint>
#include <vector>

#include "kernels/backend.h"
#include "models/forward_input.h"

namespace kvarn {

class KvPool {
 public:
  // Throws std::bad_alloc.
  KvPool(Backend& backend, const KvLayout& layout, int num_layers, int kv_heads, int64_t num_pages);

  // Bytes that one page id takes over all layers and heads.
  static size_t page_id_bytes(const KvLayout& layout, int num_layers, int kv_heads);

  KvCacheView view() const { return {layers_, layout_}; }
  const KvLayout& layout() const { return layout_; }
  int64_t num_pages() const { return num_pages_; }
  size_t bytes() const { return buffer_.bytes(); }

 private:
  KvLayout layout_;
  int64_t num_pages_;
  Buffer buffer_;
  std::vector<KvLayerView> layers_;
};

}  // namespace kvarn
