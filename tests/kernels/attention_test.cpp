// Attention over pages against decode-then-attend in double precision, and the contract that a
// row's bits do not depend on chunks, batches or threads.
#include <gtest/gtest.h>

#include <bit>
#include <cmath>
#include <set>
#include <string>
#include <tuple>

#include "kernels/kv_encode_cpu.h"
#include "tests/kernels/isa_param.h"
#include "tests/kernels/kv_cache_driver.h"
#include "tests/support/tensor_matchers.h"

namespace kvarn::test {
namespace {

constexpr KvFormat kFormats[] = {KvFormat::kFp16, KvFormat::kKvarnK4V2, KvFormat::kKvarnK4V4};

int pages_for(int64_t length) { return static_cast<int>(length / 25 + 12); }

// K and V of one head as the query at `position` reads them, f64 [position + 1][head_dim] each.
struct DenseKv {
  std::vector<double> k, v;
};
DenseKv dense(const KvShape& shape, const KvSequence& s, int head, int64_t position,
              int64_t chunk_start, ReadingRule rule) {
  const auto dim = static_cast<size_t>(shape.head_dim);
  const auto at = [&](int64_t p) { return static_cast<size_t>(p * shape.kv_heads + head) * dim; };
  DenseKv kv;
  for (int64_t p = 0; p <= position; ++p) {
    for (size_t d = 0; d < dim; ++d) {
      kv.k.push_back(to_float(s.k[at(p) + d]));
      kv.v.push_back(to_float(s.v[at(p) + d]));
    }
  }
  if (shape.format == KvFormat::kFp16) return kv;
  const TileLayout tile = make_kv_layout(shape.format, shape.head_dim).tile();
  for (int64_t b = 0; b < position / kBlockTokens; ++b) {
    if (!reads_coded(b, position, chunk_start, rule)) continue;
    cpu::TileRows rows;
    for (int t = 0; t < kBlockTokens; ++t) {
      rows.k[t] = &s.k[at(b * kBlockTokens + t)];
      rows.v[t] = &s.v[at(b * kBlockTokens + t)];
    }
    std::vector<std::byte> record(static_cast<size_t>(tile.bytes));
    cpu::encode_tile(rows, tile, record.data());
    std::vector<float> k(kBlockTokens * dim), v(k.size());
    cpu::decode_tile(record.data(), tile, k.data(), v.data());
    const auto to = static_cast<std::ptrdiff_t>(static_cast<size_t>(b) * kBlockTokens * dim);
    std::copy(k.begin(), k.end(), kv.k.begin() + to);
    std::copy(v.begin(), v.end(), kv.v.begin() + to);
  }
  return kv;
}

// The specification: softmax attention in double precision, the result rotated back.
std::vector<float> attend_in_double(const KvShape& shape, const KvSequence& s, int q_head,
                                    int64_t position, int64_t chunk_start, ReadingRule rule) {
  const auto dim = static_cast<size_t>(shape.head_dim);
  const int head = q_head / (shape.q_heads / shape.kv_heads);
  const DenseKv kv = dense(shape, s, head, position, chunk_start, rule);
  const float* q = &s.q[static_cast<size_t>(position * shape.q_heads + q_head) * dim];
  const auto tokens = static_cast<size_t>(position + 1);
  std::vector<double> score(tokens), acc(dim);
  double top = -INFINITY, sum = 0;
  for (size_t t = 0; t < tokens; ++t) {
    for (size_t d = 0; d < dim; ++d) score[t] += q[d] * kv.k[t * dim + d];
    score[t] /= std::sqrt(static_cast<double>(dim));
    top = std::max(top, score[t]);
  }
  for (size_t t = 0; t < tokens; ++t) {
    const double p = std::exp(score[t] - top);
    sum += p;
    for (size_t d = 0; d < dim; ++d) acc[d] += p * kv.v[t * dim + d];
  }
  std::vector<float> out(dim);
  for (size_t d = 0; d < dim; ++d) {
    double x = acc[d];
    if (shape.format != KvFormat::kFp16) {
      x = 0;
      for (size_t i = 0; i < dim; ++i)
        x += (std::popcount(i & d) % 2 == 0 ? acc[i] : -acc[i]) /
             std::sqrt(static_cast<double>(dim));
    }
    out[d] = static_cast<float>(x / sum);
  }
  return out;
}

// 1e-5 of the largest output: fp32 rounding over chains of 128 products and up to 8 blocks.
constexpr float kTolerance = 1e-5f;

void expect_attention_is_right(const KvShape& shape, const KvSequence& s, int64_t position,
                               int64_t chunk_start, ReadingRule rule = ReadingRule::kPosition) {
  const auto dim = static_cast<size_t>(shape.head_dim);
  for (const int h : std::set{0, shape.q_heads / 2, shape.q_heads - 1}) {
    const float* out = &s.out[static_cast<size_t>(position * shape.q_heads + h) * dim];
    EXPECT_TRUE(near_relative_to_largest(
        {out, dim}, attend_in_double(shape, s, h, position, chunk_start, rule), kTolerance))
        << "position " << position << ", head " << h;
  }
}

class AttentionTest : public IsaTest {};
// The bf16 instruction sets use the AVX-512 kernels here.
constexpr CpuIsa kKvIsas[] = {CpuIsa::kScalar, CpuIsa::kAvx2, CpuIsa::kAvx512};
INSTANTIATE_TEST_SUITE_P(Isa, AttentionTest, ::testing::ValuesIn(kKvIsas), isa_param_name);

TEST_P(AttentionTest, OnCodesEqualsDecodeThenAttend) {
  for (const KvFormat format : kFormats) {
    for (const auto& [q_heads, kv_heads] : {std::pair{2, 2}, {4, 2}, {4, 1}, {5, 1}, {8, 1}}) {
      const KvShape shape{format, q_heads, kv_heads, 128};
      SCOPED_TRACE(std::string(kv_format_name(format)) + " q_heads " + std::to_string(q_heads));
      KvSequence s = make_sequence(shape, 520, 11);
      KvCacheDriver(shape, pages_for(s.length), GetParam(), 1, 5).run(s, 400, 400);
      for (const int64_t p : {0, 27, 128, 255, 256, 399}) expect_attention_is_right(shape, s, p, 0);
      for (const int64_t p : {400, 512, 519}) expect_attention_is_right(shape, s, p, p);
    }
  }
}

TEST_P(AttentionTest, AnyHeadDimWorksWithFp16Pages) {
  for (const int head_dim : {8, 16, 24, 64, 80, 96, 192, 256}) {
    const KvShape shape{KvFormat::kFp16, 4, 2, head_dim};
    SCOPED_TRACE(head_dim);
    KvSequence s = make_sequence(shape, 170, 21), t = s;
    KvCacheDriver(shape, pages_for(s.length), GetParam(), 1, 5).run(s, 0, 1);
    KvCacheDriver(shape, pages_for(s.length), GetParam(), 2, 6).run(t, 170, 170);
    EXPECT_TRUE(bitwise_equal(s.out, t.out));
    for (const int64_t p : {0, 15, 16, 127, 128, 169}) expect_attention_is_right(shape, s, p, p);
  }
}

TEST_P(AttentionTest, RowsHaveTheSameBitsForAnyChunkAndNumberOfThreads) {
  for (const KvFormat format : kFormats) {
    for (const int group : {1, 2, 4, 5, 8}) {
      const KvShape shape{format, group, 1, 128};
      SCOPED_TRACE(std::string(kv_format_name(format)) + " group " + std::to_string(group));
      const KvSequence fresh = make_sequence(shape, 300, 31);
      KvSequence expected = fresh;
      KvCacheDriver(shape, pages_for(300), GetParam(), 1, 1).run(expected, 0, 1);
      struct Schedule {
        int64_t prompt;
        int chunk, threads;
      };
      for (const Schedule& o :
           {Schedule{300, 512, 1}, {300, 128, 2}, {290, 256, 2}, {257, 128, 3}, {129, 256, 4}}) {
        KvSequence s = fresh;
        KvCacheDriver(shape, pages_for(300), GetParam(), o.threads, 7).run(s, o.prompt, o.chunk);
        EXPECT_TRUE(bitwise_equal(s.out, expected.out))
            << "prompt " << o.prompt << ", chunk " << o.chunk << ", threads " << o.threads;
      }
    }
  }
}

TEST_P(AttentionTest, RowsHaveTheSameBitsAcrossEveryBorder) {
  for (const KvFormat format : kFormats) {
    const KvShape shape{format, 2, 1, 128};
    KvSequence expected = make_sequence(shape, 1002, 41);
    const KvSequence fresh = expected;
    KvCacheDriver(shape, pages_for(1002), GetParam(), 1, 1).run(expected, 0, 1);
    for (const int64_t length : {1, 26, 27, 28, 127, 128, 129, 255, 256, 257, 400, 1000}) {
      KvSequence s = fresh;  // the prompt ends at the border, then two decodes cross it
      s.length = length + 2;
      KvCacheDriver driver(shape, pages_for(1002), GetParam(), 2, static_cast<uint64_t>(length));
      driver.run(s, length, 384);
      const size_t count = static_cast<size_t>(s.length) * driver.row_size();
      EXPECT_TRUE(bitwise_equal({s.out.data(), count}, {expected.out.data(), count}))
          << kv_format_name(format) << ", prompt of " << length;
    }
  }
}

TEST_P(AttentionTest, RowsHaveTheSameBitsInMixedBatches) {
  for (const KvFormat format : kFormats) {
    const KvShape shape{format, 6, 3, 128};
    std::vector<KvSequence> alone, together;
    for (const int64_t length : {300, 131, 40, 513, 1})
      alone.push_back(make_sequence(shape, length, 50 + static_cast<uint64_t>(length)));
    together = alone;
    for (KvSequence& s : alone)
      KvCacheDriver(shape, pages_for(s.length), GetParam(), 1, 1).run(s, 0, 1);
    KvCacheDriver driver(shape, 120, GetParam(), 2, 9);
    std::mt19937_64 engine(99);  // every step takes a random subset: chunks and decodes mixed
    for (bool busy = true; busy;) {
      busy = false;
      std::vector<std::pair<KvSequence*, int>> work;
      for (KvSequence& s : together) {
        if (s.done == s.length) continue;
        busy = true;
        if (engine() % 3 == 0) continue;
        const int64_t left = s.length - s.done;
        const bool border = s.done % kBlockTokens == 0;
        const int64_t chunk = border && engine() % 2 == 0 ? (engine() % 2 == 0 ? 128 : 256) : 1;
        const int64_t rows = std::min(left, chunk);
        work.emplace_back(&s, static_cast<int>(rows));
      }
      if (!work.empty()) driver.step(work);
      ASSERT_FALSE(HasFatalFailure());
    }
    for (size_t i = 0; i < alone.size(); ++i)
      EXPECT_TRUE(bitwise_equal(together[i].out, alone[i].out))
          << kv_format_name(format) << ", sequence " << i;
  }
}

TEST_P(AttentionTest, AContextSplitBetweenThreadsHasTheSameBits) {
  // 3 KV heads on 2 threads: blocks are shared out, in two rounds (a round holds 64 blocks).
  const KvShape shape{KvFormat::kKvarnK4V2, 3, 3, 128};
  KvSequence a = make_sequence(shape, 64 * 128 + 200, 61), b = a;
  for (const auto& [s, threads] : {std::pair{&a, 1}, {&b, 2}}) {
    KvCacheDriver driver(shape, pages_for(a.length), GetParam(), threads, 3);
    driver.attend = false;
    while (s->length - s->done > 3)
      driver.step({{s, static_cast<int>(std::min<int64_t>(4096, s->length - s->done - 3))}});
    driver.attend = true;
    driver.run(*s, s->done, 1);
  }
  EXPECT_TRUE(bitwise_equal(a.out, b.out));
  EXPECT_GT(largest_magnitude(a.out), 0.f);
}

TEST_P(AttentionTest, TheChunkStartRuleReadsTheChunksOwnTilesExact) {
  const KvShape shape{KvFormat::kKvarnK4V2, 2, 1, 128};
  KvSequence s = make_sequence(shape, 700, 71), by_position = s;
  KvCacheDriver driver(shape, pages_for(700), GetParam(), 2, 3);
  driver.rule = ReadingRule::kChunkStart;
  driver.run(s, 700, 384);
  for (const int64_t p : {127, 128, 300, 383}) {
    expect_attention_is_right(shape, s, p, 0, ReadingRule::kChunkStart);
  }
  for (const int64_t p : {384, 511, 512, 640, 699})
    expect_attention_is_right(shape, s, p, 384, ReadingRule::kChunkStart);
  KvCacheDriver(shape, pages_for(700), GetParam(), 2, 3).run(by_position, 700, 384);
  EXPECT_FALSE(bitwise_equal(s.out, by_position.out)) << "the rules differ from position 256 on";
}

TEST(AttentionIsaTest, InstructionSetsAgreeToRounding) {
  for (const KvFormat format : kFormats) {
    const KvShape shape{format, 4, 2, 128};
    KvSequence expected = make_sequence(shape, 390, 81);
    const KvSequence fresh = expected;
    KvCacheDriver(shape, pages_for(390), CpuIsa::kScalar, 1, 1).run(expected, 390, 390);
    for (const CpuIsa isa : kKvIsas) {
      if (!cpu_isa_supported(isa)) continue;
      KvSequence s = fresh;
      KvCacheDriver(shape, pages_for(390), isa, 1, 1).run(s, 390, 390);
      EXPECT_TRUE(near_relative_to_largest(s.out, expected.out, kTolerance)) << cpu_isa_name(isa);
    }
  }
}

TEST_P(AttentionTest, WhatUnwrittenAndFreedPagesHoldNeverShows) {
  for (const KvFormat format : kFormats) {
    const KvShape shape{format, 4, 2, 128};
    KvSequence nan = make_sequence(shape, 290, 95), zero = nan;
    KvCacheDriver(shape, pages_for(290), GetParam(), 1, 3).run(nan, 150, 256);
    KvCacheDriver(shape, pages_for(290), GetParam(), 1, 3, std::byte{0}).run(zero, 150, 256);
    for (const float x : nan.out) ASSERT_TRUE(std::isfinite(x));
    EXPECT_TRUE(bitwise_equal(nan.out, zero.out)) << kv_format_name(format);
  }
}

TEST_P(AttentionTest, LargeScoresDoNotOverflow) {
  const KvShape shape{KvFormat::kKvarnK4V2, 2, 1, 128};
  KvSequence s = make_sequence(shape, 300, 91);
  for (float& q : s.q) q *= 1000.f;  // softmax becomes the largest score: far ones underflow to 0
  KvCacheDriver(shape, pages_for(300), GetParam(), 1, 1).run(s, 300, 300);
  for (const float x : s.out) ASSERT_TRUE(std::isfinite(x));
}

}  // namespace
}  // namespace kvarn::test
