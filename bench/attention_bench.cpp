// Attention over KV pages and the tile codec on the CPU: decode at several contexts for each page
// format, prefill of a chunk, encode. One row a line; --json for machines.
//
// Many layers' pages stand in for the weights that a real step streams between two layers: the
// bytes read are meant to come from memory.
//   kvarn_attention_bench [--json] [--threads N] [--isa scalar|avx2|avx512]
#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <string>
#include <vector>

#include "kernels/kv_cpu.h"
#include "kernels/kv_encode_cpu.h"
#include "kernels/thread_pool.h"

namespace kvarn {
namespace {

constexpr int kKvHeads = 8, kHeadDim = 128;
constexpr size_t kFp16Bytes = size_t{1} << 30;  // of fp16 pages that one repetition reads

double seconds_since(std::chrono::steady_clock::time_point start) {
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}

uint32_t next_random(uint32_t& state) { return state = state * 1664525u + 1013904223u; }

void fill(std::vector<half>& x, uint32_t seed) {
  for (half& h : x) h = to_half(static_cast<float>(next_random(seed) >> 8) * 0x1p-23f - 1.0f);
}

// One sequence of `tokens` positions in every layer, exact or coded as the last position reads it.
struct Cache {
  Cache(KvFormat format, int tokens, int layers, ThreadPool& pool, CpuIsa isa)
      : layout(make_kv_layout(format, kHeadDim)), num_layers(layers) {
    std::vector<int64_t> slots;
    std::vector<EncodeTile> tiles;
    int32_t pages = 0;
    for (int64_t b = 0; b * kBlockTokens < tokens; ++b) {
      BlockPages p;
      p.fill(-1);
      const int count =
          static_cast<int>(std::min<int64_t>(kBlockTokens, tokens - b * kBlockTokens));
      const bool coded = layout.coded() && reads_coded(b, tokens, tokens);
      if (coded) {
        p[0] = pages++;
        tiles.push_back({static_cast<int32_t>(b * kBlockTokens), {}, p[0]});
      }
      for (int t = 0; t < count; ++t) {
        const auto n = static_cast<size_t>(t / layout.exact_rows);
        if (!coded && p[n] < 0) p[n] = pages++;
        slots.push_back(coded ? -1 : int64_t{p[n]} * layout.exact_rows + t % layout.exact_rows);
      }
      blocks.push_back(p);
    }
    num_pages = pages;
    layer_bytes = static_cast<size_t>(pages) * kKvHeads * static_cast<size_t>(layout.page_bytes);
    memory = allocate_host(layer_bytes * static_cast<size_t>(layers));
    std::vector<half> k(static_cast<size_t>(tokens) * kKvHeads * kHeadDim), v(k.size());
    fill(k, 1);
    fill(v, 2);
    const Tensor kt = Tensor::of(k.data(), {tokens, kKvHeads, kHeadDim});
    const Tensor vt = Tensor::of(v.data(), {tokens, kKvHeads, kHeadDim});
    cpu::kv_write({kt, vt, slots.data(), layer(0)}, pool);
    const KvLayerView first = layer(0);
    cpu::kv_encode({kt, vt, tiles, {&first, 1}}, pool, isa);
    for (int i = 1; i < layers; ++i) std::memcpy(layer(i).data, memory.data(), layer_bytes);
  }
  KvLayerView layer(int i) const {
    return {memory.data() + layer_bytes * static_cast<size_t>(i), num_pages, kKvHeads, layout};
  }
  KvLayout layout;
  int num_layers;
  int64_t num_pages = 0;
  size_t layer_bytes = 0;
  std::vector<BlockPages> blocks;
  Buffer memory;
};

struct Row {
  const char* what;
  KvFormat format;
  int group, context, rows, threads;
  double us;        // of one layer
  double gb_s;      // page bytes of one layer / time
  double gflops_s;  // q k^T and p v over the causal pairs / time
};

void print(const Row& r, bool json) {
  if (json) {
    std::printf(
        "{\"op\": \"%s\", \"format\": \"%s\", \"group\": %d, \"context\": %d, \"rows\": %d, "
        "\"threads\": %d, \"us_per_layer\": %.2f, \"gb_per_s\": %.2f, "
        "\"gflop_per_s\": %.1f}\n",
        r.what, kv_format_name(r.format), r.group, r.context, r.rows, r.threads, r.us, r.gb_s,
        r.gflops_s);
  } else {
    std::printf(
        "%-8s %-16s G %d  context %6d  rows %4d  threads %d  %10.1f us/layer  %6.1f GB/s  %7.1f "
        "GFLOP/s"
        "  %9.1f tokens/s (28 layers)\n",
        r.what, kv_format_name(r.format), r.group, r.context, r.rows, r.threads, r.us, r.gb_s,
        r.gflops_s, r.rows * 1e6 / (r.us * 28));
  }
  std::fflush(stdout);
}

// `rows` query rows after `context` positions of pages.
Row run_attention(const Cache& cache, int group, int context, int rows, ThreadPool& pool,
                  CpuIsa isa) {
  const int q_heads = kKvHeads * group;
  std::vector<float> q(static_cast<size_t>(rows * q_heads * kHeadDim));
  uint32_t seed = 3;
  for (float& x : q) x = static_cast<float>(next_random(seed) >> 8) * 0x1p-23f - 1.0f;
  std::vector<float> out(q.size());
  std::vector<half> k(static_cast<size_t>(rows) * kKvHeads * kHeadDim), v(k.size());
  fill(k, 4);
  fill(v, 5);
  const AttentionSequence sequence{0, rows, context, 0};
  const auto run_layer = [&](int layer) {
    cpu::attention({Tensor::of(q.data(), {rows, q_heads, kHeadDim}),
                    Tensor::of(k.data(), {rows, kKvHeads, kHeadDim}),
                    Tensor::of(v.data(), {rows, kKvHeads, kHeadDim}),
                    {&sequence, 1},
                    cache.blocks.data(),
                    cache.layer(layer),
                    q_heads,
                    1.0f / std::sqrt(static_cast<float>(kHeadDim)),
                    ReadingRule::kPosition,
                    Tensor::of(out.data(), {rows, q_heads * kHeadDim})},
                   pool, isa);
  };
  double best = 1e9;
  const auto begin = std::chrono::steady_clock::now();
  for (int rep = 0; rep < 7 && (rep < 3 || seconds_since(begin) < 1.5); ++rep) {
    const auto start = std::chrono::steady_clock::now();
    for (int i = 0; i < cache.num_layers; ++i) run_layer(i);
    best = std::min(best, seconds_since(start) / cache.num_layers);
  }
  return {rows == 1 ? "decode" : "prefill",
          cache.layout.format,
          group,
          context,
          rows,
          pool.size(),
          best * 1e6,
          static_cast<double>(cache.layer_bytes) / best * 1e-9,
          4e-9 * kHeadDim * q_heads * rows * (context + 0.5 * (rows + 1)) / best};
}

int layers_for(int tokens) {
  const size_t layer = static_cast<size_t>(tokens) * kKvHeads * kHeadDim * 4;
  return static_cast<int>(std::max<size_t>(1, kFp16Bytes / layer));
}

void bench_encode(ThreadPool& pool, CpuIsa isa, bool json) {
  for (const KvFormat format : {KvFormat::kKvarnK4V2, KvFormat::kKvarnK4V4}) {
    const KvLayout layout = make_kv_layout(format, kHeadDim);
    constexpr int kTiles = 16;
    std::vector<half> k(size_t{kTiles} * kBlockTokens * kKvHeads * kHeadDim), v(k.size());
    fill(k, 6);
    fill(v, 7);
    Buffer pages =
        allocate_host(size_t{kTiles} * kKvHeads * static_cast<size_t>(layout.page_bytes));
    std::vector<EncodeTile> tiles;
    for (int i = 0; i < kTiles; ++i) tiles.push_back({i * kBlockTokens, {}, i});
    const KvLayerView view{pages.data(), kTiles, kKvHeads, layout};
    const KvEncodeParams params{Tensor::of(k.data(), {kTiles * kBlockTokens, kKvHeads, kHeadDim}),
                                Tensor::of(v.data(), {kTiles * kBlockTokens, kKvHeads, kHeadDim}),
                                tiles,
                                {&view, 1}};
    double best = 1e9;
    for (int rep = 0; rep < 5; ++rep) {
      const auto start = std::chrono::steady_clock::now();
      cpu::kv_encode(params, pool, isa);
      best = std::min(best, seconds_since(start));
    }
    const double us = best * 1e6 / (kTiles * kKvHeads);
    if (json) {
      std::printf(
          "{\"op\": \"encode\", \"format\": \"%s\", \"threads\": %d, \"us_per_pair\": %.2f}\n",
          kv_format_name(format), pool.size(), us);
    } else {
      std::printf("encode   %-16s threads %d  %.1f us per (K, V) tile pair\n",
                  kv_format_name(format), pool.size(), us);
    }
  }
}

int run(int argc, char** argv) {
  bool json = false;
  std::vector<int> threads = {1, 2};
  CpuIsa isa = best_cpu_isa();
  for (int i = 1; i < argc; ++i) {
    const std::string arg = argv[i];
    if (arg == "--json") {
      json = true;
    } else if (arg == "--threads" && i + 1 < argc && std::atoi(argv[i + 1]) > 0) {
      threads = {std::atoi(argv[++i])};
    } else if (arg == "--isa" && i + 1 < argc) {
      const std::string name = argv[++i];
      bool found = false;
      for (const CpuIsa candidate : {CpuIsa::kScalar, CpuIsa::kAvx2, CpuIsa::kAvx512})
        if (name == cpu_isa_name(candidate) && cpu_isa_supported(candidate)) {
          isa = candidate;
          found = true;
        }
      if (!found) {
        std::fprintf(stderr, "--isa %s: not known or not of this processor\n", name.c_str());
        return 2;
      }
    } else {
      std::fprintf(
          stderr,
          "usage: kvarn_attention_bench [--json] [--threads N] [--isa scalar|avx2|avx512]\n");
      return 2;
    }
  }
  for (const int n : threads) {
    ThreadPool pool(n);
    bench_encode(pool, isa, json);
    for (const int context : {1024, 4096, 16384})
      for (const KvFormat format : {KvFormat::kFp16, KvFormat::kKvarnK4V2, KvFormat::kKvarnK4V4}) {
        const Cache cache(format, context, layers_for(context), pool, isa);
        for (const int group : {2, 4})
          print(run_attention(cache, group, context, 1, pool, isa), json);
      }
    for (const int context : {128, 4096})  // a chunk of 512 after so many positions
      for (const KvFormat format : {KvFormat::kFp16, KvFormat::kKvarnK4V2}) {
        Cache cache(format, context + 512, 4, pool, isa);
        for (const int group : {2, 4})
          print(run_attention(cache, group, context, 512, pool, isa), json);
      }
  }
  return 0;
}

}  // namespace
}  // namespace kvarn

int main(int argc, char** argv) { return kvarn::run(argc, argv); }
