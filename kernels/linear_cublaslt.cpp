// Row-major y[rows, n] = x[rows, k] W[n, k]^T is, column by column, y^T = W x^T: cuBLASLt sees W as
// a transposed k x n matrix and x as a k x rows one ("TN", the layout its kernels like best).
//
// Partial sums of split-K algorithms stay fp32: a scheme that adds them in the output's type would
// round a bf16 result several times.
#include "kernels/linear_cublaslt.h"

#include <cublasLt.h>

#include <algorithm>
#include <array>
#include <bit>
#include <compare>
#include <limits>
#include <map>
#include <stdexcept>
#include <string>
#include <vector>

#include "kernels/cuda_check.h"

namespace kvarn::cuda {
namespace {

constexpr int kCandidates = 8;                        // algorithms asked for
constexpr int kTimings = 3;                           // of each; the fastest counts
constexpr int kMaxAlignment = 16;                     // bytes; what the kernels can make use of
constexpr size_t kWorkspaceBytes = size_t{32} << 20;  // what cuBLAS advises for Hopper
// Written before each timing, so that weights come from memory as in a step: above the L2 cache of
// an H100 (50 MB). The workspace is its first half.
constexpr size_t kFlushBytes = size_t{64} << 20;

void check(cublasStatus_t status, const char* call) {
  if (status == CUBLAS_STATUS_SUCCESS) return;
  if (status == CUBLAS_STATUS_ALLOC_FAILED) throw std::bad_alloc();
  throw std::runtime_error(std::string(cublasLtGetStatusName(status)) + " (" +
                           cublasLtGetStatusString(status) + ") from " + call);
}
#define CUBLASLT_CHECK(call) check((call), #call)

cudaDataType_t cuda_type(DType dtype) {
  switch (dtype) {
    case DType::kBF16:
      return CUDA_R_16BF;
    case DType::kF32:
      return CUDA_R_32F;
    default:
      break;
  }
  check_failed(__FILE__, __LINE__, "dtype", "linear gives bf16 or f32");
}

struct Key {
  int64_t rows, n, k, y_stride;
  DType y_dtype;
  bool accumulate;
  int y_alignment;  // bytes
  auto operator<=>(const Key&) const = default;
};

// Ranges of rows that share an algorithm: two to an octave from 16 up.
int64_t last_row_of_range(int64_t rows) {
  if (rows <= 16) return 16;
  const auto half = static_cast<int64_t>(std::bit_floor(static_cast<uint64_t>(rows - 1))) / 2;
  return (rows + half - 1) / half * half;
}

class Event {
 public:
  Event() { CUDA_CHECK(cudaEventCreate(&event_)); }
  ~Event() { cudaEventDestroy(event_); }
  Event(const Event&) = delete;
  Event& operator=(const Event&) = delete;
  operator cudaEvent_t() const { return event_; }

 private:
  cudaEvent_t event_ = nullptr;
};

class DeviceBytes {
 public:
  explicit DeviceBytes(size_t bytes) { CUDA_CHECK(cudaMalloc(&data_, bytes)); }
  ~DeviceBytes() { cudaFree(data_); }
  DeviceBytes(const DeviceBytes&) = delete;
  DeviceBytes& operator=(const DeviceBytes&) = delete;
  void* data() const { return data_; }

 private:
  void* data_ = nullptr;
};

struct Plan {
  cublasLtMatrixLayout_t weight = nullptr, x = nullptr, y = nullptr;
  cublasLtMatmulAlgo_t algo{};

  explicit Plan(const Key& key) {
    const auto n = static_cast<uint64_t>(key.n), k = static_cast<uint64_t>(key.k);
    const auto rows = static_cast<uint64_t>(key.rows);
    CUBLASLT_CHECK(cublasLtMatrixLayoutCreate(&weight, CUDA_R_16BF, k, n, key.k));
    CUBLASLT_CHECK(cublasLtMatrixLayoutCreate(&x, CUDA_R_16BF, k, rows, key.k));
    CUBLASLT_CHECK(cublasLtMatrixLayoutCreate(&y, cuda_type(key.y_dtype), n, rows, key.y_stride));
  }
  ~Plan() {
    for (const auto layout : {weight, x, y}) {
      if (layout != nullptr) cublasLtMatrixLayoutDestroy(layout);
    }
  }
  Plan(const Plan&) = delete;
  Plan& operator=(const Plan&) = delete;
};

}  // namespace

class CublasLt::Impl {
 public:
  Impl() : memory_(kFlushBytes) {
    CUBLASLT_CHECK(cublasLtCreate(&handle_));
    CUBLASLT_CHECK(cublasLtMatmulDescCreate(&operation_, CUBLAS_COMPUTE_32F, CUDA_R_32F));
    const cublasOperation_t transposed = CUBLAS_OP_T;
    CUBLASLT_CHECK(cublasLtMatmulDescSetAttribute(operation_, CUBLASLT_MATMUL_DESC_TRANSA,
                                                  &transposed, sizeof transposed));
  }
  ~Impl() {
    if (operation_ != nullptr) cublasLtMatmulDescDestroy(operation_);
    if (handle_ != nullptr) cublasLtDestroy(handle_);
  }
  Impl(const Impl&) = delete;
  Impl& operator=(const Impl&) = delete;

  void run(cudaStream_t stream, Tensor x, Tensor weight, void* y, DType y_dtype, int64_t y_stride,
           bool accumulate) {
    const auto address = reinterpret_cast<uintptr_t>(y);
    const uintptr_t lowest_bit = address & (~address + 1);
    const Key key{x.dim(0),
                  weight.dim(0),
                  x.dim(1),
                  y_stride,
                  y_dtype,
                  accumulate,
                  static_cast<int>(std::min<uintptr_t>(lowest_bit, kMaxAlignment))};
    const Operands operands{x.raw(), weight.raw(), y, accumulate ? 1.f : 0.f};
    multiply(stream, plan_for(stream, key, operands), operands);
  }

 private:
  struct Operands {
    const void* x;
    const void* weight;
    void* y;
    float beta;
  };

  void multiply(cudaStream_t stream, const Plan& plan, const Operands& o) {
    const float alpha = 1.f;
    CUBLASLT_CHECK(cublasLtMatmul(handle_, operation_, &alpha, o.weight, plan.weight, o.x, plan.x,
                                  &o.beta, o.y, plan.y, o.y, plan.y, &plan.algo, memory_.data(),
                                  kWorkspaceBytes, stream));
  }

  const Plan& plan_for(cudaStream_t stream, const Key& key, const Operands& operands) {
    if (const auto found = plans_.find(key); found != plans_.end()) return *found->second;
    auto plan = std::make_unique<Plan>(key);
    Key range = key;
    range.rows = last_row_of_range(key.rows);
    const auto choice = choices_.find(range);
    if (choice != choices_.end() && fits(*plan, choice->second)) {
      plan->algo = choice->second;
    } else {
      const std::vector<cublasLtMatmulAlgo_t> candidates = suggestions(*plan, key.y_alignment);
      plan->algo = candidates.front();
      cudaStreamCaptureStatus capture = cudaStreamCaptureStatusNone;
      CUDA_CHECK(cudaStreamIsCapturing(stream, &capture));
      if (capture != cudaStreamCaptureStatusNone) {
        untimed_ = std::move(plan);  // the graph keeps the kernel, not the plan
        return *untimed_;
      }
      if (candidates.size() > 1 && choice == choices_.end()) {
        plan->algo = fastest(stream, *plan, key, operands, candidates);
        choices_.emplace(range, plan->algo);
      }
    }
    return *plans_.emplace(key, std::move(plan)).first->second;
  }

  bool fits(const Plan& plan, const cublasLtMatmulAlgo_t& algo) {
    cublasLtMatmulHeuristicResult_t result{};
    return cublasLtMatmulAlgoCheck(handle_, operation_, plan.weight, plan.x, plan.y, plan.y, &algo,
                                   &result) == CUBLAS_STATUS_SUCCESS &&
           result.workspaceSize <= kWorkspaceBytes;
  }

  std::vector<cublasLtMatmulAlgo_t> suggestions(const Plan& plan, int y_alignment) {
    cublasLtMatmulPreference_t preference = nullptr;
    CUBLASLT_CHECK(cublasLtMatmulPreferenceCreate(&preference));
    const std::unique_ptr<std::remove_pointer_t<cublasLtMatmulPreference_t>,
                          decltype(&cublasLtMatmulPreferenceDestroy)>
        owner(preference, &cublasLtMatmulPreferenceDestroy);
    const auto set = [&](cublasLtMatmulPreferenceAttributes_t attribute, auto value) {
      CUBLASLT_CHECK(
          cublasLtMatmulPreferenceSetAttribute(preference, attribute, &value, sizeof value));
    };
    set(CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, uint64_t{kWorkspaceBytes});
    set(CUBLASLT_MATMUL_PREF_REDUCTION_SCHEME_MASK,
        uint32_t{CUBLASLT_REDUCTION_SCHEME_INPLACE | CUBLASLT_REDUCTION_SCHEME_COMPUTE_TYPE});
    set(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES, uint32_t{kMaxAlignment});
    set(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES, uint32_t{kMaxAlignment});
    set(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES, static_cast<uint32_t>(y_alignment));
    set(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES, static_cast<uint32_t>(y_alignment));
    std::array<cublasLtMatmulHeuristicResult_t, kCandidates> results{};
    int count = 0;
    CUBLASLT_CHECK(cublasLtMatmulAlgoGetHeuristic(handle_, operation_, plan.weight, plan.x, plan.y,
                                                  plan.y, preference, kCandidates, results.data(),
                                                  &count));
    std::vector<cublasLtMatmulAlgo_t> algos;
    for (int i = 0; i < count; ++i) {
      const auto& result = results[static_cast<size_t>(i)];
      if (result.state == CUBLAS_STATUS_SUCCESS) algos.push_back(result.algo);
    }
    if (algos.empty()) throw std::runtime_error("cuBLASLt has no algorithm for this shape");
    return algos;
  }

  cublasLtMatmulAlgo_t fastest(cudaStream_t stream, Plan& plan, const Key& key, Operands operands,
                               const std::vector<cublasLtMatmulAlgo_t>& candidates) {
    // What accumulates must not do so many times: its timings go elsewhere.
    std::unique_ptr<DeviceBytes> elsewhere;
    if (key.accumulate) {
      elsewhere = std::make_unique<DeviceBytes>(static_cast<size_t>(key.rows * key.y_stride) *
                                                dtype_bytes(key.y_dtype));
      operands.y = elsewhere->data();
    }
    const Event begin, end;
    size_t best = 0;
    float best_ms = std::numeric_limits<float>::infinity();
    for (size_t i = 0; i < candidates.size(); ++i) {
      plan.algo = candidates[i];
      multiply(stream, plan, operands);  // loads the kernel
      for (int round = 0; round < kTimings; ++round) {
        CUDA_CHECK(cudaMemsetAsync(memory_.data(), round, kFlushBytes, stream));
        CUDA_CHECK(cudaEventRecord(begin, stream));
        multiply(stream, plan, operands);
        CUDA_CHECK(cudaEventRecord(end, stream));
        CUDA_CHECK(cudaEventSynchronize(end));
        float ms = 0;
        CUDA_CHECK(cudaEventElapsedTime(&ms, begin, end));
        if (ms < best_ms) {
          best_ms = ms;
          best = i;
        }
      }
    }
    return candidates[best];
  }

  cublasLtHandle_t handle_ = nullptr;
  cublasLtMatmulDesc_t operation_ = nullptr;
  DeviceBytes memory_;
  std::map<Key, std::unique_ptr<Plan>> plans_;
  std::map<Key, cublasLtMatmulAlgo_t> choices_;  // by the last row of the range
  std::unique_ptr<Plan> untimed_;
};

CublasLt::CublasLt() : impl_(std::make_unique<Impl>()) {}
CublasLt::~CublasLt() = default;

void CublasLt::run(cudaStream_t stream, Tensor x, Tensor weight, void* y, DType y_dtype,
                   int64_t y_stride, bool accumulate) {
  CHECK(x.dtype() == DType::kBF16 && weight.dtype() == DType::kBF16, "x and weight are bf16");
  CHECK(x.dims() == 2 && weight.dims() == 2 && x.dim(1) == weight.dim(1), "x and weight share k");
  CHECK(!accumulate || y_dtype == DType::kF32, "only f32 accumulates");
  if (x.dim(0) == 0 || weight.dim(0) == 0) return;
  impl_->run(stream, x, weight, y, y_dtype, y_stride, accumulate);
}

}  // namespace kvarn::cuda
