// The loops of read_limit_us() sum what they read and store the sum only where it cannot be, so
// that the compiler keeps the loads. Bulk copies: PTX ISA, cp.async.bulk and mbarrier.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <ctime>
#include <fstream>
#include <limits>
#include <sstream>

#include "bench/cuda/timing.h"
#include "kernels/cuda_check.h"

namespace kvarn::bench {
namespace {

constexpr size_t kGraphMicroseconds = 2000;  // of work in one replay, so that its start is nothing
constexpr int kMaxLaunches = 1000;           // nodes of one graph

__global__ void fill_kernel(uint32_t* data, size_t words, unsigned seed) {
  const size_t stride = size_t{gridDim.x} * blockDim.x;
  for (size_t i = size_t{blockIdx.x} * blockDim.x + threadIdx.x; i < words; i += stride) {
    uint32_t h = static_cast<uint32_t>(i) * 0x9e3779b9u ^ seed * 0x85ebca6bu;
    h = (h ^ h >> 16) * 0x7feb352du;
    h = (h ^ h >> 15) * 0x846ca68bu;
    data[i] = h ^ h >> 16;
  }
}

__device__ uint32_t mixed(const uint4& v) { return v.x ^ v.y ^ v.z ^ v.w; }

__device__ void keep(uint32_t sum, uint32_t* sink) {
  if (sum == 0x12345679u && sink[0] == 1) sink[1] = sum;
}

// Piece i of the grid-stride order, kAhead loads in flight in each thread.
template <int kAhead>
__global__ void __launch_bounds__(512) read_linear(const uint4* from, int64_t n, uint32_t* sink) {
  const int64_t stride = int64_t{gridDim.x} * blockDim.x;
  uint32_t sum = 0;
  int64_t i = int64_t{blockIdx.x} * blockDim.x + threadIdx.x;
  for (; i + (kAhead - 1) * stride < n; i += kAhead * stride) {
    uint4 v[kAhead];
#pragma unroll
    for (int k = 0; k < kAhead; ++k) v[k] = __ldcs(from + i + k * stride);
#pragma unroll
    for (int k = 0; k < kAhead; ++k) sum ^= mixed(v[k]);
  }
  for (; i < n; i += stride) sum ^= mixed(__ldcs(from + i));
  keep(sum, sink);
}

// Every block its own contiguous share.
__global__ void __launch_bounds__(512) read_shares(const uint4* from, int64_t n, uint32_t* sink) {
  constexpr int kAhead = 8;
  const int64_t begin = n * blockIdx.x / gridDim.x, end = n * (blockIdx.x + 1) / gridDim.x;
  uint32_t sum = 0;
  int64_t i = begin + threadIdx.x;
  for (; i + (kAhead - 1) * blockDim.x < end; i += kAhead * blockDim.x) {
    uint4 v[kAhead];
#pragma unroll
    for (int k = 0; k < kAhead; ++k) v[k] = __ldcs(from + i + k * blockDim.x);
#pragma unroll
    for (int k = 0; k < kAhead; ++k) sum ^= mixed(v[k]);
  }
  for (; i < end; i += blockDim.x) sum ^= mixed(__ldcs(from + i));
  keep(sum, sink);
}

constexpr int kBulkBytes = 13824;  // a page of kvarn_k4v2
constexpr int kBulkSlots = 4;

// One thread a block keeps kBulkSlots bulk copies in flight; nobody looks at the bytes.
__global__ void __launch_bounds__(32)
    read_bulk(const std::byte* from, int64_t pieces, int64_t last_bytes, uint32_t* sink) {
#if __CUDA_ARCH__ >= 900
  extern __shared__ __align__(128) std::byte slots[];
  __shared__ __align__(8) uint64_t full[kBulkSlots];
  if (threadIdx.x != 0) return;
  const auto smem = [](const void* p) {
    return static_cast<uint32_t>(__cvta_generic_to_shared(p));
  };
  for (auto& bar : full) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(smem(&bar)) : "memory");
  }
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
  const auto start = [&](int64_t piece, int slot) {
    const uint32_t bytes = static_cast<uint32_t>(piece == pieces - 1 ? last_bytes : kBulkBytes);
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(smem(&full[slot])),
                 "r"(bytes)
                 : "memory");
    asm volatile(
        "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::
            "r"(smem(slots + slot * kBulkBytes)),
        "l"(from + piece * kBulkBytes), "r"(bytes), "r"(smem(&full[slot]))
        : "memory");
  };
  int64_t ahead = blockIdx.x;
  for (int s = 0; s < kBulkSlots && ahead < pieces; ++s, ahead += gridDim.x) start(ahead, s);
  int slot = 0;
  uint32_t parity = 0;
  for (int64_t piece = blockIdx.x; piece < pieces; piece += gridDim.x) {
    asm volatile(
        "{\n .reg .pred done;\nwait:\n mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
        " @!done bra wait;\n}" ::"r"(smem(&full[slot])),
        "r"(parity)
        : "memory");
    if (ahead < pieces) start(ahead, slot);
    ahead += gridDim.x;
    if (++slot == kBulkSlots) slot = 0, parity ^= 1;
  }
  keep(*reinterpret_cast<const uint32_t*>(slots), sink);
#endif
}

template <typename T>
struct Owned {  // a CUDA handle and how it ends
  T handle{};
  cudaError_t (*destroy)(T);
  ~Owned() {
    if (handle) destroy(handle);
  }
};

std::string json_string(const std::string& text) {
  std::string out = "\"";
  for (const char c : text) {
    if (c == '"' || c == '\\') out += '\\';
    out += c < ' ' && c >= 0 ? ' ' : c;
  }
  return out + "\"";
}

std::string json_number(double value) {
  if (!std::isfinite(value)) return "null";
  std::ostringstream out;
  out.precision(6);
  out << value;
  return out.str();
}

std::string driver_version() {
  std::ifstream file("/proc/driver/nvidia/version");
  std::string word, line;
  std::getline(file, line);
  std::istringstream words(line);
  while (words >> word) {
    if (word.find('.') != std::string::npos && std::isdigit(static_cast<unsigned char>(word[0]))) {
      return word;
    }
  }
  return "";
}

}  // namespace

int variants_for(size_t bytes) {
  return static_cast<int>(std::max<size_t>(2, (kRotatedBytes + bytes) / (bytes + 1)));
}

double time_us(int variants, const std::function<void(cudaStream_t, int)>& launch) {
  Owned<cudaStream_t> stream{nullptr, cudaStreamDestroy};
  CUDA_CHECK(cudaStreamCreateWithFlags(&stream.handle, cudaStreamNonBlocking));
  Owned<cudaEvent_t> begin{nullptr, cudaEventDestroy}, end{nullptr, cudaEventDestroy};
  CUDA_CHECK(cudaEventCreate(&begin.handle));
  CUDA_CHECK(cudaEventCreate(&end.handle));

  const auto replay = [&](int launches, int replays) {
    Owned<cudaGraph_t> graph{nullptr, cudaGraphDestroy};
    CUDA_CHECK(cudaStreamBeginCapture(stream.handle, cudaStreamCaptureModeThreadLocal));
    for (int i = 0; i < launches; ++i) launch(stream.handle, i % variants);
    CUDA_CHECK(cudaStreamEndCapture(stream.handle, &graph.handle));
    Owned<cudaGraphExec_t> exec{nullptr, cudaGraphExecDestroy};
    CUDA_CHECK(cudaGraphInstantiate(&exec.handle, graph.handle, 0));
    CUDA_CHECK(cudaGraphLaunch(exec.handle, stream.handle));  // warm up
    std::vector<float> times;
    for (int r = 0; r < replays; ++r) {
      CUDA_CHECK(cudaEventRecord(begin.handle, stream.handle));
      CUDA_CHECK(cudaGraphLaunch(exec.handle, stream.handle));
      CUDA_CHECK(cudaEventRecord(end.handle, stream.handle));
      CUDA_CHECK(cudaEventSynchronize(end.handle));
      float ms = 0;
      CUDA_CHECK(cudaEventElapsedTime(&ms, begin.handle, end.handle));
      times.push_back(ms);
    }
    std::nth_element(times.begin(), times.begin() + replays / 2, times.end());
    return 1e3 * times[static_cast<size_t>(replays / 2)] / launches;
  };

  const double estimate = replay(std::min(variants, kMaxLaunches), 3);
  const double rounds = std::ceil(kGraphMicroseconds / std::max(0.1, estimate) / variants);
  const int launches = static_cast<int>(std::min<double>(rounds * variants, kMaxLaunches));
  return replay(launches, kReplays);
}

double read_limit_us(size_t bytes) {
  const int64_t n = static_cast<int64_t>(bytes / 16);
  if (n == 0) return 0;
  int sms = 0;
  CUDA_CHECK(cudaDeviceGetAttribute(&sms, cudaDevAttrMultiProcessorCount, 0));
  const int variants = variants_for(bytes);
  const DeviceBytes data(bytes / 16 * 16 * static_cast<size_t>(variants)), sink(256, 7);
  auto* out = reinterpret_cast<uint32_t*>(sink.data());
  const auto part = [&](int variant) {
    return reinterpret_cast<const uint4*>(data.data()) + n * variant;
  };
  double best = std::numeric_limits<double>::infinity();
  const auto consider = [&](const std::function<void(cudaStream_t, int)>& launch) {
    best = std::min(best, time_us(variants, launch));
  };
  for (const int blocks_per_sm : {2, 4}) {
    // No more blocks than there are pieces to read.
    const auto grid =
        static_cast<unsigned>(std::min<int64_t>(sms * blocks_per_sm, (n + 511) / 512));
    consider([&](cudaStream_t s, int v) { read_linear<8><<<grid, 512, 0, s>>>(part(v), n, out); });
    consider([&](cudaStream_t s, int v) { read_linear<4><<<grid, 512, 0, s>>>(part(v), n, out); });
    consider([&](cudaStream_t s, int v) { read_shares<<<grid, 512, 0, s>>>(part(v), n, out); });
  }
  const int64_t pieces = (n * 16 + kBulkBytes - 1) / kBulkBytes;
  constexpr int kShared = kBulkSlots * kBulkBytes;
  CUDA_CHECK(cudaFuncSetAttribute(read_bulk, cudaFuncAttributeMaxDynamicSharedMemorySize, kShared));
  const auto grid = static_cast<unsigned>(std::min<int64_t>(4 * sms, pieces));
  consider([&](cudaStream_t s, int v) {
    read_bulk<<<grid, 32, kShared, s>>>(reinterpret_cast<const std::byte*>(part(v)), pieces,
                                        n * 16 - (pieces - 1) * kBulkBytes, out);
  });
  CUDA_CHECK(cudaGetLastError());
  return best;
}

DeviceBytes::DeviceBytes(size_t bytes, unsigned seed) : bytes_(bytes) {
  const size_t words = (bytes + 3) / 4;
  void* data = nullptr;
  CUDA_CHECK(cudaMalloc(&data, std::max<size_t>(4, words * 4)));
  data_ = static_cast<std::byte*>(data);
  if (words == 0) return;
  fill_kernel<<<1024, 256>>>(static_cast<uint32_t*>(data), words, seed);
  CUDA_CHECK(cudaGetLastError());
  CUDA_CHECK(cudaDeviceSynchronize());
}

DeviceBytes::~DeviceBytes() { cudaFree(data_); }

std::string option(int argc, char** argv, const std::string& name, const std::string& otherwise) {
  for (int i = 1; i + 1 < argc; ++i) {
    if (name == argv[i]) return argv[i + 1];
  }
  return otherwise;
}

Report::Report(int argc, char** argv)
    : json_path_(option(argc, argv, "--json", "")), commit_(option(argc, argv, "--commit", "")) {
  for (int i = 0; i < argc; ++i) {
    const std::string word = argv[i];
    command_ += i == 0 ? word.substr(word.rfind('/') + 1) : " " + word;
  }
}

void Report::add(const Row& row) {
  rows_.push_back(row);
  std::printf("%-40s %10.2f %-10s %10.2f %-28s ratio %6.3f (must %.3g, stretch %.3g)\n",
              row.name.c_str(), row.value, row.unit.c_str(), row.against_value, row.against.c_str(),
              row.ratio, row.must, row.stretch);
  std::fflush(stdout);
}

Report::~Report() {
  if (json_path_.empty()) return;
  cudaDeviceProp device{};
  cudaGetDeviceProperties(&device, 0);
  char date[32];
  const std::time_t now = std::time(nullptr);
  std::strftime(date, sizeof date, "%Y-%m-%dT%H:%M:%SZ", std::gmtime(&now));
  std::ofstream out(json_path_);
  out << "{\n \"device\": " << json_string(device.name)
      << ",\n \"driver\": " << json_string(driver_version())
      << ",\n \"date\": " << json_string(date) << ",\n \"commit\": " << json_string(commit_)
      << ",\n \"command\": " << json_string(command_) << ",\n \"rows\": [";
  for (size_t i = 0; i < rows_.size(); ++i) {
    const Row& row = rows_[i];
    out << (i == 0 ? "\n" : ",\n") << "  {\"name\": " << json_string(row.name)
        << ", \"value\": " << json_number(row.value) << ", \"unit\": " << json_string(row.unit)
        << ", \"against\": " << (row.against.empty() ? "null" : json_string(row.against))
        << ", \"against_value\": " << json_number(row.against_value)
        << ", \"ratio\": " << json_number(row.ratio) << ", \"must\": " << json_number(row.must)
        << ", \"stretch\": " << json_number(row.stretch)
        << ", \"lower_is_better\": " << (row.lower_is_better ? "true" : "false") << "}";
  }
  out << "\n ]\n}\n";
  out.close();
  if (!out) std::fprintf(stderr, "could not write %s\n", json_path_.c_str());
}

}  // namespace kvarn::bench
