// Timing of GPU kernels as the engine runs them: replays of a CUDA graph of many launches, inputs
// rotated so that the L2 cache does not hold them. A time is the median of the replays divided by
// the launches of one. Limits (a plain read of as many bytes) come from the same run.
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>
#include <functional>
#include <string>
#include <vector>

namespace kvarn::bench {

constexpr int kReplays = 31;                         // the median counts
constexpr size_t kRotatedBytes = size_t{256} << 20;  // inputs rotate over this: 5 x L2 of an H100

// How many variants of an input of `bytes` a rotation needs, at least 2.
int variants_for(size_t bytes);

// `launch(stream, variant)` enqueues one run on the variant-th set of inputs, variant in
// [0, variants). Returns microseconds per run. The graph holds about two milliseconds of runs, a
// multiple of `variants`. The results of the last replay are there afterwards.
double time_us(int variants, const std::function<void(cudaStream_t, int)>& launch);

// Microseconds of reading `bytes` once, the fastest of several loops (linear streaming loads of two
// widths of grid, shares per block, bulk copies into shared memory). Rotated and timed as above.
double read_limit_us(size_t bytes);

// Device memory filled with the hash of (seed, index): never zeros, whose reads and products are
// cheaper than those of data. Freed with the object.
class DeviceBytes {
 public:
  explicit DeviceBytes(size_t bytes, unsigned seed = 1);
  ~DeviceBytes();
  DeviceBytes(const DeviceBytes&) = delete;
  DeviceBytes& operator=(const DeviceBytes&) = delete;
  std::byte* data() const { return data_; }
  size_t bytes() const { return bytes_; }

 private:
  std::byte* data_ = nullptr;
  size_t bytes_;
};

constexpr double kNone = __builtin_nan("");

// One line of the result file. A number that there is none of is kNone and becomes null.
struct Row {
  std::string name;  // "2-decode-g8-b32-l16k": row number of the targets first where there is one
  double value = 0;
  std::string unit = "us";
  std::string against;
  double against_value = kNone;
  double ratio = kNone;  // what `must` and `stretch` bound
  double must = kNone, stretch = kNone;
  bool lower_is_better = true;
};

// Prints rows as they come; at its end writes them as JSON with device, driver, date, commit and
// command. Options: --json FILE (none: only print), --commit HASH. Others are left to the caller.
class Report {
 public:
  Report(int argc, char** argv);
  ~Report();
  Report(const Report&) = delete;
  Report& operator=(const Report&) = delete;
  void add(const Row& row);

 private:
  std::string json_path_, commit_, command_;
  std::vector<Row> rows_;
};

// The value after `name` on the command line, or `otherwise`.
std::string option(int argc, char** argv, const std::string& name, const std::string& otherwise);

}  // namespace kvarn::bench
