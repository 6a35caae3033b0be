#include "tests/support/device_pages.h"

#include <cstring>

#include "kernels/kv_device_layout.h"

namespace kvarn::test {
namespace {

constexpr int kN = 128;

using Bytes = std::vector<std::byte>;

unsigned get_code(const std::byte* field, CodePlace place, int bits) {
  return (std::to_integer<unsigned>(field[place.byte]) >> place.shift) & ((1u << bits) - 1);
}
void put_code(std::byte* field, CodePlace place, unsigned code) {
  field[place.byte] |= static_cast<std::byte>(code << place.shift);
}
// In the CPU's order: rows of 128 codes.
CodePlace plain_place(int bits, int row, int i) {
  const int per = 8 / bits;
  return {row * (kN / per) + i / per, i % per * bits};
}

Bytes convert_coded(const KvLayout& layout, const std::byte* from, bool to_device) {
  const TileLayout& tile = layout.tile();
  Bytes to(static_cast<size_t>(layout.page_bytes));
  const auto code = [&](int field, int bits, CodePlace cpu, CodePlace device) {
    put_code(to.data() + field, to_device ? device : cpu,
             get_code(from + field, to_device ? cpu : device, bits));
  };
  const auto scale = [&](int field, int i, int device_index) {
    std::memcpy(to.data() + field + 2 * (to_device ? device_index : i),
                from + field + 2 * (to_device ? i : device_index), 2);
  };
  for (int i = 0; i < kN; ++i) {
    for (int j = 0; j < kN; ++j) {  // K: channel i, token j; V: token i, channel j
      code(tile.k_codes, tile.k_bits, plain_place(tile.k_bits, i, j), device_k_code(i, j));
      code(tile.v_codes, tile.v_bits, plain_place(tile.v_bits, i, j),
           device_v_code(tile.v_bits, i, j));
    }
    for (const int field : {tile.k_step, tile.k_zero, tile.v_step, tile.v_zero}) {
      scale(field, i, device_depth_scale(i));
    }
    for (const int field : {tile.k_token, tile.v_channel}) scale(field, i, device_row_scale(i));
  }
  return to;
}

Bytes convert_exact(const KvLayout& layout, const std::byte* from, bool to_device) {
  Bytes to(from, from + layout.page_bytes);
  const int row_bytes = 2 * layout.head_dim;
  for (int row = 0; row < layout.exact_rows; ++row) {
    for (const size_t at : {layout.k_row_offset(row), layout.v_row_offset(row)}) {
      for (int piece = 0; piece < row_bytes / 16; ++piece) {
        const auto plain = at + static_cast<size_t>(16 * piece);
        const auto device = at + static_cast<size_t>(device_exact_piece(row, piece));
        std::memcpy(to.data() + (to_device ? device : plain), from + (to_device ? plain : device),
                    16);
      }
    }
  }
  return to;
}

}  // namespace

Bytes coded_page_to_device(const KvLayout& layout, const std::byte* page) {
  return convert_coded(layout, page, true);
}
Bytes coded_page_to_cpu(const KvLayout& layout, const std::byte* page) {
  return convert_coded(layout, page, false);
}
Bytes exact_page_to_device(const KvLayout& layout, const std::byte* page) {
  return convert_exact(layout, page, true);
}
Bytes exact_page_to_cpu(const KvLayout& layout, const std::byte* page) {
  return convert_exact(layout, page, false);
}

}  // namespace kvarn::test
