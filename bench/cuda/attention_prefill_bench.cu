// Prefill attention of one layer: TFLOP/s of the causal products (4 * head_dim * q_heads a pair of
// query and key, pairs above the diagonal not counted), the pass that decodes pages included.
// Peer: attention_prefill_peer.py FILE on the same card, just before.
//   kvarn_prefill_bench [--kernel portable] [--quick 1] [--peers FILE] [--json FILE] [--commit
//   HASH]
#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <memory>
#include <numeric>
#include <vector>

#include "bench/cuda/timing.h"
#include "kernels/attention_cuda.h"
#include "kernels/attention_prefill.h"
#include "kernels/cuda_check.h"

namespace kvarn::bench {
namespace {

constexpr int kDim = kCodedHeadDim;

// +-[0.5, 1): the hash of DeviceBytes as finite fp16 values.
__global__ void make_values(uint16_t* x, int64_t n) {
  for (int64_t i = blockIdx.x * int64_t{blockDim.x} + threadIdx.x; i < n;
       i += int64_t{gridDim.x} * blockDim.x) {
    x[i] = static_cast<uint16_t>((x[i] & 0x83ff) | 0x3800);
  }
}
// Scales of coded pages in [2^-2, 2^-1): codes stay random.
__global__ void make_scales(std::byte* pages, int page_bytes, TileLayout tile) {
  auto* page = pages + int64_t{blockIdx.x} * page_bytes;
  const int fields[] = {tile.k_step, tile.k_zero,    tile.k_token,
                        tile.v_step, tile.v_channel, tile.v_zero};
  for (const int field : fields) {
    auto* x = reinterpret_cast<uint16_t*>(page + field) + threadIdx.x;
    *x = static_cast<uint16_t>((*x & 0x03ff) | 0x3400);
  }
}

struct Shape {
  const char* name;
  int q_heads, kv_heads;
};
struct Case {
  int start, rows;
};

// Of torch on dense fp16, in TFLOP/s; kNone where the file has none.
struct Peer {
  double tflops = kNone;
  std::string backend;
};
Peer find_peer(const std::string& file, const Shape& shape, const Case& c) {
  std::ifstream in(file);
  std::string name;
  int rows = 0;
  Peer peer;
  while (in >> name >> rows >> peer.tflops >> peer.backend) {
    if (name == shape.name && rows == c.rows && c.start == 0) return peer;
  }
  return {};
}

class Layer {
 public:
  Layer(const Shape& shape, KvFormat format, const Case& c, unsigned seed)
      : layout_(make_kv_layout(format, kDim)),
        rows_(c.rows),
        shape_(shape),
        q_(size_t{2} * c.rows * shape.q_heads * kDim, seed),
        k_(size_t{2} * c.rows * shape.kv_heads * kDim, seed + 1),
        v_(k_.bytes(), seed + 2),
        out_(q_.bytes(), seed + 3) {
    for (DeviceBytes* x : {&q_, &k_, &v_}) {
      make_values<<<512, 256>>>(reinterpret_cast<uint16_t*>(x->data()),
                                static_cast<int64_t>(x->bytes() / 2));
    }
    const int blocks = (c.start + c.rows + kBlockTokens - 1) / kBlockTokens;
    const int per_block = layout_.coded() ? 1 : layout_.pages_per_exact_block;
    const int num_pages = blocks * per_block + kMaxPagesPerBlock;
    pages_ = std::make_unique<DeviceBytes>(
        static_cast<size_t>(num_pages) * shape.kv_heads * layout_.page_bytes, seed + 4);
    if (layout_.coded()) {
      make_scales<<<num_pages * shape.kv_heads, kBlockTokens>>>(pages_->data(), layout_.page_bytes,
                                                                layout_.tile());
    } else {
      make_values<<<512, 256>>>(reinterpret_cast<uint16_t*>(pages_->data()),
                                static_cast<int64_t>(pages_->bytes() / 2));
    }
    std::vector<BlockPages> table(static_cast<size_t>(blocks));
    for (int b = 0; b < blocks; ++b) {  // the order of ids does not matter to whole pages
      for (int i = 0; i < kMaxPagesPerBlock; ++i)
        table[b][i] = i < per_block ? b * per_block + i : -1;
    }
    if (layout_.coded()) {
      std::iota(table[0].begin(), table[0].end(), blocks);
      // The sink's pages hold values, not codes.
      make_values<<<512, 256>>>(
          reinterpret_cast<uint16_t*>(pages_->data() +
                                      int64_t{blocks} * shape.kv_heads * layout_.page_bytes),
          int64_t{kMaxPagesPerBlock} * shape.kv_heads * layout_.page_bytes / 2);
    }
    table_ = std::make_unique<DeviceBytes>(table.size() * sizeof(BlockPages));
    CUDA_CHECK(cudaMemcpy(table_->data(), table.data(), table_->bytes(), cudaMemcpyHostToDevice));
    params_.q = Tensor(q_.data(), DType::kF16, {c.rows, shape.q_heads, kDim});
    params_.k_rows = Tensor(k_.data(), DType::kF16, {c.rows, shape.kv_heads, kDim});
    params_.v_rows = Tensor(v_.data(), DType::kF16, {c.rows, shape.kv_heads, kDim});
    params_.out = Tensor(out_.data(), DType::kBF16, {c.rows, shape.q_heads * kDim});
    params_.block_pages = reinterpret_cast<const BlockPages*>(table_->data());
    params_.layer = {pages_->data(), num_pages, shape.kv_heads, layout_};
    params_.q_heads = shape.q_heads;
    params_.scale = 0.08838834764831845f;
  }
  AttentionParams params(const AttentionSequence* device_sequence) const {
    AttentionParams p = params_;
    p.sequences = {device_sequence, 1};
    return p;
  }
  size_t bytes() const { return 2 * q_.bytes() + 2 * k_.bytes() + pages_->bytes(); }

 private:
  KvLayout layout_;
  int rows_;
  Shape shape_;
  DeviceBytes q_, k_, v_, out_;
  std::unique_ptr<DeviceBytes> pages_, table_;
  AttentionParams params_{};
};

std::string name_of(const Shape& shape, KvFormat format, const Case& c,
                    cuda::PrefillKernel kernel) {
  return std::string("prefill-attention-") + shape.name + "-" + kv_format_name(format) + "-" +
         std::to_string(c.rows) + "at" + std::to_string(c.start) +
         (kernel == cuda::PrefillKernel::kBest ? "" : "-portable");
}

void measure(Report& report, const std::string& name, const Shape& shape, KvFormat format,
             const Case& c, cuda::PrefillKernel kernel, int num_multiprocessors, const Peer& peer) {
  const AttentionSequence sequence{0, c.rows, c.start, 0};
  StepLimits limits{};
  limits.max_rows = c.rows;
  limits.max_sequences = 1;
  limits.max_model_len = c.start + c.rows;
  limits.max_blocks = (limits.max_model_len + kBlockTokens - 1) / kBlockTokens;
  limits.q_heads = shape.q_heads;
  limits.kv_heads = shape.kv_heads;
  limits.head_dim = kDim;
  limits.layout = make_kv_layout(format, kDim);
  cuda::PrefillAttention attention(limits, num_multiprocessors, kernel);
  std::vector<std::byte> plan(attention.max_plan_bytes());
  plan.resize(attention.plan({&sequence, 1}, plan.data()));
  DeviceBytes device_plan(plan.size() + 1), device_sequence(sizeof(sequence));
  CUDA_CHECK(cudaMemcpy(device_plan.data(), plan.data(), plan.size(), cudaMemcpyHostToDevice));
  CUDA_CHECK(
      cudaMemcpy(device_sequence.data(), &sequence, sizeof(sequence), cudaMemcpyHostToDevice));
  const auto* on_device = reinterpret_cast<const AttentionSequence*>(device_sequence.data());

  std::vector<std::unique_ptr<Layer>> layers;
  layers.push_back(std::make_unique<Layer>(shape, format, c, 7));
  const int variants = variants_for(layers[0]->bytes());
  while (static_cast<int>(layers.size()) < variants) {
    layers.push_back(
        std::make_unique<Layer>(shape, format, c, 7 + 10 * static_cast<unsigned>(layers.size())));
  }
  const double us = time_us(variants, [&](cudaStream_t stream, int i) {
    attention.run(stream, layers[static_cast<size_t>(i)]->params(on_device), {&sequence, 1},
                  device_plan.data());
  });

  // The decoding pass alone, in scratch of its own.
  const size_t scratch_bytes =
      static_cast<size_t>(limits.max_blocks) * kBlockTokens * shape.kv_heads * kDim * 2;
  DeviceBytes k_scratch(scratch_bytes), v_scratch(scratch_bytes);
  const int query_tiles = (c.rows + kBlockTokens - 1) / kBlockTokens;
  const auto expand_bytes = plan.size() - query_tiles * sizeof(cuda::prefill::QueryTile);
  double expand_us = 0;
  if (expand_bytes > 0) {
    expand_us = time_us(variants, [&](cudaStream_t stream, int i) {
      const AttentionParams p = layers[static_cast<size_t>(i)]->params(on_device);
      cuda::prefill::Arguments a{};
      a.k_rows = p.k_rows.raw();
      a.v_rows = p.v_rows.raw();
      a.k_scratch = k_scratch.data();
      a.v_scratch = v_scratch.data();
      a.kv_heads = shape.kv_heads;
      a.chunk_exact = !limits.layout.coded();
      a.layout = limits.layout;
      a.pages = p.layer.data;
      a.block_pages = p.block_pages;
      a.expand_tiles = reinterpret_cast<const cuda::prefill::ExpandTile*>(
          device_plan.data() + (plan.size() - expand_bytes));
      a.num_expand_tiles = static_cast<int>(expand_bytes / sizeof(cuda::prefill::ExpandTile));
      cuda::prefill::launch_expand(stream, a);
    });
  }
  const double pairs = 0.5 * c.rows * (2.0 * c.start + c.rows + 1);
  const double tflops = 4.0 * kDim * shape.q_heads * pairs / us * 1e-6;
  Row row;
  row.name = name;
  row.value = tflops;
  row.unit = "TFLOP/s";
  row.lower_is_better = false;
  if (!peer.backend.empty()) {
    row.against = "torch SDPA " + peer.backend + ", fp16";
    row.against_value = peer.tflops;
    row.ratio = tflops / peer.tflops;
  }
  report.add(row);
  std::printf("  %-60s %9.1f us, decoding %.1f us\n", name.c_str(), us, expand_us);
}

}  // namespace
}  // namespace kvarn::bench

int main(int argc, char** argv) {
  using namespace kvarn;
  using namespace kvarn::bench;
  int num_multiprocessors = 0;
  CUDA_CHECK(cudaDeviceGetAttribute(&num_multiprocessors, cudaDevAttrMultiProcessorCount, 0));
  Report report(argc, argv);
  const auto kernel = option(argc, argv, "--kernel", "best") == "portable"
                          ? cuda::PrefillKernel::kPortable
                          : cuda::PrefillKernel::kBest;
  const std::string only = option(argc, argv, "--only", "");
  const std::string peers = option(argc, argv, "--peers", "");
  for (const Shape& shape : {Shape{"8b", 32, 8}, Shape{"0.6b", 16, 8}}) {
    for (const Case& c : {Case{0, 2048}, Case{0, 16384}, Case{14336, 2048}}) {
      for (const KvFormat format : {KvFormat::kKvarnK4V2, KvFormat::kFp16}) {
        const std::string name = name_of(shape, format, c, kernel);
        if (name.find(only) == std::string::npos) continue;
        measure(report, name, shape, format, c, kernel, num_multiprocessors,
                find_peer(peers, shape, c));
      }
    }
  }
  return 0;
}
