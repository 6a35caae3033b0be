// Decode attention on the GPU against its CPU twin: caches are filled by the CPU's ops, their pages
// brought into the GPU's order, and one step of decodes is computed by both. The GPU's pool holds
// NaN wherever nothing was written.
#include <gtest/gtest.h>

#include <cmath>
#include <cstdio>
#include <cstring>
#include <random>
#include <string>
#include <vector>

#include "kernels/attention_cuda.h"
#include "tests/kernels/kv_cache_driver.h"
#include "tests/support/cuda_fixture.h"
#include "tests/support/device_pages.h"

namespace kvarn::test {
namespace {

constexpr KvFormat kFormats[] = {KvFormat::kFp16, KvFormat::kKvarnK4V2, KvFormat::kKvarnK4V4};

// A batch whose last positions are decoded together. The expected rows are the CPU twin's.
struct Batch {
  KvShape shape;
  KvLayout layout;
  std::vector<AttentionSequence> sequences;
  std::vector<BlockPages> table;
  std::vector<std::byte> pages;  // in the GPU's order
  int64_t num_pages;
  std::vector<half> q;          // [rows][q_heads][128]
  std::vector<float> expected;  // [rows][q_heads * 128]
  size_t row_size;

  // A row of length 0 fills the batch up.
  Batch(const KvShape& kv_shape, const std::vector<int64_t>& lengths, uint64_t seed,
        float q_scale = 1.f)
      : shape(kv_shape), layout(make_kv_layout(kv_shape.format, 128)) {
    num_pages = 4;
    for (const int64_t length : lengths) num_pages += length / (layout.coded() ? 64 : 32) + 24;
    KvCacheDriver driver(shape, static_cast<int>(num_pages), best_cpu_isa(), 2, seed);
    row_size = driver.row_size();
    std::vector<KvSequence> all;
    for (const int64_t length : lengths) {
      all.push_back(make_sequence(shape, length, seed + all.size()));
      for (float& x : all.back().q) x = to_float(to_half(x * q_scale));
    }
    driver.attend = false;
    for (KvSequence& s : all) {
      while (s.length - s.done > 1) {
        driver.step({{&s, static_cast<int>(std::min<int64_t>(1024, s.length - 1 - s.done))}});
      }
    }
    driver.attend = true;
    std::vector<std::pair<KvSequence*, int>> work;
    for (KvSequence& s : all) {
      if (s.length > 0) work.emplace_back(&s, 1);
    }
    driver.step(work);

    const size_t page_bytes = static_cast<size_t>(layout.page_bytes);
    pages.assign(static_cast<size_t>(num_pages * shape.kv_heads) * page_bytes, std::byte{0xff});
    const auto convert = [&](int32_t page, bool coded) {
      for (int head = 0; head < shape.kv_heads; ++head) {
        const size_t at = static_cast<size_t>(int64_t{page} * shape.kv_heads + head) * page_bytes;
        const std::byte* from = driver.layer().data + at;
        const std::vector<std::byte> to =
            coded ? coded_page_to_device(layout, from) : exact_page_to_device(layout, from);
        std::copy(to.begin(), to.end(), pages.begin() + static_cast<std::ptrdiff_t>(at));
      }
    };
    for (const KvSequence& s : all) {
      sequences.push_back({static_cast<int32_t>(sequences.size()), s.length > 0 ? 1 : 0,
                           static_cast<int32_t>(std::max<int64_t>(s.length - 1, 0)),
                           static_cast<int32_t>(table.size())});
      table.insert(table.end(), s.blocks.begin(), s.blocks.end());
      for (size_t b = 0; b < s.blocks.size(); ++b) {
        for (const int32_t page : s.blocks[b]) {
          if (page >= 0) convert(page, s.block_is_coded[b]);
        }
      }
      const size_t last = s.length > 0 ? static_cast<size_t>(s.length - 1) * row_size : 0;
      for (size_t i = 0; i < row_size; ++i) {
        q.push_back(s.length > 0 ? to_half(s.q[last + i]) : half{0x7e00});
        expected.push_back(s.length > 0 ? s.out[last + i] : 0.f);
      }
    }
  }
};

// A batch on the GPU. `grid`: thread blocks to divide the work over.
class OnGpu {
 public:
  OnGpu(const Batch& batch, int grid, int max_sequences)
      : batch_(batch),
        attention_(limits(batch, max_sequences), grid),
        q_(batch.q),
        table_(batch.table),
        sequences_(batch.sequences),
        pages_(batch.pages),
        out_(batch.q.size()),
        plan_(attention_.max_plan_bytes()) {
    plan(batch.sequences);
  }

  void plan(const std::vector<AttentionSequence>& sequences) {
    std::vector<std::byte> bytes(attention_.max_plan_bytes());
    const size_t used = attention_.plan(sequences, bytes.data());
    ASSERT_LE(used, bytes.size());
    CUDA_CHECK(cudaMemcpy(plan_.data(), bytes.data(), used, cudaMemcpyHostToDevice));
  }

  void run(cudaStream_t stream) {
    const KvShape& shape = batch_.shape;
    const auto rows = static_cast<int64_t>(batch_.sequences.size());
    AttentionParams params{};
    params.q = Tensor::of(q_.data(), {rows, shape.q_heads, 128});
    params.sequences = {sequences_.data(), sequences_.size()};
    params.block_pages = table_.data();
    params.layer = {pages_.data(), batch_.num_pages, shape.kv_heads, batch_.layout};
    params.q_heads = shape.q_heads;
    params.scale = 1.f / std::sqrt(128.f);
    params.out = Tensor::of(out_.data(), {rows, int64_t{shape.q_heads} * 128});
    attention_.run(stream, params, plan_.data());
  }

  void poison() { CUDA_CHECK(cudaMemset(out_.data(), 0xff, out_.bytes())); }
  void set_q(const std::vector<half>& q) {
    CUDA_CHECK(cudaMemcpy(q_.data(), q.data(), q_.bytes(), cudaMemcpyHostToDevice));
  }
  std::vector<bf16> out() const { return out_.host(); }

 private:
  static StepLimits limits(const Batch& batch, int max_sequences) {
    StepLimits l;
    l.max_sequences = l.max_rows = max_sequences;
    l.q_heads = batch.shape.q_heads;
    l.kv_heads = batch.shape.kv_heads;
    l.head_dim = 128;
    l.layout = batch.layout;
    return l;
  }

  const Batch& batch_;
  cuda::DecodeAttention attention_;
  DeviceArray<half> q_;
  DeviceArray<BlockPages> table_;
  DeviceArray<AttentionSequence> sequences_;
  DeviceArray<std::byte> pages_;
  DeviceArray<bf16> out_;
  DeviceArray<std::byte> plan_;
};

// Relative error of the kernel itself: the output's rounding to bf16 (about 1.6e-3) is taken out,
// as the squares of independent errors add up.
double own_error(const std::vector<bf16>& out, const std::vector<float>& expected, size_t begin,
                 size_t end) {
  double error = 0, rounding = 0, norm = 0;
  for (size_t i = begin; i < end; ++i) {
    const double e = expected[i], x = to_float(out[i]);
    error += (x - e) * (x - e);
    const double r = to_float(to_bf16(expected[i])) - e;
    rounding += r * r;
    norm += e * e;
  }
  if (!std::isfinite(error)) return INFINITY;
  return std::sqrt(std::max(0., error - rounding) / norm);
}

// The operands x k_step, p and p v_step are rounded to fp16 (2^-12 each at most, relative to terms
// that partly cancel); scores here have a deviation of about 4.7 in log2. A wrong page, row, scale
// or weight shows as 1e-2 or more in its row.
constexpr double kCaseTolerance = 2e-3, kRowTolerance = 6e-3;

void expect_equal_to_twin(const Batch& batch, const std::vector<bf16>& out) {
  for (size_t row = 0; row < batch.sequences.size(); ++row) {
    const size_t begin = row * batch.row_size, end = begin + batch.row_size;
    if (batch.sequences[row].num_rows == 0) {
      for (size_t i = begin; i < end; ++i) {
        ASSERT_EQ(out[i].bits, 0xffff) << "row " << row << " only fills the batch up";
      }
      continue;
    }
    EXPECT_LT(own_error(out, batch.expected, begin, end), kRowTolerance)
        << "row " << row << ", position " << batch.sequences[row].first_position;
  }
  std::vector<float> expected;
  std::vector<bf16> computed;
  for (size_t row = 0; row < batch.sequences.size(); ++row) {
    if (batch.sequences[row].num_rows == 0) continue;
    const auto begin = static_cast<std::ptrdiff_t>(row * batch.row_size);
    const auto end = begin + static_cast<std::ptrdiff_t>(batch.row_size);
    expected.insert(expected.end(), batch.expected.begin() + begin, batch.expected.begin() + end);
    computed.insert(computed.end(), out.begin() + begin, out.begin() + end);
  }
  const double error = own_error(computed, expected, 0, computed.size());
  std::printf("  %s, %zu rows, %d heads for %d: error %.2e\n", kv_format_name(batch.shape.format),
              batch.sequences.size(), batch.shape.q_heads, batch.shape.kv_heads, error);
  EXPECT_LT(error, kCaseTolerance);
}

bool same_bits(const std::vector<bf16>& a, const std::vector<bf16>& b) {
  return a.size() == b.size() && std::memcmp(a.data(), b.data(), a.size() * sizeof(bf16)) == 0;
}

class AttentionDecodeTest : public CudaTest {
 protected:
  void check(const Batch& batch, const std::vector<int>& grids) {
    for (const int grid : grids) {
      SCOPED_TRACE(std::string(kv_format_name(batch.shape.format)) + ", q_heads " +
                   std::to_string(batch.shape.q_heads) + ", grid " + std::to_string(grid));
      OnGpu gpu(batch, grid, static_cast<int>(batch.sequences.size()));
      gpu.run(stream_);
      wait();
      const std::vector<bf16> first = gpu.out();
      expect_equal_to_twin(batch, first);
      gpu.poison();
      gpu.run(stream_);  // arrival counters are as they were before
      wait();
      EXPECT_TRUE(same_bits(first, gpu.out())) << "a plan gives the same bits each time";
    }
  }
};

TEST_F(AttentionDecodeTest, EqualsTheTwinAtEveryBorder) {
  for (const KvFormat format : kFormats) {
    for (const int group : {1, 2, 4, 5, 8}) {
      const KvShape shape{format, 2 * group, 2, 128};
      check(Batch(shape, {1, 27, 28, 127, 128, 129, 255, 256, 257, 1000}, 11),
            {1, num_multiprocessors_});
    }
  }
}

TEST_F(AttentionDecodeTest, EqualsTheTwinInLongContexts) {
  for (const KvFormat format : kFormats) {
    check(Batch({format, 8, 1, 128}, {4096}, 21), {7, num_multiprocessors_});
    check(Batch({format, 4, 1, 128}, {4129, 9000, 3}, 22), {5, num_multiprocessors_});
  }
}

TEST_F(AttentionDecodeTest, EqualsTheTwinInRaggedBatches) {
  std::mt19937_64 engine(31);
  for (const int size : {2, 33, 70}) {
    std::vector<int64_t> lengths;
    for (int i = 0; i < size; ++i) {
      lengths.push_back(engine() % 6 == 0 ? 0 : static_cast<int64_t>(1 + engine() % 600));
    }
    lengths.front() = 1500;
    for (const KvFormat format : kFormats) {
      check(Batch({format, 8, 2, 128}, lengths, 32), {3, 40, num_multiprocessors_});
    }
  }
}

TEST_F(AttentionDecodeTest, AStepWithoutDecodesTouchesNothing) {
  const Batch batch({KvFormat::kKvarnK4V2, 4, 2, 128}, {200, 300}, 41);
  OnGpu gpu(batch, num_multiprocessors_, 2);
  std::vector<AttentionSequence> fillers = batch.sequences;
  for (AttentionSequence& s : fillers) s.num_rows = 0;
  for (const std::vector<AttentionSequence>& none : {fillers, std::vector<AttentionSequence>{}}) {
    gpu.plan(none);
    gpu.run(stream_);
    wait();
    for (const bf16 x : gpu.out()) ASSERT_EQ(x.bits, 0xffff);
  }
}

TEST_F(AttentionDecodeTest, ARecordedLaunchServesOtherPlans) {
  for (const KvFormat format : kFormats) {
    const Batch batch({format, 8, 2, 128}, {700, 90, 1300, 256}, 51);
    OnGpu gpu(batch, num_multiprocessors_, 4);
    std::vector<AttentionSequence> fillers = batch.sequences;
    for (AttentionSequence& s : fillers) s.num_rows = 0;
    gpu.plan(fillers);
    cudaGraph_t graph = nullptr;
    cudaGraphExec_t exec = nullptr;
    CUDA_CHECK(cudaStreamBeginCapture(stream_, cudaStreamCaptureModeThreadLocal));
    gpu.run(stream_);
    CUDA_CHECK(cudaStreamEndCapture(stream_, &graph));
    CUDA_CHECK(cudaGraphInstantiate(&exec, graph, 0));
    CUDA_CHECK(cudaGraphLaunch(exec, stream_));
    wait();
    gpu.plan(batch.sequences);
    for (int replay = 0; replay < 3; ++replay) {
      gpu.poison();
      CUDA_CHECK(cudaGraphLaunch(exec, stream_));
      wait();
      expect_equal_to_twin(batch, gpu.out());
    }
    CUDA_CHECK(cudaGraphExecDestroy(exec));
    CUDA_CHECK(cudaGraphDestroy(graph));
  }
}

TEST_F(AttentionDecodeTest, LargeScoresDoNotOverflow) {
  for (const KvFormat format : kFormats) {
    // Softmax becomes the largest score; which one it is may be rounding.
    const Batch batch({format, 4, 2, 128}, {300, 1000}, 61, 1000.f);
    OnGpu gpu(batch, num_multiprocessors_, 2);
    gpu.run(stream_);
    wait();
    for (const bf16 x : gpu.out()) ASSERT_TRUE(std::isfinite(to_float(x)));
  }
}

}  // namespace
}  // namespace kvarn::test
