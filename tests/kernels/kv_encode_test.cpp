// The tile codec against golden vectors of the NumPy reference and its own promises: records are
// pure functions of the rows, the same on every instruction set and from either source.
#include "kernels/kv_encode_cpu.h"

#include <gtest/gtest.h>

#include <cmath>
#include <cstring>
#include <limits>
#include <random>

#include "kernels/hadamard.h"
#include "kernels/kv_cpu.h"
#include "kernels/kv_kernels.h"
#include "tests/kernels/isa_param.h"
#include "tests/kernels/kv_cache_driver.h"
#include "tests/kernels/kv_golden.h"
#include "tests/support/tensor_matchers.h"

namespace kvarn::test {
namespace {

constexpr int kN = 128;
constexpr size_t kTileValues = size_t{kN} * kN;
constexpr CpuIsa kKvIsas[] = {CpuIsa::kScalar, CpuIsa::kAvx2, CpuIsa::kAvx512};

cpu::TileRows rows_of(const std::vector<half>& k, const std::vector<half>& v) {
  cpu::TileRows rows;
  for (int t = 0; t < kN; ++t) {
    rows.k[t] = &k[static_cast<size_t>(t * kN)];
    rows.v[t] = &v[static_cast<size_t>(t * kN)];
  }
  return rows;
}

std::vector<std::byte> encode(const std::vector<half>& k, const std::vector<half>& v,
                              const TileLayout& tile, CpuIsa isa) {
  std::vector<std::byte> record(static_cast<size_t>(tile.bytes), std::byte{0xcd});
  cpu::encode_tile(rows_of(k, v), tile, record.data(), isa);
  return record;
}

struct Decoded {
  std::vector<float> k, v;
};
Decoded decode(const std::vector<std::byte>& record, const TileLayout& tile) {
  Decoded d{std::vector<float>(kTileValues), std::vector<float>(kTileValues)};
  cpu::decode_tile(record.data(), tile, d.k.data(), d.v.data());
  return d;
}

float scale_at(const std::vector<std::byte>& record, int offset, int i) {
  half h;
  std::memcpy(&h, record.data() + offset + 2 * i, sizeof(h));
  return to_float(h);
}

// Distance in units of the last place of two finite fp16 numbers.
int half_ulps(const std::vector<std::byte>& a, const std::vector<std::byte>& b, int offset, int i) {
  int16_t x, y;
  std::memcpy(&x, a.data() + offset + 2 * i, 2);
  std::memcpy(&y, b.data() + offset + 2 * i, 2);
  const auto order = [](int16_t h) { return h < 0 ? -(h & 0x7fff) : int{h}; };
  return std::abs(order(x) - order(y));
}

int code_at(const std::vector<std::byte>& record, int offset, int bits, int i) {
  const int per = 8 / bits;
  return (std::to_integer<int>(record[static_cast<size_t>(offset + i / per)]) >> (i % per * bits)) &
         ((1 << bits) - 1);
}

class KvEncodeTest : public IsaTest {};
INSTANTIATE_TEST_SUITE_P(Isa, KvEncodeTest, ::testing::ValuesIn(kKvIsas), isa_param_name);

void expect_golden_record(const std::string& name, const TileLayout& tile, CpuIsa isa) {
  SCOPED_TRACE(name);
  const auto k = read_golden<half>(name + "_k_rot", kTileValues);
  const auto v = read_golden<half>(name + "_v_rot", kTileValues);
  const auto expected = read_golden<std::byte>(name + "_record", static_cast<size_t>(tile.bytes));
  const std::vector<std::byte> record = encode(k, v, tile, isa);
  // Stored scales within one unit in the last place of fp16.
  for (const int offset :
       {tile.k_step, tile.k_zero, tile.k_token, tile.v_channel, tile.v_step, tile.v_zero})
    for (int i = 0; i < kN; ++i)
      EXPECT_LE(half_ulps(record, expected, offset, i), 1) << "offset " << offset << " entry " << i;
  // At most 0.1 % of the codes differ, by one step: rounding ties.
  for (const auto& [offset, bits] :
       {std::pair{tile.k_codes, tile.k_bits}, {tile.v_codes, tile.v_bits}}) {
    int different = 0;
    for (int i = 0; i < kN * kN; ++i) {
      const int distance =
          std::abs(code_at(record, offset, bits, i) - code_at(expected, offset, bits, i));
      EXPECT_LE(distance, 1);
      different += distance;
    }
    EXPECT_LE(different, kN * kN / 1000);
  }
}

TEST_P(KvEncodeTest, RecordsConformToTheReference) {
  expect_golden_record("k4v2_g128", kTileK4V2, GetParam());
  expect_golden_record("k4v4_g128", kTileK4V4, GetParam());
}

TEST_P(KvEncodeTest, ScalesConformToTheReference) {
  // The unabsorbed scale of the other axis is stored as it is: 1e-5 before its rounding to fp16.
  for (const auto& [name, tile] : {std::pair{"k4v2_g128", kTileK4V2}, {"k4v4_g128", kTileK4V4}}) {
    const auto k = read_golden<half>(std::string(name) + "_k_rot", kTileValues);
    const auto v = read_golden<half>(std::string(name) + "_v_rot", kTileValues);
    const auto k_token = read_golden<float>(std::string(name) + "_k_tok", kN);
    const auto v_channel = read_golden<float>(std::string(name) + "_v_chan", kN);
    const std::vector<std::byte> record = encode(k, v, tile, GetParam());
    constexpr float kTolerance = 1e-5f + 0x1p-11f;  // half a unit in the last place of fp16
    for (int i = 0; i < kN; ++i) {
      const auto at = static_cast<size_t>(i);
      EXPECT_NEAR(scale_at(record, tile.k_token, i), k_token[at], kTolerance * k_token[at]);
      EXPECT_NEAR(scale_at(record, tile.v_channel, i), v_channel[at], kTolerance * v_channel[at]);
    }
  }
}

TEST(KvDecodeTest, DecodingAGoldenRecordIsExactToFp32Rounding) {
  const auto record = read_golden<std::byte>("k4v2_g128_record", 13824);
  const Decoded d = decode(record, kTileK4V2);
  // The same operations in the same order: multiply, add, multiply.
  EXPECT_TRUE(bitwise_equal(d.k, read_golden<float>("k4v2_g128_k_dec", kTileValues)));
  EXPECT_TRUE(bitwise_equal(d.v, read_golden<float>("k4v2_g128_v_dec", kTileValues)));
}

TEST_P(KvEncodeTest, AttentionOverGoldenRecordsConforms) {
  const KvLayout layout = make_kv_layout(KvFormat::kKvarnK4V2, kN);
  constexpr int kHeads = 4, kTail = 45, kPosition = 3 * kN + kTail - 1;
  // Rows go to exact pages as in the reference's sequence: first tile, two records, tail.
  const auto first_k = read_golden<half>("attn_first_k_rot", kTileValues);
  const auto first_v = read_golden<half>("attn_first_v_rot", kTileValues);
  const auto tail_k = read_golden<half>("attn_tail_k_rot", kTail * kN);
  const auto tail_v = read_golden<half>("attn_tail_v_rot", kTail * kN);
  const auto records = read_golden<std::byte>("attn_records", size_t{2} * 13824);
  std::vector<std::byte> pages(size_t{12} * 13824, std::byte{0xff});
  std::vector<BlockPages> table = {
      {0, 1, 2, 3, 4}, {5, -1, -1, -1, -1}, {6, -1, -1, -1, -1}, {7, 8, -1, -1, -1}};
  std::memcpy(pages.data() + size_t{5} * 13824, records.data(), records.size());
  const auto put = [&](int page_of_row, int row, const half* k, const half* v) {
    std::byte* page = pages.data() + ptrdiff_t{page_of_row} * 13824;
    std::memcpy(page + layout.k_row_offset(row), k, 2 * kN);
    std::memcpy(page + layout.v_row_offset(row), v, 2 * kN);
  };
  for (int t = 0; t < kN; ++t)
    put(t / 27, t % 27, &first_k[static_cast<size_t>(t * kN)],
        &first_v[static_cast<size_t>(t * kN)]);
  for (int t = 0; t < kTail - 1; ++t)
    put(7 + t / 27, t % 27, &tail_k[static_cast<size_t>(t * kN)],
        &tail_v[static_cast<size_t>(t * kN)]);
  const auto q_half = read_golden<half>("attn_q", size_t{kHeads} * kN);
  std::vector<float> q(q_half.size()), out(q_half.size());
  for (size_t i = 0; i < q.size(); ++i) q[i] = to_float(q_half[i]);
  for (int h = 0; h < kHeads; ++h) cpu::hadamard_rotate(&q[static_cast<size_t>(h * kN)], kN);
  std::vector<half> own_k(tail_k.end() - kN, tail_k.end()), own_v(tail_v.end() - kN, tail_v.end());
  const AttentionSequence sequence{0, 1, kPosition, 0};
  ThreadPool pool(1);
  cpu::attention({Tensor::of(q.data(), {1, kHeads, kN}),
                  Tensor::of(own_k.data(), {1, 1, kN}),
                  Tensor::of(own_v.data(), {1, 1, kN}),
                  {&sequence, 1},
                  table.data(),
                  {pages.data(), 12, 1, layout},
                  kHeads,
                  1.f / std::sqrt(128.f),
                  ReadingRule::kPosition,
                  Tensor::of(out.data(), {1, kHeads * kN})},
                 pool, GetParam());
  // 1e-5 of the norm of each head's output (SPEC: relative error in fp32).
  const auto expected = read_golden<float>("attn_out", size_t{kHeads} * kN);
  for (size_t h = 0; h < kHeads; ++h) {
    double error = 0, norm = 0;
    for (size_t i = h * kN; i < (h + 1) * kN; ++i) {
      error += std::pow(out[i] - expected[i], 2);
      norm += std::pow(expected[i], 2);
    }
    EXPECT_LE(std::sqrt(error / norm), 1e-5) << "head " << h;
  }
}

TEST(HadamardTest, ConformsToTheReferenceBitForBit) {
  const auto in = read_golden<half>("rotate_in", size_t{4} * kN);
  std::vector<float> x(in.size());
  for (size_t i = 0; i < x.size(); ++i) x[i] = to_float(in[i]);
  for (size_t row = 0; row < 4; ++row) cpu::hadamard_rotate(&x[row * kN], kN);
  EXPECT_TRUE(bitwise_equal(x, read_golden<float>("rotate_out", size_t{4} * kN)));
}

TEST_P(KvEncodeTest, TheVectorRotationIsHadamardRotateBitForBit) {
  const std::vector<float> acc = random_floats(kN, 13);
  std::vector<float> out(kN), expected(kN);
  cpu::AttendShape shape{kTileK4V2, kN, kN, 1.f};
  cpu::kv_kernels(GetParam()).finish(shape, true, acc.data(), 3.7f, out.data());
  for (size_t d = 0; d < kN; ++d) expected[d] = acc[d] / 3.7f;
  cpu::hadamard_rotate(expected.data(), kN);
  EXPECT_TRUE(bitwise_equal(out, expected));
}

TEST(HadamardTest, IsItsOwnInverseAndKeepsLengths) {
  for (const int n : {1, 2, 16, 64, 128, 512}) {
    const std::vector<float> x = random_floats(static_cast<size_t>(n), 3);
    std::vector<float> y = x;
    cpu::hadamard_rotate(y.data(), n);
    double before = 0, after = 0;
    for (size_t i = 0; i < x.size(); ++i) {
      before += x[i] * x[i];
      after += y[i] * y[i];
    }
    EXPECT_NEAR(after, before, 1e-5 * before);
    cpu::hadamard_rotate(y.data(), n);
    EXPECT_TRUE(near_relative_to_largest(y, x, 1e-6f)) << n;  // log2(n) roundings each way
  }
}

TEST(KvEncodeIsaTest, EveryInstructionSetWritesTheSameRecord) {
  for (uint64_t seed = 1; seed <= 20; ++seed) {
    const float size = std::pow(10.f, static_cast<float>(seed % 5) - 2.f);
    const KvSequence s = make_sequence({}, kN, seed);
    std::vector<half> k = s.k, v = s.v;
    for (std::vector<half>* x : {&k, &v})
      for (half& h : *x) h = to_half(to_float(h) * size);
    for (const TileLayout& tile : {kTileK4V2, kTileK4V4}) {
      const std::vector<std::byte> expected = encode(k, v, tile, CpuIsa::kScalar);
      for (const CpuIsa isa : kKvIsas) {
        if (!cpu_isa_supported(isa)) continue;
        EXPECT_TRUE(encode(k, v, tile, isa) == expected)
            << cpu_isa_name(isa) << ", seed " << seed << ", " << tile.bytes << " bytes";
      }
    }
  }
}

TEST_P(KvEncodeTest, DecodedValuesAreWithinHalfAStep) {
  const KvSequence s = make_sequence({}, kN, 5);
  for (const TileLayout& tile : {kTileK4V2, kTileK4V4}) {
    const std::vector<std::byte> record = encode(s.k, s.v, tile, GetParam());
    const Decoded d = decode(record, tile);
    for (int t = 0; t < kN; ++t) {
      for (int c = 0; c < kN; ++c) {
        const auto at = static_cast<size_t>(t * kN + c);
        // Half a step, plus fp16 rounding of step (times up to 15), zero and scale.
        const float k_step = scale_at(record, tile.k_step, c) * scale_at(record, tile.k_token, t);
        const float v_step = scale_at(record, tile.v_step, t) * scale_at(record, tile.v_channel, c);
        const float k = to_float(s.k[at]), v = to_float(s.v[at]);
        const float k_zero = scale_at(record, tile.k_zero, c) * scale_at(record, tile.k_token, t);
        const float v_zero = scale_at(record, tile.v_zero, t) * scale_at(record, tile.v_channel, c);
        const float slack = 0x1p-10f;
        EXPECT_LE(std::abs(d.k[at] - k),
                  0.5f * k_step + slack * (15 * k_step + std::abs(k_zero) + std::abs(k)));
        EXPECT_LE(std::abs(d.v[at] - v),
                  0.5f * v_step + slack * (15 * v_step + std::abs(v_zero) + std::abs(v)));
      }
    }
  }
}

TEST_P(KvEncodeTest, AnAllZeroTileDecodesToZero) {
  const std::vector<half> zero(kTileValues, half{0});
  for (const TileLayout& tile : {kTileK4V2, kTileK4V4}) {
    const Decoded d = decode(encode(zero, zero, tile, GetParam()), tile);
    EXPECT_LT(largest_magnitude(d.k), 1e-6f);
    EXPECT_LT(largest_magnitude(d.v), 1e-6f);
  }
}

TEST_P(KvEncodeTest, TheLargestHalvesSaturateInsteadOfBecomingInfinite) {
  std::vector<half> k(kTileValues), v(kTileValues);
  for (size_t i = 0; i < kTileValues; ++i) {
    k[i] = to_half(i % 3 == 0 ? 65504.f : -65504.f);
    v[i] = to_half(i % 5 == 0 ? -65504.f : 65504.f);
  }
  for (const TileLayout& tile : {kTileK4V2, kTileK4V4}) {
    const std::vector<std::byte> record = encode(k, v, tile, GetParam());
    for (const int offset :
         {tile.k_step, tile.k_zero, tile.k_token, tile.v_channel, tile.v_step, tile.v_zero})
      for (int i = 0; i < kN; ++i) ASSERT_TRUE(std::isfinite(scale_at(record, offset, i)));
    for (const float x : decode(record, tile).k) ASSERT_TRUE(std::isfinite(x));
    for (const float x : decode(record, tile).v) ASSERT_TRUE(std::isfinite(x));
  }
}

TEST_P(KvEncodeTest, ATileFromExactPagesIsTheTileFromRowsBitForBit) {
  for (const KvFormat format : {KvFormat::kKvarnK4V2, KvFormat::kKvarnK4V4}) {
    const KvLayout layout = make_kv_layout(format, kN);
    constexpr int kHeads = 3, kPages = 16;
    const KvShape shape{format, kHeads, kHeads, kN};
    KvSequence s = make_sequence(shape, kN, 17);
    std::vector<std::byte> bytes(size_t{kPages} * kHeads * static_cast<size_t>(layout.page_bytes),
                                 std::byte{0xff});
    const KvLayerView layer{bytes.data(), kPages, kHeads, layout};
    const BlockPages source = {9, 2, 14, 5, 7};
    std::vector<int64_t> slots;
    for (int t = 0; t < kN; ++t)
      slots.push_back(int64_t{source[static_cast<size_t>(t / layout.exact_rows)]} *
                          layout.exact_rows +
                      t % layout.exact_rows);
    ThreadPool pool(2);
    const Tensor k = Tensor::of(s.k.data(), {kN, kHeads, kN}),
                 v = Tensor::of(s.v.data(), {kN, kHeads, kN});
    cpu::kv_write({k, v, slots.data(), layer}, pool);
    const std::vector<EncodeTile> tiles = {{-1, source, 3}, {0, {-1, -1, -1, -1, -1}, 11}};
    cpu::kv_encode({k, v, tiles, {&layer, 1}}, pool, GetParam());
    const size_t page = size_t{kHeads} * static_cast<size_t>(layout.page_bytes);
    EXPECT_EQ(std::memcmp(bytes.data() + 3 * page, bytes.data() + 11 * page, page), 0)
        << kv_format_name(format);
    // And through no other source: the same call without rows.
    const std::vector<std::byte> before(bytes.begin() + static_cast<ptrdiff_t>(3 * page),
                                        bytes.begin() + static_cast<ptrdiff_t>(4 * page));
    cpu::kv_encode({Tensor(), Tensor(), {tiles.data(), 1}, {&layer, 1}}, pool, GetParam());
    EXPECT_EQ(std::memcmp(bytes.data() + 3 * page, before.data(), page), 0);
  }
}

}  // namespace
}  // namespace kvarn::test
