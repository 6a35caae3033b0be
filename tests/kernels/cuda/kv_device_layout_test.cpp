#include "kernels/kv_device_layout.h"

#include <gtest/gtest.h>

#include <random>
#include <set>
#include <utility>

#include "tests/support/device_pages.h"

namespace kvarn {
namespace {

constexpr int kN = 128;

TEST(KvDeviceLayoutTest, EveryCodeHasItsOwnBitsAndTheyFillTheField) {
  for (const int bits : {2, 4}) {
    std::set<std::pair<int, int>> places;
    for (int token = 0; token < kN; ++token) {
      for (int channel = 0; channel < kN; ++channel) {
        const CodePlace place = device_v_code(bits, token, channel);
        EXPECT_GE(place.byte, 0);
        EXPECT_LT(place.byte, kN * kN * bits / 8);
        EXPECT_EQ(place.shift % bits, 0);
        EXPECT_LE(place.shift + bits, 8);
        EXPECT_TRUE(places.insert({place.byte, place.shift}).second) << token << ' ' << channel;
      }
    }
  }
  std::set<std::pair<int, int>> places;
  for (int token = 0; token < kN; ++token) {
    for (int channel = 0; channel < kN; ++channel) {
      const CodePlace place = device_k_code(channel, token);
      EXPECT_LT(place.byte, kN * kN / 2);
      EXPECT_TRUE(places.insert({place.byte, place.shift}).second) << token << ' ' << channel;
    }
  }
}

TEST(KvDeviceLayoutTest, EveryScaleHasItsOwnEntry) {
  std::set<int> depth, row;
  for (int i = 0; i < kN; ++i) {
    EXPECT_LT(device_depth_scale(i), kN);
    EXPECT_LT(device_row_scale(i), kN);
    depth.insert(device_depth_scale(i));
    row.insert(device_row_scale(i));
  }
  EXPECT_EQ(depth.size(), size_t{kN});
  EXPECT_EQ(row.size(), size_t{kN});
}

TEST(KvDeviceLayoutTest, PiecesOfEightRowsMeetEveryBankOnce) {
  for (int piece = 0; piece < 16; ++piece) {
    std::set<int> banks;  // of 16 bytes, 8 to a row of 128 bytes
    for (int row = 0; row < 8; ++row) banks.insert(device_exact_piece(row, piece) / 16 % 8);
    EXPECT_EQ(banks.size(), 8u);
  }
  std::set<int> pieces;
  for (int piece = 0; piece < 16; ++piece) pieces.insert(device_exact_piece(5, piece));
  EXPECT_EQ(pieces.size(), 16u);
}

TEST(KvDeviceLayoutTest, ConvertingAPageThereAndBackGivesThePage) {
  std::mt19937 random(1);
  for (const KvFormat format : {KvFormat::kKvarnK4V2, KvFormat::kKvarnK4V4, KvFormat::kFp16}) {
    const KvLayout layout = make_kv_layout(format, kN);
    std::vector<std::byte> page(static_cast<size_t>(layout.page_bytes));
    for (std::byte& b : page) b = static_cast<std::byte>(random());
    const std::vector<std::byte> exact = test::exact_page_to_device(layout, page.data());
    EXPECT_NE(exact, page);
    EXPECT_EQ(test::exact_page_to_cpu(layout, exact.data()), page);
    if (!layout.coded()) continue;
    const std::vector<std::byte> coded = test::coded_page_to_device(layout, page.data());
    EXPECT_NE(coded, page);
    EXPECT_EQ(test::coded_page_to_cpu(layout, coded.data()), page);
  }
}

}  // namespace
}  // namespace kvarn
