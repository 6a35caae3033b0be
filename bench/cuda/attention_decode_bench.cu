// Decode attention of one layer, 8 KV heads: kvarn_k4v2 pages (sink, coded blocks, tail) and fp16
// pages, against a plain read of the same bytes and against SDPA of torch on contiguous fp16.
//
//   sdpa_peer.py > peer.txt; attention_decode_bench [--peer peer.txt] [--only substring]
//                            [--limits no] [--json FILE --commit HASH]
//
// Pages lie in random order over a pool and hold random codes under scales like those of real
// tiles. Pools rotate as the layers of a model do: under one block table and one plan.
#include <cuda_fp16.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <fstream>
#include <limits>
#include <map>
#include <memory>
#include <numeric>
#include <random>
#include <string>
#include <vector>

#include "bench/cuda/timing.h"
#include "kernels/attention_cuda.h"
#include "kernels/attention_decode_plan.h"
#include "kernels/cuda_check.h"

namespace kvarn::bench {
namespace {

constexpr int kKvHeads = 8;

__device__ float unit_hash(uint32_t x) {  // [0, 1)
  x = (x ^ x >> 16) * 0x7feb352du;
  x = (x ^ x >> 15) * 0x846ca68bu;
  return static_cast<float>((x ^ x >> 16) >> 8) * 0x1p-24f;
}

// The pool holds random bits; this makes its numbers sensible. One block a (page, head).
__global__ void settle_pages(std::byte* pages, const uint8_t* coded, int page_bytes,
                             TileLayout tile) {
  std::byte* page = pages + size_t{blockIdx.x} * page_bytes;
  auto* halves = reinterpret_cast<__half*>(page);
  const auto value = [&](int i) { return unit_hash(blockIdx.x * 16384u + i); };
  if (!coded[blockIdx.x / kKvHeads]) {
    for (int i = threadIdx.x; i < page_bytes / 2; i += blockDim.x) {
      halves[i] = __float2half(2 * value(i) - 1);
    }
    return;
  }
  const int i = threadIdx.x;  // 128 threads; the order within a field does not matter
  const float k_step = 0.1f + 0.2f * value(i), v_step = 0.3f + 0.4f * value(128 + i);
  halves[tile.k_step / 2 + i] = __float2half(k_step);
  halves[tile.k_zero / 2 + i] = __float2half(-7.5f * k_step + 0.4f * value(256 + i) - 0.2f);
  halves[tile.k_token / 2 + i] = __float2half(0.75f + 0.5f * value(384 + i));
  const float middle = static_cast<float>((1 << tile.v_bits) - 1) / 2;
  halves[tile.v_step / 2 + i] = __float2half(v_step);
  halves[tile.v_zero / 2 + i] = __float2half(-middle * v_step + 0.2f * value(512 + i));
  halves[tile.v_channel / 2 + i] = __float2half(0.75f + 0.5f * value(640 + i));
}

__global__ void fill_uniform(__half* to, size_t n, uint32_t seed) {
  const size_t i = size_t{blockIdx.x} * blockDim.x + threadIdx.x;
  if (i < n) to[i] = __float2half(4 * unit_hash(static_cast<uint32_t>(i) ^ seed * 7919u) - 2);
}

// Device copy of host values.
class Upload {
 public:
  template <typename T>
  explicit Upload(const std::vector<T>& values) : memory_(values.size() * sizeof(T) + 16) {
    CUDA_CHECK(cudaMemcpy(memory_.data(), values.data(), values.size() * sizeof(T),
                          cudaMemcpyHostToDevice));
  }
  template <typename T>
  T* as() const {
    return reinterpret_cast<T*>(memory_.data());
  }

 private:
  DeviceBytes memory_;
};

struct Case {
  KvFormat format;
  int group;
  std::vector<int32_t> lengths;
};

size_t bytes_read(const KvLayout& layout, const std::vector<int32_t>& lengths) {
  size_t bytes = 0;
  for (const int32_t length : lengths) {
    const cuda::DecodeList list = cuda::decode_list(layout.coded(), layout.pages_per_exact_block,
                                                    layout.exact_rows, length - 1);
    for (int32_t i = 0; i < list.items; ++i) {
      const int rows = list.item(i, layout.pages_per_exact_block, layout.exact_rows).rows;
      bytes += static_cast<size_t>((rows == 0 ? layout.page_bytes : rows * 4 * kCodedHeadDim) *
                                   kKvHeads);
    }
  }
  return bytes;
}

// What the layers of one step share, and what the kernels before left in L2 (queries).
struct Step {
  std::vector<AttentionSequence> sequences;
  std::unique_ptr<Upload> table, plan, coded;  // coded: of each page
  std::unique_ptr<DeviceBytes> q, out;
  int64_t num_pages = 0;
};

Step make_step(const Case& c, const KvLayout& layout, const cuda::DecodeAttention& attention) {
  Step step;
  std::vector<BlockPages> table;
  std::vector<uint8_t> kinds;
  for (const int32_t length : c.lengths) {
    step.sequences.push_back({static_cast<int32_t>(step.sequences.size()), 1, length - 1,
                              static_cast<int32_t>(table.size())});
    const size_t first = table.size();
    BlockPages none;
    none.fill(-1);
    table.resize(first + static_cast<size_t>((length + kBlockTokens - 1) / kBlockTokens), none);
    const cuda::DecodeList list = cuda::decode_list(layout.coded(), layout.pages_per_exact_block,
                                                    layout.exact_rows, length - 1);
    for (int32_t i = 0; i < list.items; ++i) {
      const auto item = list.item(i, layout.pages_per_exact_block, layout.exact_rows);
      table[first + static_cast<size_t>(item.block)][static_cast<size_t>(item.page)] =
          static_cast<int32_t>(kinds.size());
      kinds.push_back(item.rows == 0);
    }
  }
  step.num_pages = static_cast<int64_t>(kinds.size());
  std::vector<int32_t> order(kinds.size());
  std::iota(order.begin(), order.end(), 0);
  std::shuffle(order.begin(), order.end(), std::mt19937(3));
  std::vector<uint8_t> coded(kinds.size());
  for (BlockPages& block : table) {
    for (int32_t& page : block) {
      if (page < 0) continue;
      coded[static_cast<size_t>(order[static_cast<size_t>(page)])] =
          kinds[static_cast<size_t>(page)];
      page = order[static_cast<size_t>(page)];
    }
  }
  step.table = std::make_unique<Upload>(table);
  step.coded = std::make_unique<Upload>(coded);
  std::vector<std::byte> plan(attention.max_plan_bytes());
  plan.resize(attention.plan(step.sequences, plan.data()));
  step.plan = std::make_unique<Upload>(plan);
  const size_t n = c.lengths.size() * static_cast<size_t>(c.group * kKvHeads * kCodedHeadDim);
  step.q = std::make_unique<DeviceBytes>(2 * n);
  step.out = std::make_unique<DeviceBytes>(2 * n);
  fill_uniform<<<static_cast<unsigned>((n + 255) / 256), 256>>>(
      reinterpret_cast<__half*>(step.q->data()), n, 3);
  CUDA_CHECK(cudaMemset(step.out->data(), 0xff, 2 * n));
  CUDA_CHECK(cudaDeviceSynchronize());
  return step;
}

std::unique_ptr<DeviceBytes> make_pages(const Step& step, const KvLayout& layout, unsigned seed) {
  const auto count = static_cast<size_t>(step.num_pages * kKvHeads);
  auto pages = std::make_unique<DeviceBytes>(count * static_cast<size_t>(layout.page_bytes), seed);
  settle_pages<<<static_cast<unsigned>(count), 128>>>(pages->data(), step.coded->as<uint8_t>(),
                                                      layout.page_bytes,
                                                      layout.coded() ? layout.tile() : kTileK4V2);
  CUDA_CHECK(cudaDeviceSynchronize());
  return pages;
}

// Microseconds of one launch; complains about outputs that are no numbers.
double time_case(const Case& c) {
  const KvLayout layout = make_kv_layout(c.format, kCodedHeadDim);
  int sms = 0;
  CUDA_CHECK(cudaDeviceGetAttribute(&sms, cudaDevAttrMultiProcessorCount, 0));
  StepLimits limits;
  limits.max_sequences = limits.max_rows = static_cast<int>(c.lengths.size());
  limits.kv_heads = kKvHeads;
  limits.q_heads = kKvHeads * c.group;
  limits.head_dim = kCodedHeadDim;
  limits.layout = layout;
  cuda::DecodeAttention attention(limits, sms);
  const Step step = make_step(c, layout, attention);
  std::vector<std::unique_ptr<DeviceBytes>> layers;
  const int variants = variants_for(bytes_read(layout, c.lengths));
  for (int v = 0; v < variants; ++v) {
    layers.push_back(make_pages(step, layout, static_cast<unsigned>(v + 1)));
  }
  const auto launch = [&](cudaStream_t stream, int variant) {
    const auto rows = static_cast<int64_t>(c.lengths.size());
    AttentionParams params{};
    params.q = Tensor(step.q->data(), DType::kF16, {rows, limits.q_heads, kCodedHeadDim});
    params.sequences = step.sequences;
    params.block_pages = step.table->as<BlockPages>();
    params.layer = {layers[static_cast<size_t>(variant)]->data(), step.num_pages, kKvHeads, layout};
    params.q_heads = limits.q_heads;
    params.scale = 1.f / std::sqrt(128.f);
    params.out =
        Tensor(step.out->data(), DType::kBF16, {rows, int64_t{limits.q_heads} * kCodedHeadDim});
    attention.run(stream, params, step.plan->as<std::byte>());
  };
  const double us = time_us(variants, launch);
  std::vector<uint16_t> out(step.out->bytes() / 2);
  CUDA_CHECK(cudaMemcpy(out.data(), step.out->data(), step.out->bytes(), cudaMemcpyDeviceToHost));
  for (const uint16_t x : out) {
    if ((x & 0x7f80) == 0x7f80) {
      std::printf("an output is not a number\n");
      return kNone;
    }
  }
  return us;
}

std::string case_name(const Case& c, const std::string& what) {
  const int32_t length = c.lengths.front();
  return "g" + std::to_string(c.group) + "-b" + std::to_string(c.lengths.size()) + "-" +
         (what.empty() ? "l" + std::to_string(length / 1024) + "k" : what);
}

// "sdpa-<backend>-g8-b32-l16k 704.1" a line: the fastest backend of each case.
std::map<std::string, std::pair<double, std::string>> read_peers(const std::string& path) {
  std::map<std::string, std::pair<double, std::string>> best;
  std::ifstream file(path);
  std::string name;
  double us = 0;
  while (file >> name >> us) {
    const size_t dash = name.find('-', 5);
    if (name.rfind("sdpa-", 0) != 0 || dash == std::string::npos || !(us > 0)) continue;
    auto& entry = best[name.substr(dash + 1)];
    if (entry.second.empty() || us < entry.first) {
      entry = {us, "torch SDPA " + name.substr(5, dash - 5) + ", fp16"};
    }
  }
  return best;
}

struct Target {
  const char* row;
  int group, batch, length_k;
  double must, stretch;
};
// Against a plain read of the same bytes: share of the limit.
constexpr Target kReadTargets[] = {
    {"1", 8, 32, 16, 0.88, 0.92},  {"1", 4, 32, 16, 0.88, 0.92},  {"1", 2, 32, 16, 0.88, 0.92},
    {"1", 8, 128, 4, 0.88, 0.92},  {"1", 4, 128, 4, 0.88, 0.92},  {"1", 2, 128, 4, 0.88, 0.92},
    {"1", 8, 8, 16, 0.78, 0.86},   {"1", 4, 8, 16, 0.78, 0.86},   {"1", 2, 8, 16, 0.78, 0.86},
    {"1", 8, 32, 4, 0.78, 0.86},   {"1", 4, 32, 4, 0.78, 0.86},   {"1", 2, 32, 4, 0.78, 0.86},
    {"1", 8, 1, 64, kNone, kNone}, {"1", 8, 1, 16, kNone, kNone}, {"1", 8, 1, 4, kNone, kNone},
    {"1", 8, 1, 1, kNone, kNone},  {"1", 8, 8, 1, kNone, kNone},  {"1", 8, 64, 1, kNone, kNone},
};
// Against SDPA on fp16: times faster.
constexpr Target kPeerTargets[] = {
    {"2", 8, 32, 16, 4.0, 4.4}, {"3", 8, 128, 4, 3.5, 3.8}, {"3", 8, 32, 4, 3.2, 3.7},
    {"4", 8, 8, 16, 3.5, 4.2},  {"5", 8, 1, 16, 2.8, 4.5},  {"5", 8, 1, 64, 3.5, 4.5},
};
// Against the original implementation's Triton kernel with its rotations, on a card of the same
// kind (another run).
struct Original {
  int batch, length_k;
  double us, must, stretch;
};
constexpr Original kOriginals[] = {
    {1, 16, 61, 4.9, 7.3}, {32, 16, 1565, 8.2, 9.3}, {128, 4, 1568, 7.2, 8.1}};

std::vector<int32_t> ragged(int batch, int32_t longest) {
  std::mt19937 engine(5);
  std::vector<int32_t> lengths;
  for (int i = 0; i < batch; ++i) {
    lengths.push_back(static_cast<int32_t>(1 + engine() % static_cast<uint32_t>(longest)));
  }
  return lengths;
}

int run(int argc, char** argv) {
  const std::string only = option(argc, argv, "--only", "");
  const auto peers = read_peers(option(argc, argv, "--peer", ""));
  Report report(argc, argv);
  std::map<std::string, double> times;
  const auto timed = [&](const Case& c, const std::string& what) {
    const std::string name = std::string(kv_format_name(c.format)) + "-" + case_name(c, what);
    const auto [entry, is_new] = times.try_emplace(name);
    if (is_new) entry->second = time_case(c);
    return entry->second;
  };
  const auto wanted = [&](const std::string& name) {
    return only.empty() || name.find(only) != std::string::npos;
  };

  const bool with_limits = option(argc, argv, "--limits", "yes") == "yes";
  std::map<size_t, double> limits;
  const auto limit_row = [&](const Case& c, const std::string& name, const std::string& what,
                             double must, double stretch) {
    if (!wanted(name)) return;
    const size_t bytes = bytes_read(make_kv_layout(c.format, kCodedHeadDim), c.lengths);
    const auto [limit, is_new] = limits.try_emplace(bytes);
    if (is_new) limit->second = with_limits ? read_limit_us(bytes) : kNone;
    const double us = timed(c, what);
    report.add({name, us, "us", "read of " + std::to_string(bytes / 1000000) + " MB", limit->second,
                limit->second / us, must, stretch, true});
  };
  for (const Target& t : kReadTargets) {
    const Case c{KvFormat::kKvarnK4V2, t.group,
                 std::vector<int32_t>(static_cast<size_t>(t.batch), 1024 * t.length_k)};
    limit_row(c, std::string(t.row) + "-decode-" + case_name(c, ""), "", t.must, t.stretch);
  }
  // Lengths uniform up to twice the mean, and the other formats, for orientation.
  for (const auto& [batch, longest] : {std::pair{32, 32768}, {128, 8192}, {50, 8192}, {7, 30000}}) {
    const Case c{KvFormat::kKvarnK4V2, 8, ragged(batch, longest)};
    const std::string what = "ragged" + std::to_string(longest);
    limit_row(c, "decode-" + case_name(c, what), what, kNone, kNone);
  }
  for (const auto& [batch, k] : {std::pair{32, 16}, {8, 16}, {1, 16}}) {
    const Case c{KvFormat::kKvarnK4V4, 8,
                 std::vector<int32_t>(static_cast<size_t>(batch), 1024 * k)};
    limit_row(c, "decode-k4v4-" + case_name(c, ""), "", kNone, kNone);
  }

  for (const KvFormat format : {KvFormat::kKvarnK4V2, KvFormat::kFp16}) {
    const bool fp16 = format == KvFormat::kFp16;
    for (const Target& t : kPeerTargets) {
      const Case c{format, t.group,
                   std::vector<int32_t>(static_cast<size_t>(t.batch), 1024 * t.length_k)};
      const std::string name =
          (fp16 ? "7-decode-fp16-" : std::string(t.row) + "-decode-") + case_name(c, "");
      if (!wanted(name)) continue;
      const auto peer = peers.find(case_name(c, ""));
      const double peer_us = peer == peers.end() ? kNone : peer->second.first;
      const double us = timed(c, "");
      report.add({name, us, "us", peer == peers.end() ? "" : peer->second.second, peer_us,
                  peer_us / us, fp16 ? 0.95 : t.must, fp16 ? 1.0 : t.stretch, true});
    }
  }
  for (const Original& o : kOriginals) {
    const Case c{KvFormat::kKvarnK4V2, 8,
                 std::vector<int32_t>(static_cast<size_t>(o.batch), 1024 * o.length_k)};
    const std::string name = "6-decode-" + case_name(c, "");
    if (!wanted(name)) continue;
    const double us = timed(c, "");
    report.add({name, us, "us", "original Triton kernel, earlier run", o.us, o.us / us, o.must,
                o.stretch, true});
  }
  return 0;
}

}  // namespace
}  // namespace kvarn::bench

int main(int argc, char** argv) { return kvarn::bench::run(argc, argv); }
