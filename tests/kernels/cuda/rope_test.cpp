#include <gtest/gtest.h>

#include <cmath>

#include "kernels/ops_cpu.h"
#include "kernels/ops_cuda.h"
#include "tests/support/cuda_fixture.h"
#include "tests/support/random_tensor.h"
#include "tests/support/tensor_matchers.h"

namespace kvarn {
namespace {

using test::DeviceArray;

enum class Norm { kNone, kBF16, kF32 };

struct Case {
  int64_t rows;
  int q_heads, kv_heads, head_dim;
  bool rotate;
  Norm norm;
  float size = 5.f;  // of the values
};

class CudaRopeTest : public test::CudaTest {
 protected:
  ThreadPool pool_{1};
  std::vector<float> q_;  // of the last run on the GPU, widened
  std::vector<half> k_, v_;

  void check(const Case& c) {
    SCOPED_TRACE(testing::Message()
                 << c.rows << " rows, " << c.q_heads << "/" << c.kv_heads << " heads of "
                 << c.head_dim << (c.rotate ? ", rotated" : "") << ", norm "
                 << static_cast<int>(c.norm) << ", values up to " << c.size);
    constexpr int64_t kPositions = 300;
    const int64_t width = int64_t{c.q_heads + 2 * c.kv_heads} * c.head_dim;
    const int half_dim = c.head_dim / 2;
    const auto qkv = test::random_bf16(static_cast<size_t>(c.rows * width), 1, -c.size, c.size);
    // Any tables will do: the op only reads them.
    auto cosines = test::random_floats(static_cast<size_t>(kPositions * half_dim), 2);
    auto sines = test::random_floats(static_cast<size_t>(kPositions * half_dim), 3);
    auto positions = test::random_tokens(static_cast<size_t>(c.rows), int{kPositions}, 4);
    const auto dim = static_cast<size_t>(c.head_dim);
    auto q_norm = test::random_bf16(dim, 5, 0.5f, 1.5f),
         k_norm = test::random_bf16(dim, 6, 0.5f, 1.5f);
    auto q_norm_f = test::random_floats(dim, 5, 0.5f, 1.5f),
         k_norm_f = test::random_floats(dim, 6, 0.5f, 1.5f);

    QkvParams p{};
    p.eps = 1e-6f;
    p.rotate = c.rotate;
    p.q_heads = c.q_heads;
    p.kv_heads = c.kv_heads;
    p.head_dim = c.head_dim;
    const auto q_size = static_cast<size_t>(c.rows * c.q_heads) * dim;
    const auto kv_size = static_cast<size_t>(c.rows * c.kv_heads) * dim;

    QkvParams cpu = p;
    std::vector<float> wide, q(q_size, std::nanf(""));
    for (const bf16 x : qkv) wide.push_back(to_float(x));
    std::vector<half> k(kv_size), v(kv_size);
    cpu.qkv = Tensor::of(wide.data(), {c.rows, width});
    cpu.positions = positions.data();
    cpu.rope = {Tensor::of(cosines.data(), {kPositions, half_dim}),
                Tensor::of(sines.data(), {kPositions, half_dim})};
    cpu.q = Tensor::of(q.data(), {c.rows, c.q_heads, c.head_dim});
    cpu.k = Tensor::of(k.data(), {c.rows, c.kv_heads, c.head_dim});
    cpu.v = Tensor::of(v.data(), {c.rows, c.kv_heads, c.head_dim});

    const DeviceArray<bf16> d_qkv(qkv), d_q_norm(q_norm), d_k_norm(k_norm);
    const DeviceArray<float> d_cos(cosines), d_sin(sines), d_q_norm_f(q_norm_f),
        d_k_norm_f(k_norm_f);
    const DeviceArray<int32_t> d_positions(positions);
    const DeviceArray<half> d_q(q_size), d_k(kv_size), d_v(kv_size);
    p.qkv = Tensor::of(d_qkv.data(), {c.rows, width});
    p.positions = d_positions.data();
    p.rope = {Tensor::of(d_cos.data(), {kPositions, half_dim}),
              Tensor::of(d_sin.data(), {kPositions, half_dim})};
    p.q = Tensor::of(d_q.data(), {c.rows, c.q_heads, c.head_dim});
    p.k = Tensor::of(d_k.data(), {c.rows, c.kv_heads, c.head_dim});
    p.v = Tensor::of(d_v.data(), {c.rows, c.kv_heads, c.head_dim});
    if (c.norm == Norm::kBF16) {
      cpu.q_norm = Tensor::of(q_norm.data(), {c.head_dim});
      cpu.k_norm = Tensor::of(k_norm.data(), {c.head_dim});
      p.q_norm = Tensor::of(d_q_norm.data(), {c.head_dim});
      p.k_norm = Tensor::of(d_k_norm.data(), {c.head_dim});
    } else if (c.norm == Norm::kF32) {
      cpu.q_norm = Tensor::of(q_norm_f.data(), {c.head_dim});
      cpu.k_norm = Tensor::of(k_norm_f.data(), {c.head_dim});
      p.q_norm = Tensor::of(d_q_norm_f.data(), {c.head_dim});
      p.k_norm = Tensor::of(d_k_norm_f.data(), {c.head_dim});
    }

    cpu::qk_norm_rope_rotate(cpu, pool_, best_cpu_isa());
    cuda::qk_norm_rope_rotate(stream_, p);
    wait();
    k_ = d_k.host();
    v_ = d_v.host();
    const auto near = [&](const std::vector<half>& got, const auto& expected, const char* what) {
      ASSERT_EQ(got.size(), expected.size());
      std::vector<float> wide_expected;
      for (const auto x : expected) wide_expected.push_back(to_float(to_half(to_float(x))));
      const float largest = test::largest_magnitude(wide_expected);
      for (size_t i = 0; i < got.size(); ++i) {
        // Both are rounded to fp16: one ulp where the fp32 values straddle a border. These differ
        // by the order of the sum of squares and by fused operations: some ulp of the largest.
        ASSERT_NEAR(to_float(got[i]), wide_expected[i],
                    0x1p-10f * std::abs(wide_expected[i]) + 1e-6f * largest)
            << what << " " << i;
      }
    };
    near(d_q.host(), q, "q");
    near(k_, k, "k");
    near(v_, v, "v");
  }
};

TEST_F(CudaRopeTest, MatchesTheCpuTwin) {
  for (const int64_t rows : {0, 1, 127, 128, 129}) {
    check({rows, 4, 2, 128, true, Norm::kBF16});
    check({rows, 4, 2, 128, false, Norm::kF32});
  }
  for (const int group : {1, 2, 4, 5, 8}) check({3, 2 * group, 2, 128, true, Norm::kBF16});
  check({5, 40, 8, 128, true, Norm::kF32});
  check({5, 5, 1, 128, true, Norm::kNone});
  check({5, 5, 1, 128, false, Norm::kNone});
}

TEST_F(CudaRopeTest, TakesAnyEvenHeadDimThatIsNotRotated) {
  for (const int head_dim : {2, 64, 66, 80, 256, 512}) {
    for (const Norm norm : {Norm::kNone, Norm::kBF16, Norm::kF32}) {
      check({7, 3, 1, head_dim, false, norm});
    }
  }
}

TEST_F(CudaRopeTest, NaNStaysNaN) {
  std::vector<bf16> qkv(3 * 128, to_bf16(1.f));
  qkv[2 * 128 + 5] = to_bf16(std::nanf(""));  // in the value
  const DeviceArray<bf16> d_qkv(qkv);
  const DeviceArray<float> table(std::vector<float>(64, 1.f));
  const DeviceArray<int32_t> positions(std::vector<int32_t>{0});
  const DeviceArray<half> q(128), k(128), v(128);
  QkvParams p{};
  p.qkv = Tensor::of(d_qkv.data(), {1, 3 * 128});
  p.positions = positions.data();
  p.rope = {Tensor::of(table.data(), {1, 64}), Tensor::of(table.data(), {1, 64})};
  p.q_heads = p.kv_heads = 1;
  p.head_dim = 128;
  p.q = Tensor::of(q.data(), {1, 1, 128});
  p.k = Tensor::of(k.data(), {1, 1, 128});
  p.v = Tensor::of(v.data(), {1, 1, 128});
  cuda::qk_norm_rope_rotate(stream_, p);
  wait();
  const std::vector<half> out = v.host();
  for (size_t i = 0; i < out.size(); ++i) EXPECT_EQ(std::isnan(to_float(out[i])), i == 5) << i;
}

TEST_F(CudaRopeTest, SaturatesAtTheLargestHalf) {
  for (const int head_dim : {64, 128}) {
    check({4, 2, 1, head_dim, head_dim == 128, Norm::kNone, 1e6f});
    size_t saturated = 0;
    for (const half h : v_) {
      ASSERT_TRUE(std::isfinite(to_float(h)));
      saturated += std::abs(to_float(h)) == 65504.f ? 1 : 0;
    }
    EXPECT_GT(saturated, v_.size() / 2);
  }
}

}  // namespace
}  // namespace kvarn
