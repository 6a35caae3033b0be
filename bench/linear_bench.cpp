// linear() on the shapes of a Qwen3 model, cold weights, beside the read bandwidth of the same
// machine in the same run (docs/performance.md: GEMV is to reach 80 % of it) and the largest GEMM rate.
//   kvarn_linear_bench [--threads N] [--isa NAME] [--shape 0.6b|8b] [--rows N] [--best] [--json]
// Weights of all layers are walked in turn, so that no matrix is in cache when its turn comes.
#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <numeric>
#include <random>
#include <string>
#include <vector>

#include "kernels/backend.h"
#include "kernels/linear_cpu.h"
#include "kernels/ops_cpu.h"

namespace kvarn {
namespace {

using Clock = std::chrono::steady_clock;

double seconds_since(Clock::time_point start) {
  return std::chrono::duration<double>(Clock::now() - start).count();
}

struct Row {
  std::string name;
  double value;
  const char* unit;
  double ratio;  // against the read bandwidth, or 0
};

// What a set of timings is taken to be: the median, or (--best) the fastest, for a busy machine.
double typical(std::vector<double> times, bool best) {
  std::sort(times.begin(), times.end());
  return best ? times.front() : times[times.size() / 2];
}

typedef uint64_t Vector __attribute__((vector_size(64)));
constexpr int64_t kLine = 64;

// Sums vectors [begin, end), asking for the line `kAhead` lines further on (0: the hardware's own
// prefetching), to L1 (3) or L2 (2).
template <int kAhead, int kLocality>
uint64_t sum_lines(const Vector* p, int64_t begin, int64_t end) {
  Vector a{}, b{}, c{}, d{};
  for (int64_t i = begin; i + 4 <= end; i += 4) {
    if constexpr (kAhead > 0) {
      for (int line = 0; line < 4; ++line) __builtin_prefetch(p + i + kAhead + line, 0, kLocality);
    }
    a += p[i];
    b += p[i + 1];
    c += p[i + 2];
    d += p[i + 3];
  }
  const Vector sum = a + b + c + d;
  return sum[0] + sum[7];
}

// Plain reads of the buffer with all threads, 16 MiB at a time (as long as a matrix or two); the
// fastest of several ways to prefetch, so that the limit is the machine's and not the loop's.
double read_bandwidth(ThreadPool& pool, const std::byte* data, size_t bytes, bool best) {
  using SumLines = uint64_t (*)(const Vector*, int64_t, int64_t);
  constexpr SumLines kWays[] = {sum_lines<0, 3>,  sum_lines<32, 3>,  sum_lines<64, 3>,
                                sum_lines<64, 2>, sum_lines<256, 2>, sum_lines<1024, 2>};
  constexpr size_t kSlice = size_t{16} << 20;
  std::vector<uint64_t> sums(static_cast<size_t>(pool.size()) * 8);
  double fastest = 1e9;
  for (const SumLines way : kWays) {
    std::vector<double> times;
    for (size_t offset = 0; offset + kSlice <= bytes; offset += kSlice) {
      const auto* p = reinterpret_cast<const Vector*>(data + offset);
      const auto start = Clock::now();
      pool.parallel_for(kSlice / kLine, 4096, [&](int64_t begin, int64_t end, int thread) {
        sums[static_cast<size_t>(thread) * 8] += way(p, begin, end);
      });
      times.push_back(seconds_since(start));
    }
    fastest = std::min(fastest, typical(std::move(times), best));
  }
  volatile uint64_t sink = std::accumulate(sums.begin(), sums.end(), uint64_t{0});
  (void)sink;
  return static_cast<double>(kSlice) / fastest * 1e-9;
}

struct Matrix {
  const char* name;
  int64_t n, k;
};

int run(int argc, char** argv) {
  int threads = 0;
  CpuIsa isa = best_cpu_isa();
  std::string shape = "0.6b";
  bool json = false, best = false;
  std::vector<int64_t> batches = {1, 8, 64, 512};
  for (int i = 1; i < argc; ++i) {
    const auto value = [&] { return i + 1 < argc ? argv[++i] : ""; };
    if (std::strcmp(argv[i], "--threads") == 0) {
      threads = std::atoi(value());
    } else if (std::strcmp(argv[i], "--shape") == 0) {
      shape = value();
    } else if (std::strcmp(argv[i], "--json") == 0) {
      json = true;
    } else if (std::strcmp(argv[i], "--best") == 0) {
      best = true;
    } else if (std::strcmp(argv[i], "--rows") == 0) {
      batches = {std::clamp<int64_t>(std::atoi(value()), 1, 512)};
    } else if (std::strcmp(argv[i], "--isa") == 0) {
      const std::string name = value();
      bool found = false;
      for (const CpuIsa candidate : {CpuIsa::kScalar, CpuIsa::kAvx2, CpuIsa::kAvx512,
                                     CpuIsa::kAvx512Bf16, CpuIsa::kAmxBf16}) {
        if (name == cpu_isa_name(candidate)) {
          isa = candidate;
          found = true;
        }
      }
      if (!found || !cpu_isa_supported(isa)) {
        std::fprintf(stderr, "--isa %s: unknown or not on this processor (best: %s)\n",
                     name.c_str(), cpu_isa_name(best_cpu_isa()));
        return 2;
      }
    } else {
      std::fprintf(stderr,
                   "usage: %s [--threads N] [--isa scalar|avx2|avx512|avx512_bf16|amx_bf16] "
                   "[--shape 0.6b|8b] [--rows N] [--best] [--json]\n",
                   argv[0]);
      return 2;
    }
  }
  const std::vector<Matrix> matrices = shape == "8b" ? std::vector<Matrix>{{"qkv", 6144, 4096},
                                                                           {"o", 4096, 4096},
                                                                           {"gate_up", 24576, 4096},
                                                                           {"down", 4096, 12288}}
                                                     : std::vector<Matrix>{{"qkv", 4096, 1024},
                                                                           {"o", 1024, 2048},
                                                                           {"gate_up", 6144, 1024},
                                                                           {"down", 1024, 3072}};
  const Matrix head = shape == "8b" ? Matrix{"head", 151936, 4096} : Matrix{"head", 151936, 1024};

  ThreadPool pool(threads > 0 ? threads : cpu::physical_cores());
  cpu::Linear linear(pool, isa, false);
  // One buffer holds every layer's matrices and the head.
  int64_t layer_elements = 0;
  for (const Matrix& m : matrices) layer_elements += m.n * m.k;
  const int64_t layers = shape == "8b" ? 4 : 28;
  const int64_t elements = layers * layer_elements + head.n * head.k;
  Buffer weights = allocate_host(static_cast<size_t>(elements) * 2);
  auto* w = reinterpret_cast<uint64_t*>(weights.data());
  std::mt19937_64 random(1);
  for (int64_t i = 0; i < elements / 4; ++i) {  // bf16 in +-(0.0078 .. 0.0313)
    w[i] = (random() & 0x80ff80ff80ff80ffull) | 0x3c003c003c003c00ull;
  }
  std::vector<Row> rows;
  const double bandwidth = read_bandwidth(pool, weights.data(), weights.bytes(), best);
  rows.push_back({"read bandwidth", bandwidth, "GB/s", 0});

  const int64_t max_rows = 512, max_k = 12288, max_n = 151936;
  std::vector<float> x(static_cast<size_t>(max_rows * max_k));
  for (float& value : x) value = static_cast<float>(random() >> 40) * 0x1p-24f - 0.5f;
  std::vector<float> y(static_cast<size_t>(std::max(max_rows * 24576, 8 * max_n)));

  for (const int64_t batch : batches) {
    double all_seconds = 0, all_bytes = 0, all_flops = 0;
    const auto time_one = [&](const Matrix& m, const bf16* data, int64_t batch_rows) {
      LinearWeight weight;
      weight.num_parts = 1;
      weight.parts[0] = Tensor::of(data, {m.n, m.k});
      const auto start = Clock::now();
      linear.run(Tensor::of(x.data(), {batch_rows, m.k}), weight,
                 Tensor::of(y.data(), {batch_rows, m.n}));
      return seconds_since(start);
    };
    const int passes = batch == 512 ? 1 : 3;
    std::vector<std::vector<double>> seconds(matrices.size());
    const auto* base = reinterpret_cast<const bf16*>(weights.data());
    time_one(matrices[0], base, batch);
    for (int pass = 0; pass < passes; ++pass) {
      const bf16* data = base;
      for (int64_t layer = 0; layer < layers; ++layer) {
        for (size_t i = 0; i < matrices.size(); ++i) {
          seconds[i].push_back(time_one(matrices[i], data, batch));
          data += matrices[i].n * matrices[i].k;
        }
      }
    }
    const auto report = [&](const Matrix& m, std::vector<double> times, int64_t batch_rows,
                            double count) {
      const double median = typical(std::move(times), best);
      const double bytes = static_cast<double>(m.n * m.k) * 2;
      const double flops = bytes * static_cast<double>(batch_rows);
      all_seconds += count * median;
      all_bytes += count * bytes;
      all_flops += count * flops;
      const std::string name = std::string(m.name) + " rows " + std::to_string(batch_rows);
      rows.push_back({name, bytes / median * 1e-9, "GB/s", bytes / median * 1e-9 / bandwidth});
      rows.push_back({name, flops / median * 1e-9, "GFLOP/s", 0});
    };
    for (size_t i = 0; i < matrices.size(); ++i) {
      report(matrices[i], seconds[i], batch, static_cast<double>(layers));
    }
    const int64_t head_rows = std::min<int64_t>(batch, 8);
    std::vector<double> head_seconds;
    for (int pass = 0; pass < 3; ++pass) {
      head_seconds.push_back(time_one(head, base + layers * layer_elements, head_rows));
    }
    report(head, head_seconds, batch == 512 ? 1 : head_rows, 1);
    const std::string name = "model rows " + std::to_string(batch);
    rows.push_back(
        {name, all_bytes / all_seconds * 1e-9, "GB/s", all_bytes / all_seconds * 1e-9 / bandwidth});
    rows.push_back({name, all_flops / all_seconds * 1e-9, "GFLOP/s", 0});
  }

  if (json) {
    std::printf("{\"isa\": \"%s\", \"threads\": %d, \"shape\": \"%s\", \"rows\": [",
                cpu_isa_name(isa), pool.size(), shape.c_str());
    for (size_t i = 0; i < rows.size(); ++i) {
      std::printf("%s{\"name\": \"%s\", \"value\": %.2f, \"unit\": \"%s\", \"ratio\": %.3f}",
                  i == 0 ? "" : ", ", rows[i].name.c_str(), rows[i].value, rows[i].unit,
                  rows[i].ratio);
    }
    std::printf("]}\n");
  } else {
    std::printf("%s, %d threads, Qwen3-%s shapes\n", cpu_isa_name(isa), pool.size(), shape.c_str());
    for (const Row& row : rows) {
      std::printf("  %-22s %9.1f %-8s", row.name.c_str(), row.value, row.unit);
      if (row.ratio > 0) std::printf(" %5.1f %% of read", 100 * row.ratio);
      std::printf("\n");
    }
  }
  return 0;
}

}  // namespace
}  // namespace kvarn

int main(int argc, char** argv) { return kvarn::run(argc, argv); }
