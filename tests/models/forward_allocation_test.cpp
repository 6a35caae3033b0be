// A step allocates nothing: forward() takes its activations from the arena and its ops take nothing
// from the heap, on any thread. Counted by replacing operator new in this binary.
#include <gtest/gtest.h>

#include <atomic>
#include <cstdlib>
#include <new>

#include "models/model.h"
#include "tests/support/tiny_model.h"

namespace {
std::atomic<int64_t> g_allocations{0};
}  // namespace

// Not inlined: the compiler would take new and free() for a mismatched pair.
[[gnu::noinline]] void* operator new(size_t bytes) {
  g_allocations.fetch_add(1, std::memory_order_relaxed);
  void* data = std::malloc(bytes == 0 ? 1 : bytes);
  if (data == nullptr) throw std::bad_alloc();
  return data;
}
// Whoever asks without exceptions (std::stable_sort) must get memory that delete can free, too.
[[gnu::noinline]] void* operator new(size_t bytes, const std::nothrow_t& /*tag*/) noexcept {
  g_allocations.fetch_add(1, std::memory_order_relaxed);
  return std::malloc(bytes == 0 ? 1 : bytes);
}
[[gnu::noinline]] void operator delete(void* data) noexcept { std::free(data); }
[[gnu::noinline]] void operator delete(void* data, size_t) noexcept { std::free(data); }

namespace kvarn {
namespace {

class ForwardAllocationTest : public ::testing::TestWithParam<KvFormat> {};

TEST_P(ForwardAllocationTest, AStepAllocatesNothing) {
  const test::TempDir dir;
  test::write_tiny_model(dir.path());
  const std::unique_ptr<Backend> backend = make_cpu_backend({.threads = 2});
  const std::unique_ptr<Model> model =
      load_model({.path = dir.path(), .format = LoadFormat::kAuto, .shape = {}}, *backend).value();

  // A decode row at position 0 of one sequence and a chunk of 130 rows of another, whose block 1
  // would be coded at its end; an encode of the decode's (empty) pages comes first.
  constexpr int kRows = 131;
  const KvLayout layout = make_kv_layout(GetParam(), 128);
  const ModelConfig& config = model->config();
  constexpr int64_t kPages = 32;
  Buffer pool = backend->allocate(
      static_cast<size_t>(kPages * config.num_kv_heads * config.num_layers * layout.page_bytes));
  std::vector<KvLayerView> layers;
  for (int l = 0; l < config.num_layers; ++l) {
    layers.push_back({pool.data() + l * kPages * config.num_kv_heads * layout.page_bytes, kPages,
                      config.num_kv_heads, layout});
  }
  std::vector<int32_t> tokens(kRows, 3), positions(kRows);
  std::vector<int64_t> slots(kRows, -1);
  for (int row = 1; row < kRows; ++row) positions[static_cast<size_t>(row)] = row - 1;
  const std::vector<AttentionSequence> sequences = {
      {.first_row = 0, .num_rows = 1, .first_position = 0, .first_block = 0},
      {.first_row = 1, .num_rows = kRows - 1, .first_position = 0, .first_block = 1}};
  BlockPages pages;
  for (int i = 0; i < kMaxPagesPerBlock; ++i) pages[static_cast<size_t>(i)] = i;
  const std::vector<BlockPages> table(3, pages);
  const std::vector<EncodeTile> tiles(layout.coded() ? 1 : 0,
                                      {.first_row = -1, .source_pages = pages, .target_page = 9});
  const std::vector<EncodeTile> own_tiles(
      layout.coded() ? 1 : 0, {.first_row = 1, .source_pages = pages, .target_page = 10});
  const std::vector<int32_t> logit_rows = {0, kRows - 1};
  std::vector<float> logits(2 * static_cast<size_t>(config.vocab_size));
  Arena arena(backend->allocate(model->workspace_bytes(kRows, 2)));
  const StepInput input{.token_ids = tokens,
                        .positions = positions,
                        .slots = slots,
                        .sequences = sequences,
                        .num_decode_sequences = 1,
                        .block_pages = table,
                        .encode_before = tiles,
                        .encode_in_layer = own_tiles,
                        .logit_rows = logit_rows,
                        .rule = ReadingRule::kPosition};
  const auto step = [&] {
    arena.reset();
    model->forward(backend->begin_step(input, {}), {layers, layout}, arena,
                   Tensor::of(logits.data(), {2, config.vocab_size}), nullptr);
    backend->end_step({});
  };
  step();  // what an op sets up once, at first use
  const int64_t before = g_allocations.load();
  for (int i = 0; i < 3; ++i) step();
  EXPECT_EQ(g_allocations.load() - before, 0);
  ::operator delete(::operator new(1));  // the counter counts
  EXPECT_GT(g_allocations.load() - before, 0);
}

INSTANTIATE_TEST_SUITE_P(Formats, ForwardAllocationTest,
                         ::testing::Values(KvFormat::kFp16, KvFormat::kKvarnK4V2,
                                           KvFormat::kKvarnK4V4),
                         [](const auto& format) {
                           return std::string(kv_format_name(format.param));
                         });

}  // namespace
}  // namespace kvarn
