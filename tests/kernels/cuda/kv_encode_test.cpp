// Records of the GPU against the CPU twin, by the codec's rule of conformance: codes, products of
// scales and decoded values, never single scales, which share a common factor.
#include <gtest/gtest.h>

#include <cmath>
#include <cstring>
#include <functional>
#include <random>
#include <string>

#include "kernels/kv_encode_cpu.h"
#include "kernels/ops_cuda.h"
#include "tests/support/cuda_fixture.h"
#include "tests/support/device_pages.h"

namespace kvarn {
namespace {

using test::DeviceArray;

constexpr int kN = 128;
constexpr KvFormat kFormats[] = {KvFormat::kKvarnK4V2, KvFormat::kKvarnK4V4};

// Rows of K and V, [rows][heads][128].
struct Rows {
  int rows, heads;
  std::vector<half> k, v;
  size_t at(int row, int head) const { return (static_cast<size_t>(row) * heads + head) * kN; }
};

// x(row, channel) of every head, with noise of its own.
Rows make_rows(
    int rows, int heads, uint64_t seed,
    const std::function<float(std::mt19937_64&, int row, int channel, bool key)>& value) {
  std::mt19937_64 engine(seed);
  Rows r{rows, heads, {}, {}};
  for (std::vector<half>* x : {&r.k, &r.v}) {
    for (int row = 0; row < rows; ++row)
      for (int head = 0; head < heads; ++head)
        for (int d = 0; d < kN; ++d) x->push_back(to_half(value(engine, row, d, x == &r.k)));
  }
  return r;
}
float normal(std::mt19937_64& engine) {
  // Sum of twelve uniforms: the same on every machine, near enough to a normal deviate.
  float sum = -6.f;
  for (int i = 0; i < 12; ++i) sum += static_cast<float>(engine() >> 40) * 0x1p-24f;
  return sum;
}

struct Kind {
  const char* name;
  std::function<float(std::mt19937_64&, int row, int channel, bool key)> value;
};
const std::vector<Kind>& kinds() {
  static const std::vector<Kind> all = {
      {"normal", [](auto& e, int, int, bool) { return normal(e); }},
      {"tiny", [](auto& e, int, int, bool) { return 0.01f * normal(e); }},
      {"small", [](auto& e, int, int, bool) { return 0.3f * normal(e); }},
      {"large", [](auto& e, int, int, bool) { return 300.f * normal(e); }},
      {"loud channels and tokens",
       [](auto& e, int row, int d, bool) {
         return normal(e) * (d % 37 == 5 ? 40.f : 1.f) * (row % 29 == 3 ? 7.f : 1.f);
       }},
      {"channels with offsets",
       [](auto& e, int, int d, bool) {
         return normal(e) + static_cast<float>(d % 16 == 9 ? 25 : d % 7);
       }},
      {"scales over six octaves",
       [](auto& e, int row, int d, bool) {
         return normal(e) * std::exp2(static_cast<float>(d % 7) - 3.f) *
                std::exp2(static_cast<float>(row % 5) - 2.f);
       }},
  };
  return all;
}

std::vector<std::byte> cpu_record(const Rows& r, int first_row, int head, const TileLayout& tile) {
  cpu::TileRows rows;
  for (int t = 0; t < kN; ++t) {
    rows.k[t] = &r.k[r.at(first_row + t, head)];
    rows.v[t] = &r.v[r.at(first_row + t, head)];
  }
  std::vector<std::byte> record(static_cast<size_t>(tile.bytes));
  cpu::encode_tile(rows, tile, record.data());
  return record;
}

// One record seen as K or V: value(row, column) ~ (code * step[row] + zero[row]) * scale[column].
class View {
 public:
  View(const std::vector<std::byte>& record, const TileLayout& tile, bool key)
      : record_(record),
        bits_(key ? tile.k_bits : tile.v_bits),
        codes_(key ? tile.k_codes : tile.v_codes),
        step_(key ? tile.k_step : tile.v_step),
        zero_(key ? tile.k_zero : tile.v_zero),
        column_(key ? tile.k_token : tile.v_channel) {}
  int code(int row, int column) const {
    const int per = 8 / bits_, i = row * kN + column;
    const auto byte = std::to_integer<int>(record_[static_cast<size_t>(codes_ + i / per)]);
    return (byte >> (i % per * bits_)) & top();
  }
  float step(int row) const { return scale(step_, row); }
  float zero(int row) const { return scale(zero_, row); }
  float column(int column) const { return scale(column_, column); }
  int top() const { return (1 << bits_) - 1; }

 private:
  float scale(int offset, int i) const {
    half h;
    std::memcpy(&h, record_.data() + offset + 2 * i, 2);
    return to_float(h);
  }
  const std::vector<std::byte>& record_;
  int bits_, codes_, step_, zero_, column_;
};

void expect_conforming(const std::vector<std::byte>& record, const std::vector<std::byte>& expected,
                       const TileLayout& tile, bool compare_codes = true) {
  for (const bool key : {true, false}) {
    SCOPED_TRACE(key ? "K" : "V");
    const View a(record, tile, key), b(expected, tile, key);
    int different = 0;
    for (int row = 0; row < kN; ++row) {
      for (int column = 0; column < kN; ++column) {
        // Products A T and U C within 3e-3; below the smallest halves only their spacing counts.
        const float step = a.step(row) * a.column(column),
                    expected_step = b.step(row) * b.column(column);
        const float spacing = 0x1p-24f * (a.column(column) + b.column(column));
        ASSERT_LE(std::abs(step - expected_step), 3e-3f * expected_step + spacing)
            << row << ", " << column;
        const int distance = std::abs(a.code(row, column) - b.code(row, column));
        if (compare_codes) {
          ASSERT_LE(distance, 1) << row << ", " << column;
          different += distance;
        }
        // Decoded values: 2e-3 of the largest magnitude on the way, plus what the codes differ by.
        const float value = (a.code(row, column) * a.step(row) + a.zero(row)) * a.column(column);
        const float other = (b.code(row, column) * b.step(row) + b.zero(row)) * b.column(column);
        const float size = (a.top() * b.step(row) + std::abs(b.zero(row))) * b.column(column);
        ASSERT_LE(std::abs(value - other),
                  2e-3f * size + static_cast<float>(distance) * expected_step * 1.01f +
                      (1 + a.top()) * spacing)
            << row << ", " << column;
      }
    }
    EXPECT_LE(different, kN * kN / 1000) << "codes that differ";
  }
}

// What the codec promises whoever wrote the record: half a step, and the rounding of the scales.
void expect_within_half_a_step(const std::vector<std::byte>& record, const TileLayout& tile,
                               const Rows& r, int first_row, int head) {
  for (const bool key : {true, false}) {
    const View a(record, tile, key);
    for (int t = 0; t < kN; ++t) {
      for (int d = 0; d < kN; ++d) {
        const int row = key ? d : t, column = key ? t : d;
        const float x = to_float((key ? r.k : r.v)[r.at(first_row + t, head) + d]);
        const float step = a.step(row) * a.column(column), zero = a.zero(row) * a.column(column);
        const float value = a.code(row, column) * step + zero;
        const float slack = 0x1p-10f * (a.top() * step + std::abs(zero) + std::abs(x)) +
                            0x1p-24f * (1 + a.top()) * a.column(column);
        ASSERT_LE(std::abs(value - x), 0.5f * step + slack)
            << (key ? "K " : "V ") << row << ", " << column;
      }
    }
  }
}

class CudaKvEncodeTest : public test::CudaTest {
 protected:
  // Encodes tiles that begin at `first_rows` of `r` into pages 0, 1, ... of a poisoned pool.
  std::vector<std::byte> from_rows(const Rows& r, const std::vector<int>& first_rows,
                                   KvFormat format) {
    const KvLayout layout = make_kv_layout(format, kN);
    const auto n = static_cast<int>(first_rows.size());
    const DeviceArray<half> k(r.k), v(r.v);
    std::vector<EncodeTile> tiles;
    for (int i = 0; i < n; ++i)
      tiles.push_back({first_rows[static_cast<size_t>(i)], {-1, -1, -1, -1, -1}, i});
    const DeviceArray<EncodeTile> device_tiles(tiles);
    const DeviceArray<std::byte> pages(page_bytes(layout, n, r.heads));
    const KvLayerView layer{pages.data(), n, r.heads, layout};
    cuda::kv_encode(stream_, {Tensor::of(k.data(), {r.rows, r.heads, kN}),
                              Tensor::of(v.data(), {r.rows, r.heads, kN}),
                              {device_tiles.data(), tiles.size()},
                              {&layer, 1}});
    wait();
    return pages.host();
  }
  static size_t page_bytes(const KvLayout& layout, int pages, int heads) {
    return static_cast<size_t>(pages) * heads * layout.page_bytes;
  }
  static std::vector<std::byte> record(const std::vector<std::byte>& pages, const KvLayout& layout,
                                       int heads, int page, int head) {
    const size_t at = (static_cast<size_t>(page) * heads + head) * layout.page_bytes;
    return test::coded_page_to_cpu(layout, pages.data() + at);
  }
};

TEST_F(CudaKvEncodeTest, RecordsConformToTheCpuTwin) {
  constexpr int kHeads = 2;
  for (const Kind& kind : kinds()) {
    for (const KvFormat format : kFormats) {
      const KvLayout layout = make_kv_layout(format, kN);
      const Rows r = make_rows(3 * kN + 5, kHeads, 11, kind.value);
      const std::vector<int> first_rows = {0, kN, 2 * kN + 5, 3};  // need not be aligned
      const std::vector<std::byte> pages = from_rows(r, first_rows, format);
      for (int i = 0; i < static_cast<int>(first_rows.size()); ++i) {
        for (int head = 0; head < kHeads; ++head) {
          SCOPED_TRACE(testing::Message() << kind.name << ", " << kv_format_name(format)
                                          << ", tile " << i << ", head " << head);
          const int first = first_rows[static_cast<size_t>(i)];
          const auto got = record(pages, layout, kHeads, i, head);
          expect_conforming(got, cpu_record(r, first, head, layout.tile()), layout.tile());
          expect_within_half_a_step(got, layout.tile(), r, first, head);
        }
      }
    }
  }
}

TEST_F(CudaKvEncodeTest, ManyTilesConform) {
  constexpr int kHeads = 8, kTiles = 12;
  std::vector<int> first_rows;
  for (int i = 0; i < kTiles; ++i) first_rows.push_back(i * kN);
  // Every tile of another size, so that some start at the floor of the scales and others far off.
  const Rows r = make_rows(kTiles * kN, kHeads, 5, [](auto& e, int row, int d, bool key) {
    return normal(e) * std::exp2(static_cast<float>(row / kN) - 6.f) + (key ? 0.1f * d : 0.f);
  });
  const KvLayout layout = make_kv_layout(KvFormat::kKvarnK4V2, kN);
  const std::vector<std::byte> pages = from_rows(r, first_rows, layout.format);
  for (int i = 0; i < kTiles; ++i) {
    for (int head = 0; head < kHeads; ++head) {
      SCOPED_TRACE(testing::Message() << "tile " << i << ", head " << head);
      expect_conforming(record(pages, layout, kHeads, i, head),
                        cpu_record(r, i * kN, head, layout.tile()), layout.tile());
    }
  }
}

TEST_F(CudaKvEncodeTest, FlatTilesConform) {
  // Deviations of zero, and one value that outweighs all others.
  const std::vector<Kind> flat = {
      {"zero", [](auto&, int, int, bool) { return 0.f; }},
      {"one constant", [](auto&, int, int, bool) { return 1.75f; }},
      {"constant channels", [](auto&, int, int d, bool) { return 0.25f * (d % 9) - 1.f; }},
      {"constant tokens", [](auto&, int row, int, bool) { return 0.5f * (row % 11) - 2.f; }},
      {"some constant channels",
       [](auto& e, int, int d, bool) { return d % 5 == 0 ? 3.f : normal(e); }},
      {"one huge value",
       [](auto& e, int row, int d, bool) { return row == 77 && d == 13 ? 60000.f : normal(e); }},
      {"the largest halves",
       [](auto&, int row, int d, bool) { return (row * kN + d) % 3 == 0 ? 65504.f : -65504.f; }},
  };
  for (const Kind& kind : flat) {
    for (const KvFormat format : kFormats) {
      SCOPED_TRACE(testing::Message() << kind.name << ", " << kv_format_name(format));
      const KvLayout layout = make_kv_layout(format, kN);
      const Rows r = make_rows(kN, 1, 3, kind.value);
      const auto got = record(from_rows(r, {0}, format), layout, 1, 0, 0);
      expect_conforming(got, cpu_record(r, 0, 0, layout.tile()), layout.tile());
      expect_within_half_a_step(got, layout.tile(), r, 0, 0);
    }
  }
}

TEST_F(CudaKvEncodeTest, NoTilesLaunchNothing) {
  const KvLayout layout = make_kv_layout(KvFormat::kKvarnK4V2, kN);
  const DeviceArray<std::byte> pages(page_bytes(layout, 1, 1));
  const KvLayerView layer{pages.data(), 1, 1, layout};
  cuda::kv_encode(stream_, {Tensor(), Tensor(), {}, {&layer, 1}});
  wait();
  for (const std::byte b : pages.host()) ASSERT_EQ(b, std::byte{0xff});
}

TEST_F(CudaKvEncodeTest, ARecordDependsOnItsRowsAlone) {
  // The same tile twice in a call, in a call of its own, and again.
  constexpr int kHeads = 3;
  for (const KvFormat format : kFormats) {
    const KvLayout layout = make_kv_layout(format, kN);
    const Rows r = make_rows(6 * kN, kHeads, 21, kinds()[4].value);
    const auto batch = from_rows(r, {0, kN, 5 * kN, kN}, format);
    const size_t page = page_bytes(layout, 1, kHeads);
    EXPECT_EQ(std::memcmp(batch.data() + page, batch.data() + 3 * page, page), 0);
    EXPECT_NE(std::memcmp(batch.data() + page, batch.data() + 2 * page, page), 0);
    for (int again = 0; again < 2; ++again) {
      const auto alone = from_rows(r, {kN}, format);
      EXPECT_EQ(std::memcmp(batch.data() + page, alone.data(), page), 0);
    }
  }
}

TEST_F(CudaKvEncodeTest, TilesFromPagesOfAllLayersAreTheTilesFromRows) {
  constexpr int kHeads = 2, kLayers = 3, kPages = 16;
  for (const KvFormat format : kFormats) {
    const KvLayout layout = make_kv_layout(format, kN);
    const std::vector<BlockPages> sources = {{9, 2, 14, 5, 7}, {1, 0, 12, 8, 15}};
    const std::vector<int> targets = {3, 11};
    std::vector<EncodeTile> tiles;
    std::vector<int64_t> slots;
    for (size_t i = 0; i < sources.size(); ++i) {
      tiles.push_back({-1, sources[i], targets[i]});
      for (int t = 0; t < kN; ++t) {
        const auto n = static_cast<size_t>(t / layout.exact_rows);
        slots.push_back(int64_t{sources[i][n]} * layout.exact_rows + t % layout.exact_rows);
      }
    }
    const auto rows = static_cast<int64_t>(slots.size());
    const DeviceArray<int64_t> device_slots(slots);
    const DeviceArray<EncodeTile> device_tiles(tiles);
    const DeviceArray<std::byte> pool(kLayers * page_bytes(layout, kPages, kHeads));
    std::vector<KvLayerView> layers;
    std::vector<Rows> data;
    for (int l = 0; l < kLayers; ++l) {
      layers.push_back(
          {pool.data() + l * page_bytes(layout, kPages, kHeads), kPages, kHeads, layout});
      data.push_back(make_rows(static_cast<int>(rows), kHeads, 40 + static_cast<uint64_t>(l),
                               kinds()[static_cast<size_t>(l)].value));
      const DeviceArray<half> k(data.back().k), v(data.back().v);
      cuda::kv_write(
          stream_, {Tensor::of(k.data(), {rows, kHeads, kN}),
                    Tensor::of(v.data(), {rows, kHeads, kN}), device_slots.data(), layers.back()});
      wait();
    }
    const std::vector<std::byte> before = pool.host();
    cuda::kv_encode(stream_, {Tensor(), Tensor(), {device_tiles.data(), tiles.size()}, layers});
    wait();
    const std::vector<std::byte> after = pool.host();
    const size_t page = page_bytes(layout, 1, kHeads);
    for (size_t l = 0; l < kLayers; ++l) {
      const auto expected = from_rows(data[l], {0, kN}, format);
      for (int id = 0; id < kPages; ++id) {
        SCOPED_TRACE(testing::Message()
                     << kv_format_name(format) << ", layer " << l << ", page " << id);
        const size_t at = (l * kPages + static_cast<size_t>(id)) * page;
        const auto target = std::find(targets.begin(), targets.end(), id);
        const std::byte* should =
            target == targets.end()
                ? before.data() + at
                : expected.data() + static_cast<size_t>(target - targets.begin()) * page;
        EXPECT_EQ(std::memcmp(after.data() + at, should, page), 0);
      }
    }
  }
}

}  // namespace
}  // namespace kvarn
