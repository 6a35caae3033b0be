// Stores this step's K and V rows, rounded to fp16 by the projection, in the exact pages named by
// their slots. Bytes are copied: what attention reads from a page is what it would read from the
// rows themselves.
#include <cstring>

#include "kernels/kv_cpu.h"

namespace kvarn::cpu {

void kv_write(const KvWriteParams& params, ThreadPool& pool) {
  const KvLayout& layout = params.layer.layout;
  const int kv_heads = params.layer.kv_heads, head_dim = layout.head_dim;
  const int64_t rows = params.k.empty() ? 0 : params.k.dim(0);
  if (rows == 0) return;
  CHECK(params.k.dims() == 3 && params.k.dim(1) == kv_heads && params.k.dim(2) == head_dim,
        "kv_write: k is [rows, kv_heads, head_dim]");
  CHECK(params.v.dims() == 3 && params.v.dim(0) == rows && params.v.dim(1) == kv_heads &&
            params.v.dim(2) == head_dim,
        "kv_write: v has the shape of k");
  const half* k = params.k.data<half>();
  const half* v = params.v.data<half>();
  const size_t row_bytes = sizeof(half) * static_cast<size_t>(head_dim);
  constexpr int64_t kGrain = 64;  // rows: a copy is too short to wake a thread for less
  pool.parallel_for(rows, kGrain, [&](int64_t begin, int64_t end, int) {
    for (int64_t row = begin; row < end; ++row) {
      const int64_t slot = params.slots[row];
      if (slot < 0) continue;
      const int64_t page = slot / layout.exact_rows;
      const int page_row = static_cast<int>(slot % layout.exact_rows);
      CHECK(page < params.layer.num_pages, "kv_write: a slot names a page of this pool");
      for (int head = 0; head < kv_heads; ++head) {
        std::byte* to = params.layer.data + (page * kv_heads + head) * layout.page_bytes;
        const int64_t from = (row * kv_heads + head) * head_dim;
        std::memcpy(to + layout.k_row_offset(page_row), k + from, row_bytes);
        std::memcpy(to + layout.v_row_offset(page_row), v + from, row_bytes);
      }
    }
  });
}

}  // namespace kvarn::cpu
