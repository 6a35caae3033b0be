// QK norm, RoPE and rotation against a float64 twin that follows the formulas one by one, whatever
// the tables hold (YaRN or not: the op only reads them).
#include <gtest/gtest.h>

#include <bit>
#include <cmath>

#include "kernels/ops_cpu.h"
#include "tests/kernels/isa_param.h"
#include "tests/support/random_tensor.h"
#include "tests/support/tensor_matchers.h"

namespace kvarn {
namespace {

using RopeTest = test::IsaTest;

struct Heads {
  int64_t rows = 6;
  int q_heads = 4, kv_heads = 2, head_dim = 128;
  bool with_norm = true, rotate = true;
  int64_t max_positions = 300;
};

struct Output {
  std::vector<float> q;
  std::vector<half> k, v;
};

class Fixture {
 public:
  explicit Fixture(const Heads& heads) : s(heads) {
    const auto half_dim = static_cast<size_t>(s.head_dim / 2);
    const auto positions_count = static_cast<size_t>(s.max_positions);
    width = (s.q_heads + 2 * s.kv_heads) * s.head_dim;
    qkv = test::random_floats(static_cast<size_t>(s.rows * width), 1, -5, 5);
    q_norm = test::random_bf16(static_cast<size_t>(s.head_dim), 2, 0.5f, 1.5f);
    k_norm = test::random_bf16(static_cast<size_t>(s.head_dim), 3, 0.5f, 1.5f);
    // Any pair of tables will do, with an attention factor other than 1.
    for (size_t p = 0; p < positions_count; ++p) {
      for (size_t i = 0; i < half_dim; ++i) {
        const double angle =
            static_cast<double>(p) * std::pow(10000.0, -2.0 * static_cast<double>(i) / s.head_dim);
        cosines.push_back(static_cast<float>(1.07 * std::cos(angle)));
        sines.push_back(static_cast<float>(1.07 * std::sin(angle)));
      }
    }
    for (const int32_t p :
         test::random_tokens(static_cast<size_t>(s.rows), static_cast<int>(s.max_positions), 4)) {
      positions.push_back(p);
    }
  }

  Output run(CpuIsa isa, int threads, int64_t first = 0, int64_t count = -1) {
    if (count < 0) count = s.rows;
    ThreadPool pool(threads);
    Output out;
    out.q.assign(static_cast<size_t>(count * s.q_heads * s.head_dim), std::nanf(""));
    out.k.resize(static_cast<size_t>(count * s.kv_heads * s.head_dim));
    out.v.resize(out.k.size());
    QkvParams p{};
    p.qkv = Tensor::of(qkv.data() + first * width, {count, width});
    p.positions = positions.data() + first;
    p.rope = {Tensor::of(cosines.data(), {s.max_positions, s.head_dim / 2}),
              Tensor::of(sines.data(), {s.max_positions, s.head_dim / 2})};
    if (s.with_norm) {
      p.q_norm = Tensor::of(q_norm.data(), {s.head_dim});
      p.k_norm = Tensor::of(k_norm.data(), {s.head_dim});
    }
    p.eps = 1e-6f;
    p.rotate = s.rotate;
    p.q_heads = s.q_heads;
    p.kv_heads = s.kv_heads;
    p.head_dim = s.head_dim;
    p.q = Tensor::of(out.q.data(), {count, s.q_heads, s.head_dim});
    p.k = Tensor::of(out.k.data(), {count, s.kv_heads, s.head_dim});
    p.v = Tensor::of(out.v.data(), {count, s.kv_heads, s.head_dim});
    cpu::qk_norm_rope_rotate(p, pool, isa);
    return out;
  }

  // Head `head` of row `row` of qkv as float64: heads are q, then k, then v.
  std::vector<double> expected(int64_t row, int head) const {
    const auto d = static_cast<size_t>(s.head_dim);
    const float* source = qkv.data() + row * width + head * s.head_dim;
    std::vector<double> x(source, source + d);
    const bool is_q = head < s.q_heads, is_v = head >= s.q_heads + s.kv_heads;
    if (!is_v) {
      if (s.with_norm) {
        double squares = 0;
        for (const double value : x) squares += value * value;
        const double scale = 1 / std::sqrt(squares / s.head_dim + 1e-6);
        const auto& norm = is_q ? q_norm : k_norm;
        for (size_t i = 0; i < d; ++i) x[i] *= scale * double{to_float(norm[i])};
      }
      const auto table = static_cast<size_t>(positions[static_cast<size_t>(row)]) * (d / 2);
      for (size_t i = 0; i < d / 2; ++i) {
        const double a = x[i], b = x[i + d / 2];
        x[i] = a * double{cosines[table + i]} - b * double{sines[table + i]};
        x[i + d / 2] = b * double{cosines[table + i]} + a * double{sines[table + i]};
      }
    }
    if (!s.rotate) return x;
    std::vector<double> rotated(d, 0);
    for (size_t i = 0; i < d; ++i) {
      for (size_t j = 0; j < d; ++j) rotated[i] += (std::popcount(i & j) % 2 ? -1 : 1) * x[j];
      rotated[i] /= std::sqrt(static_cast<double>(d));
    }
    return rotated;
  }

  Heads s;
  int64_t width = 0;
  std::vector<float> qkv, cosines, sines;
  std::vector<bf16> q_norm, k_norm;
  std::vector<int32_t> positions;
};

TEST_P(RopeTest, FollowsTheFormulas) {
  for (const Heads& heads :
       {Heads{}, Heads{.with_norm = false}, Heads{.rotate = false},
        Heads{.head_dim = 64, .rotate = false}, Heads{.rows = 3, .head_dim = 80, .rotate = false},
        Heads{.q_heads = 5, .kv_heads = 1}}) {
    Fixture f(heads);
    const Output out = f.run(GetParam(), 2);
    const auto d = static_cast<size_t>(heads.head_dim);
    for (int64_t row = 0; row < heads.rows; ++row) {
      for (int head = 0; head < heads.q_heads + 2 * heads.kv_heads; ++head) {
        const std::vector<double> expected = f.expected(row, head);
        for (size_t i = 0; i < d; ++i) {
          const auto kv_at = [&](int first_head) {
            return static_cast<size_t>((row * heads.kv_heads + head - first_head)) * d + i;
          };
          if (head < heads.q_heads) {
            const auto at = static_cast<size_t>(row * heads.q_heads + head) * d + i;
            ASSERT_NEAR(out.q[at], expected[i], 2e-5) << "q " << row << ", " << head << ", " << i;
          } else {
            // Rounded to fp16: half an ulp of 2^-10.
            const half got = head < heads.q_heads + heads.kv_heads
                                 ? out.k[kv_at(heads.q_heads)]
                                 : out.v[kv_at(heads.q_heads + heads.kv_heads)];
            ASSERT_NEAR(to_float(got), expected[i], 0x1p-11 * std::abs(expected[i]) + 2e-5)
                << "kv " << row << ", " << head << ", " << i;
          }
        }
      }
    }
  }
}

TEST_P(RopeTest, EveryIsaAndBatchGivesTheScalarBits) {
  Fixture f(Heads{.rows = 40});
  const Output scalar = f.run(CpuIsa::kScalar, 1);
  const Output batch = f.run(GetParam(), 3);
  EXPECT_TRUE(test::bitwise_equal(batch.q, scalar.q));
  const size_t q_row = scalar.q.size() / 40, kv_row = scalar.k.size() / 40;
  for (size_t i = 0; i < scalar.k.size(); ++i) {
    ASSERT_EQ(batch.k[i].bits, scalar.k[i].bits);
    ASSERT_EQ(batch.v[i].bits, scalar.v[i].bits);
  }
  for (size_t row = 0; row < 40; row += 13) {
    const Output alone = f.run(GetParam(), 1, static_cast<int64_t>(row), 1);
    EXPECT_TRUE(test::bitwise_equal(alone.q, std::span(scalar.q).subspan(row * q_row, q_row)));
    for (size_t i = 0; i < kv_row; ++i) {
      ASSERT_EQ(alone.k[i].bits, scalar.k[row * kv_row + i].bits);
      ASSERT_EQ(alone.v[i].bits, scalar.v[row * kv_row + i].bits);
    }
  }
}

TEST_P(RopeTest, KeysAndValuesSaturateAtTheLargestHalf) {
  Fixture f(Heads{.with_norm = false});
  for (float& value : f.qkv) value *= 1e5f;
  const Output scalar = f.run(CpuIsa::kScalar, 1), out = f.run(GetParam(), 1);
  size_t saturated = 0;
  for (size_t i = 0; i < out.v.size(); ++i) {
    ASSERT_EQ(out.k[i].bits, scalar.k[i].bits);
    ASSERT_EQ(out.v[i].bits, scalar.v[i].bits);
    ASSERT_TRUE(std::isfinite(to_float(out.v[i])));
    saturated += std::abs(to_float(out.v[i])) == 65504.f ? 1 : 0;
  }
  EXPECT_GT(saturated, out.v.size() / 2);
}

INSTANTIATE_FOR_EVERY_ISA(RopeTest);

}  // namespace
}  // namespace kvarn
