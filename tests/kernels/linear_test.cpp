// linear(): near a float64 product, and the same bits for a row alone, in any batch, on any number
// of threads. Every kernel of the host is run.
#include "kernels/linear_cpu.h"

#include <gtest/gtest.h>
#include <sys/mman.h>
#include <unistd.h>

#include <cmath>
#include <cstring>
#include <random>

#include "tests/kernels/isa_param.h"
#include "tests/support/random_tensor.h"
#include "tests/support/tensor_matchers.h"

namespace kvarn {
namespace {

struct Variant {
  CpuIsa isa;
  DType dtype;
  bool fp32_activations;
};

std::vector<Variant> all_variants() {
  std::vector<Variant> variants;
  for (const CpuIsa isa : test::kAllIsas) {
    for (const DType dtype : {DType::kBF16, DType::kF16, DType::kF32}) {
      variants.push_back({isa, dtype, false});
    }
    if (isa >= CpuIsa::kAvx512Bf16) variants.push_back({isa, DType::kBF16, true});
  }
  return variants;
}

std::string variant_name(const testing::TestParamInfo<Variant>& info) {
  const Variant& v = info.param;
  return std::string(cpu_isa_name(v.isa)) + "_w" + dtype_name(v.dtype) +
         (v.fp32_activations ? "_fp32_activations" : "");
}

bool rounds_activations(const Variant& v) {
  return v.dtype == DType::kBF16 && !v.fp32_activations && v.isa >= CpuIsa::kAvx512Bf16;
}

// A matrix of any float dtype and what its elements are as floats.
struct Matrix {
  std::vector<std::byte> bytes;
  std::vector<float> values;
  DType dtype;
  int64_t n, k;
  Tensor tensor() { return {bytes.data(), dtype, {n, k}}; }
};

Matrix random_matrix(int64_t n, int64_t k, DType dtype, uint64_t seed) {
  Matrix m;
  m.dtype = dtype;
  m.n = n;
  m.k = k;
  m.values = test::random_floats(static_cast<size_t>(n * k), seed);
  m.bytes.resize(m.values.size() * dtype_bytes(dtype));
  for (size_t i = 0; i < m.values.size(); ++i) {
    if (dtype == DType::kF32) {
      std::memcpy(&m.bytes[i * 4], &m.values[i], 4);
    } else if (dtype == DType::kBF16) {
      const bf16 v = to_bf16(m.values[i]);
      m.values[i] = to_float(v);
      std::memcpy(&m.bytes[i * 2], &v, 2);
    } else {
      const half v = to_half(m.values[i]);
      m.values[i] = to_float(v);
      std::memcpy(&m.bytes[i * 2], &v, 2);
    }
  }
  return m;
}

LinearWeight weight_of(std::initializer_list<Tensor> parts) {
  LinearWeight weight;
  for (const Tensor& part : parts) {
    weight.parts[static_cast<size_t>(weight.num_parts++)] = part;
  }
  return weight;
}

std::vector<float> product(const Variant& v, ThreadPool& pool, std::vector<float> x, int64_t rows,
                           const LinearWeight& weight) {
  // NaN where nothing is written.
  std::vector<float> y(static_cast<size_t>(rows * weight.out_features()), std::nanf(""));
  cpu::Linear(pool, v.isa, v.fp32_activations)
      .run(Tensor::of(x.data(), {rows, weight.in_features()}), weight,
           Tensor::of(y.data(), {rows, weight.out_features()}));
  return y;
}

class LinearTest : public testing::TestWithParam<Variant> {
 protected:
  void SetUp() override { SKIP_UNLESS_SUPPORTED(GetParam().isa); }
};

struct Shape {
  int64_t rows, n, k;
};

TEST_P(LinearTest, IsNearTheFloat64Product) {
  // A sum of k terms in fp32 is within k * 2^-24 of the sum of magnitudes, far less with lanes;
  // bf16 activations are within 2^-9 of theirs each.
  ThreadPool pool(2);
  for (const Shape s : {Shape{1, 1, 1}, Shape{1, 64, 256}, Shape{3, 37, 100}, Shape{17, 48, 31},
                        Shape{33, 70, 129}, Shape{64, 96, 1024}}) {
    const std::vector<float> x = test::random_floats(static_cast<size_t>(s.rows * s.k), 1);
    Matrix w = random_matrix(s.n, s.k, GetParam().dtype, 2);
    const std::vector<float> y = product(GetParam(), pool, x, s.rows, weight_of({w.tensor()}));
    for (int64_t row = 0; row < s.rows; ++row) {
      for (int64_t column = 0; column < s.n; ++column) {
        double sum = 0, magnitude = 0;
        for (int64_t i = 0; i < s.k; ++i) {
          const double term = double{x[static_cast<size_t>(row * s.k + i)]} *
                              double{w.values[static_cast<size_t>(column * s.k + i)]};
          sum += term;
          magnitude += std::abs(term);
        }
        const double tolerance = rounds_activations(GetParam()) ? 0x1p-8 : 1e-6;
        ASSERT_NEAR(y[static_cast<size_t>(row * s.n + column)], sum, tolerance * magnitude + 1e-30)
            << "rows " << s.rows << " n " << s.n << " k " << s.k << " at " << row << ", " << column;
      }
    }
  }
}

TEST_P(LinearTest, ARowHasTheSameBitsAloneAndInEveryBatch) {
  ThreadPool pool(1), pool2(2), pool3(3);
  std::mt19937 random(7);
  for (int round = 0; round < 12; ++round) {
    const auto pick = [&](int64_t low, int64_t high) {
      return low + static_cast<int64_t>(random() % static_cast<uint64_t>(high - low + 1));
    };
    const int64_t n = round % 3 == 0 ? 16 * pick(1, 12) : pick(1, 200);
    const int64_t k = round % 2 == 0 ? 32 * pick(1, 12) : pick(1, 400);
    const int64_t most = round == 0 ? 150 : 40;
    const std::vector<float> x =
        test::random_floats(static_cast<size_t>(most * k), random(), -3, 3);
    Matrix w = random_matrix(n, k, GetParam().dtype, random());
    const LinearWeight weight = weight_of({w.tensor()});
    std::vector<float> alone;
    for (int64_t row = 0; row < most; ++row) {
      const std::vector<float> y =
          product(GetParam(), pool, {x.begin() + row * k, x.begin() + (row + 1) * k}, 1, weight);
      alone.insert(alone.end(), y.begin(), y.end());
    }
    for (const int64_t rows : {int64_t{2}, int64_t{3}, int64_t{5}, int64_t{8}, int64_t{15},
                               int64_t{16}, int64_t{17}, int64_t{31}, int64_t{33}, most}) {
      const int64_t first = pick(0, most - rows);
      for (ThreadPool* p : {&pool, &pool2, &pool3}) {
        const std::vector<float> y = product(
            GetParam(), *p, {x.begin() + first * k, x.begin() + (first + rows) * k}, rows, weight);
        ASSERT_TRUE(test::bitwise_equal(y, std::span(alone).subspan(static_cast<size_t>(first * n),
                                                                    static_cast<size_t>(rows * n))))
            << "rows " << first << " + " << rows << ", n " << n << ", k " << k << ", threads "
            << p->size();
      }
    }
  }
}

TEST_P(LinearTest, WorkThatLeavesTheCacheGivesTheSameBits) {
  // More packed x than is kept in L2 at once, and more weights: the loops over both start again.
  ThreadPool pool(2);
  const int64_t rows = 200, n = 37, k = 4100;
  const std::vector<float> x = test::random_floats(static_cast<size_t>(rows * k), 3);
  Matrix w = random_matrix(n, k, GetParam().dtype, 4);
  const LinearWeight weight = weight_of({w.tensor()});
  const std::vector<float> y = product(GetParam(), pool, x, rows, weight);
  for (const int64_t row : {int64_t{0}, int64_t{99}, int64_t{127}, int64_t{128}, rows - 1}) {
    const std::vector<float> alone =
        product(GetParam(), pool, {x.begin() + row * k, x.begin() + (row + 1) * k}, 1, weight);
    ASSERT_TRUE(test::bitwise_equal(
        std::span(y).subspan(static_cast<size_t>(row * n), static_cast<size_t>(n)), alone))
        << "row " << row;
  }
}

TEST_P(LinearTest, FusedRowBlocksEqualSeparateOnes) {
  ThreadPool pool(2);
  const int64_t rows = 5, k = 70;
  const std::vector<float> x = test::random_floats(static_cast<size_t>(rows * k), 5);
  Matrix a = random_matrix(40, k, GetParam().dtype, 6);
  Matrix b = random_matrix(9, k, DType::kF32, 7);  // another dtype: x is packed again
  Matrix c = random_matrix(33, k, GetParam().dtype, 8);
  const std::vector<float> fused =
      product(GetParam(), pool, x, rows, weight_of({a.tensor(), b.tensor(), c.tensor()}));
  int64_t offset = 0;
  for (Matrix* m : {&a, &b, &c}) {
    const std::vector<float> part = product(GetParam(), pool, x, rows, weight_of({m->tensor()}));
    for (int64_t row = 0; row < rows; ++row) {
      ASSERT_TRUE(test::bitwise_equal(
          std::span(fused).subspan(static_cast<size_t>(row * 82 + offset),
                                   static_cast<size_t>(m->n)),
          std::span(part).subspan(static_cast<size_t>(row * m->n), static_cast<size_t>(m->n))));
    }
    offset += m->n;
  }
}

TEST_P(LinearTest, ReadsNothingBehindTheWeights) {
  // The matrix ends where an unreadable page begins, as a mapped file may.
  ThreadPool pool(1);
  const auto page = static_cast<size_t>(sysconf(_SC_PAGESIZE));
  for (const Shape s : {Shape{1, 13, 45}, Shape{4, 21, 31}, Shape{40, 35, 64}, Shape{1, 32, 63}}) {
    Matrix w = random_matrix(s.n, s.k, GetParam().dtype, 9);
    const size_t mapped = (w.bytes.size() + page - 1) / page * page + page;
    auto* base = static_cast<std::byte*>(
        mmap(nullptr, mapped, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
    ASSERT_NE(base, MAP_FAILED);
    std::byte* copy = base + mapped - page - w.bytes.size();
    std::memcpy(copy, w.bytes.data(), w.bytes.size());
    ASSERT_EQ(mprotect(base + mapped - page, page, PROT_NONE), 0);
    const std::vector<float> x = test::random_floats(static_cast<size_t>(s.rows * s.k), 10);
    const std::vector<float> y =
        product(GetParam(), pool, x, s.rows, weight_of({Tensor(copy, w.dtype, {s.n, s.k})}));
    EXPECT_TRUE(
        test::bitwise_equal(y, product(GetParam(), pool, x, s.rows, weight_of({w.tensor()}))));
    munmap(base, mapped);
  }
}

TEST_P(LinearTest, NotANumberStaysInItsRowAndColumn) {
  ThreadPool pool(1);
  const int64_t rows = 20, n = 40, k = 75;
  std::vector<float> x = test::random_floats(static_cast<size_t>(rows * k), 11);
  Matrix w = random_matrix(n, k, GetParam().dtype, 12);
  const std::vector<float> clean = product(GetParam(), pool, x, rows, weight_of({w.tensor()}));
  x[static_cast<size_t>(6 * k + 74)] = std::nanf("");
  std::memset(&w.bytes[static_cast<size_t>(17 * k) * dtype_bytes(w.dtype)], 0xff,
              dtype_bytes(w.dtype));
  const std::vector<float> y = product(GetParam(), pool, x, rows, weight_of({w.tensor()}));
  for (int64_t row = 0; row < rows; ++row) {
    for (int64_t column = 0; column < n; ++column) {
      const auto i = static_cast<size_t>(row * n + column);
      if (row == 6 || column == 17) {
        EXPECT_TRUE(std::isnan(y[i])) << row << ", " << column;
      } else {
        EXPECT_EQ(y[i], clean[i]) << row << ", " << column;
      }
    }
  }
}

TEST_P(LinearTest, NoRowsDoNothing) {
  ThreadPool pool(1);
  Matrix w = random_matrix(8, 16, GetParam().dtype, 13);
  EXPECT_TRUE(product(GetParam(), pool, {}, 0, weight_of({w.tensor()})).empty());
}

INSTANTIATE_TEST_SUITE_P(Variants, LinearTest, testing::ValuesIn(all_variants()), variant_name);

}  // namespace
}  // namespace kvarn
