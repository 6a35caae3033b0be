// Row look-ups: token embedding (widened to fp32) and gather of activation rows.
#include <cstring>

#include "kernels/ops_cpu.h"

namespace kvarn::cpu {
namespace {

template <typename T>
void embed_rows(const int32_t* token_ids, Tensor table, Tensor out, ThreadPool& pool) {
  const int64_t hidden = out.row_size(), vocab = table.dim(0);
  const T* from = table.data<T>();
  float* to = out.data<float>();
  pool.parallel_for(out.dim(0), 16, [&](int64_t begin, int64_t end, int) {
    for (int64_t row = begin; row < end; ++row) {
      CHECK(token_ids[row] >= 0 && token_ids[row] < vocab, "token id outside the vocabulary");
      const T* source = from + int64_t{token_ids[row]} * hidden;
      for (int64_t i = 0; i < hidden; ++i) to[row * hidden + i] = to_float(source[i]);
    }
  });
}

}  // namespace

void embed(const int32_t* token_ids, Tensor table, Tensor out, ThreadPool& pool) {
  switch (table.dtype()) {
    case DType::kBF16:
      return embed_rows<bf16>(token_ids, table, out, pool);
    case DType::kF16:
      return embed_rows<half>(token_ids, table, out, pool);
    case DType::kF32:
      return embed_rows<float>(token_ids, table, out, pool);
    default:
      CHECK(false, "an embedding table is bf16, f16 or f32");
  }
}

void gather_rows(Tensor x, std::span<const int32_t> rows, Tensor y, ThreadPool& pool) {
  const size_t row_bytes = static_cast<size_t>(x.row_size()) * dtype_bytes(x.dtype());
  const std::byte* from = static_cast<const std::byte*>(x.raw());
  std::byte* to = static_cast<std::byte*>(y.raw());
  pool.parallel_for(static_cast<int64_t>(rows.size()), 16, [&](int64_t begin, int64_t end, int) {
    for (int64_t i = begin; i < end; ++i) {
      const int32_t row = rows[static_cast<size_t>(i)];
      CHECK(row >= 0 && row < x.dim(0), "gathered row");
      std::memcpy(to + static_cast<size_t>(i) * row_bytes,
                  from + static_cast<size_t>(row) * row_bytes, row_bytes);
    }
  });
}

}  // namespace kvarn::cpu
