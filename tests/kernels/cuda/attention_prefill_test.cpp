// Prefill attention on the GPU against its CPU twin on the same pages, for both kernels.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <numeric>
#include <random>
#include <string>
#include <thread>

#include "kernels/attention_cuda.h"
#include "kernels/kv_cpu.h"
#include "kernels/kv_encode_cpu.h"
#include "tests/kernels/kv_cache_driver.h"
#include "tests/support/cuda_fixture.h"
#include "tests/support/device_pages.h"

namespace kvarn::test {
namespace {

constexpr int kDim = kCodedHeadDim;

struct Chunk {
  int start, rows;  // positions [start, start + rows)
};

// A step of prefill chunks and the pages below them, for one layer, in host memory and in the CPU's
// order. Before the chunks' rows come rows of decodes, and behind each chunk rows of nobody: their
// q, k and v are NaN. So are the bytes of pages that no row was written to.
struct Step {
  KvShape shape;
  KvLayout layout;
  std::vector<Chunk> chunks;
  std::vector<half> q, k, v;  // of the step's rows
  std::vector<AttentionSequence> sequences;
  std::vector<BlockPages> table;
  std::vector<std::byte> pages;
  std::vector<bool> page_is_coded;
  int rows = 0, num_pages = 0;
};

constexpr int kForeignRows = 3;

size_t page_at(const Step& step, int32_t page, int head) {
  return (static_cast<size_t>(page) * static_cast<size_t>(step.shape.kv_heads) +
          static_cast<size_t>(head)) *
         static_cast<size_t>(step.layout.page_bytes);
}

// Encodes block b, or writes its first `tokens` rows, to the pages of `blocks`.
void fill_block(Step& step, const KvSequence& s, int b, bool coded, int tokens,
                const BlockPages& pages) {
  const auto dim = static_cast<size_t>(kDim);
  for (int head = 0; head < step.shape.kv_heads; ++head) {
    cpu::TileRows rows;
    for (int t = 0; t < tokens; ++t) {
      const size_t at =
          static_cast<size_t>((b * kBlockTokens + t) * step.shape.kv_heads + head) * dim;
      rows.k[t] = &s.k[at];
      rows.v[t] = &s.v[at];
    }
    if (coded) {
      cpu::encode_tile(rows, step.layout.tile(), step.pages.data() + page_at(step, pages[0], head));
      continue;
    }
    for (int t = 0; t < tokens; ++t) {
      const int row = t % step.layout.exact_rows;
      const int32_t page = pages[static_cast<size_t>(t / step.layout.exact_rows)];
      std::byte* to = step.pages.data() + page_at(step, page, head);
      std::memcpy(to + step.layout.k_row_offset(row), rows.k[t], 2 * dim);
      std::memcpy(to + step.layout.v_row_offset(row), rows.v[t], 2 * dim);
    }
  }
}

Step make_step(const KvShape& shape, const std::vector<Chunk>& chunks, uint64_t seed) {
  Step step{shape, make_kv_layout(shape.format, kDim), chunks, {}, {}, {}, {}, {}, {}, {}};
  for (const Chunk& c : chunks) {
    const int blocks = (c.start + c.rows + kBlockTokens - 1) / kBlockTokens;
    step.num_pages += blocks * kMaxPagesPerBlock;
  }
  step.pages.resize(page_at(step, step.num_pages, 0), std::byte{0xff});
  step.page_is_coded.resize(static_cast<size_t>(step.num_pages));
  std::vector<int32_t> free_pages(static_cast<size_t>(step.num_pages));
  std::iota(free_pages.begin(), free_pages.end(), 0);
  std::shuffle(free_pages.begin(), free_pages.end(), std::mt19937_64(seed));
  const auto take = [&] {
    const int32_t page = free_pages.back();
    free_pages.pop_back();
    return page;
  };
  const auto q_row = static_cast<size_t>(shape.q_heads) * kDim;
  const auto kv_row = static_cast<size_t>(shape.kv_heads) * kDim;
  const auto add_foreign_rows = [&] {
    step.rows += kForeignRows;
    step.q.resize(static_cast<size_t>(step.rows) * q_row, half{0xffff});
    step.k.resize(static_cast<size_t>(step.rows) * kv_row, half{0xffff});
    step.v.resize(static_cast<size_t>(step.rows) * kv_row, half{0xffff});
  };
  add_foreign_rows();
  for (const Chunk& c : chunks) {
    const KvSequence s = make_sequence(shape, c.start + c.rows, ++seed);
    step.sequences.push_back({step.rows, c.rows, c.start, static_cast<int32_t>(step.table.size())});
    const int end = c.start + c.rows;
    for (int b = 0; b * kBlockTokens < end; ++b) {
      const int from = b * kBlockTokens, to = from + kBlockTokens;
      // As the scheduler does: complete tiles of a chunk are encoded before attention runs; a row
      // that follows a tile's last row finds it encoded.
      const bool coded = step.layout.coded() && b >= kSinkBlocks &&
                         (to <= c.start || (c.rows > 1 && from >= c.start && to <= end));
      BlockPages pages;
      pages.fill(-1);
      const int tokens = std::min(kBlockTokens, end - from);
      const int count = coded ? 1 : step.layout.exact_pages(tokens);
      for (int i = 0; i < count; ++i) {
        const int32_t page = take();
        pages[static_cast<size_t>(i)] = page;
        step.page_is_coded[static_cast<size_t>(page)] = coded;
      }
      fill_block(step, s, b, coded, tokens, pages);
      step.table.push_back(pages);
    }
    const auto first = static_cast<size_t>(c.start);
    for (size_t i = first * q_row; i < s.q.size(); ++i) step.q.push_back(to_half(s.q[i]));
    step.k.insert(step.k.end(), s.k.begin() + static_cast<std::ptrdiff_t>(first * kv_row),
                  s.k.end());
    step.v.insert(step.v.end(), s.v.begin() + static_cast<std::ptrdiff_t>(first * kv_row),
                  s.v.end());
    step.rows += c.rows;
    add_foreign_rows();
  }
  return step;
}

// The step's tensors, in memory that `data` says (q and out of the twin are f32).
AttentionParams params_of(const Step& step, ReadingRule rule) {
  AttentionParams p{};
  p.q_heads = step.shape.q_heads;
  p.scale = 1.f / std::sqrt(static_cast<float>(kDim));
  p.rule = rule;
  p.layer = {nullptr, step.num_pages, step.shape.kv_heads, step.layout};
  return p;
}

std::vector<float> on_cpu(const Step& step, ReadingRule rule) {
  std::vector<float> q, out(step.q.size(), -1.f);
  for (const half x : step.q) q.push_back(to_float(x));
  AttentionParams p = params_of(step, rule);
  p.q = Tensor::of(q.data(), {step.rows, step.shape.q_heads, kDim});
  p.k_rows = Tensor::of(step.k.data(), {step.rows, step.shape.kv_heads, kDim});
  p.v_rows = Tensor::of(step.v.data(), {step.rows, step.shape.kv_heads, kDim});
  p.sequences = step.sequences;
  p.block_pages = step.table.data();
  p.layer.data = const_cast<std::byte*>(step.pages.data());
  p.out = Tensor::of(out.data(), {step.rows, step.shape.q_heads * kDim});
  static ThreadPool pool(std::max(1, static_cast<int>(std::thread::hardware_concurrency()) / 2));
  cpu::attention(p, pool, best_cpu_isa());
  return out;
}

std::vector<std::byte> device_order(const Step& step) {
  std::vector<std::byte> pages;
  for (int32_t page = 0; page < step.num_pages; ++page) {
    for (int head = 0; head < step.shape.kv_heads; ++head) {
      const std::byte* from = step.pages.data() + page_at(step, page, head);
      const std::vector<std::byte> to = step.page_is_coded[static_cast<size_t>(page)]
                                            ? coded_page_to_device(step.layout, from)
                                            : exact_page_to_device(step.layout, from);
      pages.insert(pages.end(), to.begin(), to.end());
    }
  }
  return pages;
}

class AttentionPrefillTest : public CudaTest,
                             public ::testing::WithParamInterface<cuda::PrefillKernel> {
 protected:
  // Twice with one object: scratch holds what the first run left. `max_model_len` sizes scratch.
  std::vector<float> on_gpu(const Step& step, ReadingRule rule, int max_model_len) {
    StepLimits limits{};
    limits.max_rows = step.rows;
    limits.max_sequences = static_cast<int>(step.sequences.size());
    limits.max_blocks = static_cast<int64_t>(step.table.size());
    limits.max_model_len = max_model_len;
    limits.q_heads = step.shape.q_heads;
    limits.kv_heads = step.shape.kv_heads;
    limits.head_dim = kDim;
    limits.layout = step.layout;
    cuda::PrefillAttention attention(limits, num_multiprocessors_, GetParam());
    std::vector<std::byte> plan(attention.max_plan_bytes());
    plan.resize(attention.plan(step.sequences, plan.data()));
    EXPECT_LE(plan.size(), attention.max_plan_bytes());

    const DeviceArray<half> q(step.q), k(step.k), v(step.v);
    const DeviceArray<AttentionSequence> sequences(step.sequences);
    const DeviceArray<BlockPages> table(step.table);
    const DeviceArray<std::byte> pages(device_order(step)), device_plan(plan);
    const DeviceArray<bf16> out(step.q.size());
    AttentionParams p = params_of(step, rule);
    p.q = Tensor::of(q.data(), {step.rows, step.shape.q_heads, kDim});
    p.k_rows = Tensor::of(k.data(), {step.rows, step.shape.kv_heads, kDim});
    p.v_rows = Tensor::of(v.data(), {step.rows, step.shape.kv_heads, kDim});
    p.sequences = {sequences.data(), sequences.size()};
    p.block_pages = table.data();
    p.layer.data = pages.data();
    p.out = Tensor::of(out.data(), {step.rows, step.shape.q_heads * kDim});
    for (int i = 0; i < 2; ++i) {
      CUDA_CHECK(cudaMemset(out.data(), 0xff, out.bytes()));
      CUDA_CHECK(cudaDeviceSynchronize());  // the fixture's stream does not wait for memset
      attention.run(stream_, p, step.sequences, device_plan.data());
      wait();
    }
    std::vector<float> result;
    for (const bf16 x : out.host()) result.push_back(to_float(x));
    return result;
  }

  // Output is bf16: its rounding alone is 2^-7 / sqrt(12) of a value's power of two, about 1.7e-3
  // in relative norm, and at most 2^-8 of any value. K', V' and the weights are rounded to fp16 on
  // the way, 2e-4 each, which large scores magnify a little. So 2e-3 over a chunk, and 2^-8 for one
  // vector of 128 values, whose rounding errors scatter.
  void expect_like_twin(const Step& step, ReadingRule rule, int max_model_len) {
    const std::vector<float> expected = on_cpu(step, rule);
    const std::vector<float> actual = on_gpu(step, rule, max_model_len);
    const auto row_size = static_cast<size_t>(step.shape.q_heads) * kDim;
    std::vector<bool> ours(static_cast<size_t>(step.rows));
    for (const AttentionSequence& s : step.sequences) {
      if (s.num_rows == 0) continue;
      double error = 0, norm = 0, worst = 0;
      std::string where;
      for (int row = 0; row < s.num_rows; ++row) {
        ours[static_cast<size_t>(s.first_row + row)] = true;
        for (size_t head = 0; head < static_cast<size_t>(step.shape.q_heads); ++head) {
          const size_t at = static_cast<size_t>(s.first_row + row) * row_size + head * kDim;
          double head_error = 0, head_norm = 0;
          for (size_t i = at; i < at + kDim; ++i) {
            head_error += std::pow(double{actual[i]} - expected[i], 2);
            head_norm += std::pow(double{expected[i]}, 2);
          }
          error += head_error;
          norm += head_norm;
          const double relative = std::sqrt(head_error / head_norm);
          if (!(relative <= worst)) {
            worst = relative;
            where = "row " + std::to_string(row) + ", head " + std::to_string(head);
          }
        }
      }
      SCOPED_TRACE("chunk of " + std::to_string(s.num_rows) + " rows at " +
                   std::to_string(s.first_position));
      EXPECT_LE(std::sqrt(error / norm), 2e-3);
      EXPECT_LE(worst, 0x1p-8) << where;
    }
    for (int row = 0; row < step.rows; ++row) {
      if (ours[static_cast<size_t>(row)]) continue;
      const auto first =
          actual.begin() + static_cast<std::ptrdiff_t>(row) * static_cast<std::ptrdiff_t>(row_size);
      EXPECT_TRUE(std::all_of(first, first + static_cast<std::ptrdiff_t>(row_size),
                              [](float x) { return std::isnan(x); }))
          << "row " << row << " is no chunk's and was written";
    }
  }
};

INSTANTIATE_TEST_SUITE_P(Kernel, AttentionPrefillTest,
                         ::testing::Values(cuda::PrefillKernel::kBest,
                                           cuda::PrefillKernel::kPortable),
                         [](const auto& kernel) {
                           return kernel.param == cuda::PrefillKernel::kBest ? "Best" : "Portable";
                         });

constexpr KvFormat kFormats[] = {KvFormat::kFp16, KvFormat::kKvarnK4V2, KvFormat::kKvarnK4V4};
constexpr ReadingRule kRules[] = {ReadingRule::kPosition, ReadingRule::kChunkStart};

std::string describe(KvFormat format, ReadingRule rule) {
  return std::string(kv_format_name(format)) +
         (rule == ReadingRule::kPosition ? ", by position" : ", by chunk start");
}

// Small enough for compute-sanitizer: every kind of key tile once.
TEST_P(AttentionPrefillTest, SmallStepMatchesTheTwin) {
  for (const KvFormat format : kFormats) {
    SCOPED_TRACE(kv_format_name(format));
    const Step step =
        make_step({format, 2, 1, kDim}, {{0, 129}, {128, 257}, {256, 27}, {130, 1}}, 1);
    for (const ReadingRule rule : kRules) expect_like_twin(step, rule, 512);
  }
}

TEST_P(AttentionPrefillTest, ChunksOfAnyLengthMatchTheTwin) {
  for (const KvFormat format : kFormats) {
    for (const int start : {0, 128, 256, 1024}) {
      std::vector<Chunk> chunks;
      for (const int rows : {1, 27, 127, 128, 129, 200, 384, 512}) chunks.push_back({start, rows});
      const Step step = make_step({format, 2, 1, kDim}, chunks, 11);
      for (const ReadingRule rule : kRules) {
        SCOPED_TRACE(describe(format, rule) + ", from " + std::to_string(start));
        expect_like_twin(step, rule, 16384);
      }
    }
  }
}

TEST_P(AttentionPrefillTest, GroupsOfHeadsMatchTheTwin) {
  for (const KvFormat format : kFormats) {
    for (const int group : {1, 2, 4, 5, 8}) {
      const Step step =
          make_step({format, 3 * group, 3, kDim}, {{0, 200}, {256, 130}, {128, 0}, {384, 1}}, 23);
      SCOPED_TRACE(describe(format, kRules[0]) + ", group " + std::to_string(group));
      expect_like_twin(step, kRules[0], 1024);
    }
  }
}

// Rows that are not decodes but stand alone inside a block: its earlier rows are in exact pages.
TEST_P(AttentionPrefillTest, SingleRowsInsideABlockMatchTheTwin) {
  for (const KvFormat format : kFormats) {
    std::vector<Chunk> chunks;
    for (const int start : {1, 26, 27, 127, 129, 155, 255, 257, 700}) chunks.push_back({start, 1});
    chunks.push_back({128, 140});
    const Step step = make_step({format, 4, 2, kDim}, chunks, 31);
    for (const ReadingRule rule : kRules) {
      SCOPED_TRACE(describe(format, rule));
      expect_like_twin(step, rule, 1024);
    }
  }
}

// Scratch for 12 blocks: the sequences take turns in it, some alone and some together.
TEST_P(AttentionPrefillTest, SequencesTakeTurnsInScratch) {
  for (const KvFormat format : kFormats) {
    const Step step = make_step(
        {format, 4, 2, kDim},
        {{1024, 512}, {0, 100}, {512, 128}, {640, 129}, {1280, 200}, {0, 1536}, {1300, 1}}, 41);
    for (const ReadingRule rule : kRules) {
      SCOPED_TRACE(describe(format, rule));
      expect_like_twin(step, rule, 1536);
    }
  }
}

TEST_P(AttentionPrefillTest, NoRowsLaunchNothing) {
  const Step step = make_step({KvFormat::kKvarnK4V2, 2, 1, kDim}, {{128, 0}}, 51);
  expect_like_twin(step, ReadingRule::kPosition, 512);
  Step empty = make_step({KvFormat::kKvarnK4V2, 2, 1, kDim}, {}, 52);
  expect_like_twin(empty, ReadingRule::kPosition, 512);
}

}  // namespace
}  // namespace kvarn::test
