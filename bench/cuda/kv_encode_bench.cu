// Encoding of complete blocks: microseconds per pair (K and V of one tile of one KV head), from
// exact pages (one block of each of several sequences, all layers in one launch) and from rows (a
// prefill chunk of one layer). The bytes' floor is a plain read of as many bytes as a pair moves.
// Beside it QK norm + RoPE + rotation and the page write.
//   kvarn_encode_bench [--only PART OF A NAME] [--json FILE] [--commit HASH]
#include <cstdio>
#include <memory>
#include <string>
#include <vector>

#include "bench/cuda/timing.h"
#include "kernels/cuda_check.h"
#include "kernels/ops_cuda.h"

namespace kvarn::bench {
namespace {

constexpr int kDim = kCodedHeadDim, kHeads = 8;
constexpr int kRotatedPages =
    kMaxPagesPerBlock + 1;  // of one block: its exact pages and the target

__device__ uint32_t mixed(uint64_t x) {
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9ull;
  x = (x ^ (x >> 27)) * 0x94d049bb133111ebull;
  return static_cast<uint32_t>(x >> 32);
}
// N(0, deviation) in fp16 (Box-Muller), every 128th channel and token ten times as loud: what the
// scales are for. Rotated K and V have few such, but some.
__global__ void make_values(uint16_t* x, int64_t n, float deviation, uint64_t seed) {
  for (int64_t i = blockIdx.x * int64_t{blockDim.x} + threadIdx.x; i < n;
       i += int64_t{gridDim.x} * blockDim.x) {
    const uint64_t at = (seed << 40) + static_cast<uint64_t>(i) * 2 + 1;
    const float u = (mixed(at) + 1.0f) * 0x1p-32f, w = mixed(at + 1) * 0x1p-32f;
    float value = deviation * sqrtf(-2.f * logf(u)) * cospif(2.f * w);
    if (i % kDim == 37 || i / kDim % 128 == 11) value *= 10.f;
    uint16_t bits;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(value));
    x[i] = bits;
  }
}
void fill(DeviceBytes& x, float deviation) {
  make_values<<<1024, 256>>>(reinterpret_cast<uint16_t*>(x.data()),
                             static_cast<int64_t>(x.bytes() / 2), deviation, 1);
  CUDA_CHECK(cudaGetLastError());
  CUDA_CHECK(cudaDeviceSynchronize());
}

template <typename T>
class Uploaded {
 public:
  explicit Uploaded(const std::vector<T>& values) : bytes_(values.size() * sizeof(T)) {
    CUDA_CHECK(cudaMemcpy(bytes_.data(), values.data(), bytes_.bytes(), cudaMemcpyHostToDevice));
  }
  T* data() const { return reinterpret_cast<T*>(bytes_.data()); }

 private:
  DeviceBytes bytes_;
};

struct Timed {
  double us;
  size_t bytes;  // read and written by one run
};

// `tiles` blocks of `num_layers` layers, from exact pages.
Timed encode_pages(KvFormat format, int num_layers, int tiles, float deviation) {
  const KvLayout layout = make_kv_layout(format, kDim);
  const auto page = static_cast<size_t>(layout.page_bytes) * kHeads;
  const size_t block = page * kRotatedPages;
  const int variants = variants_for(block * tiles * num_layers);
  const int num_pages = variants * tiles * kRotatedPages;
  DeviceBytes pool(page * num_pages * num_layers);
  fill(pool, deviation);
  std::vector<KvLayerView> layers;
  for (int l = 0; l < num_layers; ++l)
    layers.push_back({pool.data() + l * page * num_pages, num_pages, kHeads, layout});
  std::vector<EncodeTile> all;
  for (int i = 0; i < variants * tiles; ++i) {
    EncodeTile t{-1, {-1, -1, -1, -1, -1}, i * kRotatedPages + kMaxPagesPerBlock};
    for (int n = 0; n < layout.pages_per_exact_block; ++n)
      t.source_pages[n] = i * kRotatedPages + n;
    all.push_back(t);
  }
  const Uploaded<EncodeTile> device(all);
  const double us = time_us(variants, [&](cudaStream_t stream, int variant) {
    cuda::kv_encode(
        stream, {Tensor(),
                 Tensor(),
                 {device.data() + static_cast<size_t>(variant) * tiles, static_cast<size_t>(tiles)},
                 layers});
  });
  const size_t pair = size_t{4} * kDim * kBlockTokens + static_cast<size_t>(layout.page_bytes);
  return {us, pair * tiles * num_layers * kHeads};
}

// `tiles` blocks of one layer, from rows.
Timed encode_rows(KvFormat format, int tiles, float deviation) {
  const KvLayout layout = make_kv_layout(format, kDim);
  const size_t rows = static_cast<size_t>(tiles) * kBlockTokens, row = size_t{2} * kHeads * kDim;
  const int variants = variants_for(2 * rows * row);
  DeviceBytes k(rows * row * variants), v(rows * row * variants);
  fill(k, deviation);
  fill(v, deviation);
  DeviceBytes pool(static_cast<size_t>(tiles) * kHeads * layout.page_bytes * variants);
  std::vector<EncodeTile> all;
  for (int i = 0; i < variants * tiles; ++i)
    all.push_back({i % tiles * kBlockTokens, {-1, -1, -1, -1, -1}, i});
  const Uploaded<EncodeTile> device(all);
  const KvLayerView layer{pool.data(), variants * tiles, kHeads, layout};
  const auto n = static_cast<int64_t>(rows);
  const double us = time_us(variants, [&](cudaStream_t stream, int variant) {
    const auto at = static_cast<size_t>(variant);
    cuda::kv_encode(stream, {Tensor(k.data() + at * rows * row, DType::kF16, {n, kHeads, kDim}),
                             Tensor(v.data() + at * rows * row, DType::kF16, {n, kHeads, kDim}),
                             {device.data() + at * tiles, static_cast<size_t>(tiles)},
                             {&layer, 1}});
  });
  const size_t pair = size_t{4} * kDim * kBlockTokens + static_cast<size_t>(layout.page_bytes);
  return {us, pair * tiles * kHeads};
}

void report_encode(Report& report, const std::string& name, int pairs, const Timed& t) {
  Row row;
  row.name = name;
  row.value = t.us / pairs;
  row.unit = "us per pair";
  if (pairs >= 1024) {
    // 3.94 us a pair: the authors' kernels on an H100 (another run, kvarn_k4v2, 8 passes).
    row.against = "the authors' kernels (another run), us per pair";
    row.against_value = 3.94;
    row.ratio = 3.94 / row.value;
    row.must = 10;
    row.stretch = 40;
  } else {
    row.against = "plain read of as many bytes, us per pair";
    row.against_value = read_limit_us(t.bytes) / pairs;
  }
  report.add(row);
  std::printf("    %s: %.2f us in all\n", name.c_str(), t.us);
}

// The step's rows of an 8B layer (32 query heads) after the QKV product: transform and page write.
void report_rows(Report& report, int64_t rows) {
  constexpr int kQueryHeads = 32, kPositions = 4096;
  const size_t width = size_t{kQueryHeads + 2 * kHeads} * kDim * 2, kv = size_t{kHeads} * kDim * 2;
  const size_t count = static_cast<size_t>(rows);
  const int variants = variants_for(count * width * 2);
  DeviceBytes qkv(count * width * variants), q(count * kQueryHeads * kDim * 2 * variants);
  DeviceBytes k(count * kv * variants), v(count * kv * variants);
  DeviceBytes cosines(size_t{kPositions} * kDim / 2 * 4), sines(cosines.bytes());
  DeviceBytes norm(2 * kDim);
  for (DeviceBytes* x : {&qkv, &cosines, &sines, &norm}) fill(*x, 1.f);  // any finite bits
  std::vector<int32_t> positions;
  std::vector<int64_t> slots;
  const KvLayout layout = make_kv_layout(KvFormat::kKvarnK4V2, kDim);
  for (int64_t i = 0; i < rows; ++i) {
    positions.push_back(static_cast<int32_t>(i * 37 % kPositions));
    slots.push_back(i * layout.exact_rows + i % layout.exact_rows);  // a page a sequence
  }
  const Uploaded<int32_t> d_positions(positions);
  const Uploaded<int64_t> d_slots(slots);
  DeviceBytes pages(count * kHeads * layout.page_bytes);
  const auto at = [](const DeviceBytes& x, int variant, int variants_of) {
    return x.data() + x.bytes() / variants_of * variant;
  };
  const auto params = [&](int variant) {
    QkvParams p{};
    p.qkv =
        Tensor(at(qkv, variant, variants), DType::kBF16, {rows, (kQueryHeads + 2 * kHeads) * kDim});
    p.positions = d_positions.data();
    p.rope = {Tensor(cosines.data(), DType::kF32, {kPositions, kDim / 2}),
              Tensor(sines.data(), DType::kF32, {kPositions, kDim / 2})};
    p.q_norm = p.k_norm = Tensor(norm.data(), DType::kBF16, {kDim});
    p.eps = 1e-6f;
    p.rotate = true;
    p.q_heads = kQueryHeads;
    p.kv_heads = kHeads;
    p.head_dim = kDim;
    p.q = Tensor(at(q, variant, variants), DType::kF16, {rows, kQueryHeads, kDim});
    p.k = Tensor(at(k, variant, variants), DType::kF16, {rows, kHeads, kDim});
    p.v = Tensor(at(v, variant, variants), DType::kF16, {rows, kHeads, kDim});
    return p;
  };
  Row row;
  row.name = "qk-norm-rope-rotate-8b-rows" + std::to_string(rows);
  row.value = time_us(variants, [&](cudaStream_t stream, int variant) {
    cuda::qk_norm_rope_rotate(stream, params(variant));
  });
  row.against = "plain read of as many bytes";
  row.against_value = read_limit_us(2 * count * width);
  row.ratio = row.against_value / row.value;
  report.add(row);
  row.name = "kv-write-8b-rows" + std::to_string(rows);
  row.value = time_us(variants, [&](cudaStream_t stream, int variant) {
    const QkvParams p = params(variant);
    cuda::kv_write(stream, {p.k, p.v, d_slots.data(), {pages.data(), rows, kHeads, layout}});
  });
  row.against_value = read_limit_us(4 * count * kv);
  row.ratio = row.against_value / row.value;
  report.add(row);
}

void run(int argc, char** argv) {
  Report report(argc, argv);
  struct Case {
    int layers, tiles;
  };
  const std::string only = option(argc, argv, "--only", "");
  const auto wanted = [&](const std::string& name) { return name.find(only) != std::string::npos; };
  struct Kind {
    const char* suffix;
    KvFormat format;
    float deviation;
  };
  // Small values: every scale is at its floor, and the passes end early.
  constexpr Kind kKinds[] = {{"", KvFormat::kKvarnK4V2, 2.f},
                             {"-k4v4", KvFormat::kKvarnK4V4, 2.f},
                             {"-small-values", KvFormat::kKvarnK4V2, 0.05f}};
  for (const Case& c : {Case{1, 1}, Case{8, 1}, Case{36, 1}, Case{32, 4}, Case{32, 32}}) {
    const int pairs = c.layers * c.tiles * kHeads;
    for (const Kind& kind : kKinds) {
      const std::string name = (pairs >= 1024 ? "17-encode-" : "16-encode-") +
                               std::to_string(pairs) + "-pairs" + kind.suffix;
      if (!wanted(name)) continue;
      report_encode(report, name, pairs,
                    encode_pages(kind.format, c.layers, c.tiles, kind.deviation));
    }
  }
  for (const int tiles : {1, 16, 128}) {
    const int pairs = tiles * kHeads;
    const std::string name = "encode-rows-" + std::to_string(pairs) + "-pairs";
    if (wanted(name)) {
      report_encode(report, name, pairs, encode_rows(KvFormat::kKvarnK4V2, tiles, 2.f));
    }
  }
  if (!wanted("rows-of-a-step")) return;
  for (const int64_t rows : {1, 32, 256, 2048}) report_rows(report, rows);
}

}  // namespace
}  // namespace kvarn::bench

int main(int argc, char** argv) {
  kvarn::bench::run(argc, argv);
  return 0;
}
