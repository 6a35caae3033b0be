// Chooses who multiplies: own kernels for few rows (one summation order for 1 to 8 rows), cuBLASLt
// for more. Parts of a weight that follow each other in memory become one matrix.
#include "kernels/linear_cuda.h"

#include "kernels/cuda_check.h"
#include "kernels/linear_cublaslt.h"
#include "kernels/linear_few_cuda.h"

namespace kvarn::cuda {
namespace {

LinearWeight joined(const LinearWeight& weight) {
  CHECK(weight.num_parts >= 1 && weight.num_parts <= 3, "a weight has one to three parts");
  LinearWeight out;
  for (size_t i = 0; i < static_cast<size_t>(weight.num_parts); ++i) {
    const Tensor& part = weight.parts[i];
    CHECK(part.dims() == 2 && part.dtype() == DType::kBF16, "weights on a GPU are bf16 [n, k]");
    CHECK(part.dim(1) == weight.parts[0].dim(1), "the parts of a weight share k");
    if (part.dim(0) == 0) continue;
    if (out.num_parts > 0) {
      Tensor& last = out.parts[static_cast<size_t>(out.num_parts - 1)];
      if (static_cast<const std::byte*>(last.raw()) + last.bytes() == part.raw()) {
        last = Tensor(last.raw(), DType::kBF16, {last.dim(0) + part.dim(0), last.dim(1)});
        continue;
      }
    }
    out.parts[static_cast<size_t>(out.num_parts++)] = part;
  }
  return out;
}

void check_operands(Tensor x, const LinearWeight& weight, Tensor y, int64_t columns) {
  CHECK(x.dims() == 2 && x.dtype() == DType::kBF16, "x is bf16 [rows, k]");
  CHECK(x.dim(1) == weight.in_features(), "x and the weight share k");
  CHECK(x.dim(1) > 0 && x.dim(1) % 8 == 0,
        "rows are read by 16 bytes: k must be a positive multiple of 8");
  CHECK(y.dims() == 2 && y.dim(0) == x.dim(0) && y.dim(1) == columns,
        "y has a row for each of x and a column for each row of the weight");
}

}  // namespace

class Linear::Impl {
 public:
  Impl(cudaStream_t stream, bool overlap) : stream_(stream), overlap_(overlap) {
    int device = 0;
    CUDA_CHECK(cudaGetDevice(&device));
    CUDA_CHECK(cudaDeviceGetAttribute(&multiprocessors_, cudaDevAttrMultiProcessorCount, device));
  }

  void few(Tensor x, const LinearWeight& weight, Tensor y, LinearResult result) {
    const FewRowsPlan plan = few_rows_plan(x.dim(0), weight.out_features(), weight.in_features(),
                                           result, multiprocessors_);
    linear_few_rows(stream_, x, weight, y, result, plan, overlap_);
  }

  void many(Tensor x, const LinearWeight& weight, Tensor y, bool accumulate) {
    int64_t column = 0;
    for (size_t i = 0; i < static_cast<size_t>(weight.num_parts); ++i) {
      const Tensor& part = weight.parts[i];
      auto* first =
          static_cast<std::byte*>(y.raw()) + static_cast<size_t>(column) * dtype_bytes(y.dtype());
      library_.run(stream_, x, part, first, y.dtype(), y.dim(1), accumulate);
      column += part.dim(0);
    }
  }

 private:
  cudaStream_t stream_;
  bool overlap_;
  int multiprocessors_ = 0;
  CublasLt library_;
};

Linear::Linear(cudaStream_t stream, bool overlap)
    : impl_(std::make_unique<Impl>(stream, overlap)) {}
Linear::~Linear() = default;

void Linear::run(Tensor x, const LinearWeight& weight, Tensor y) {
  const LinearWeight w = joined(weight);
  check_operands(x, weight, y, weight.out_features());
  CHECK(y.dtype() == DType::kBF16 || y.dtype() == DType::kF32, "linear gives bf16 or f32");
  if (y.size() == 0) return;
  if (x.dim(0) <= kFewRows) return impl_->few(x, w, y, LinearResult::kStore);
  impl_->many(x, w, y, false);
}

void Linear::run_fused(Tensor x, const LinearWeight& weight, LinearResult result, Tensor y) {
  if (result == LinearResult::kStore) return run(x, weight, y);
  const LinearWeight w = joined(weight);
  const bool halves = result == LinearResult::kSiluMul;
  check_operands(x, weight, y, weight.out_features() / (halves ? 2 : 1));
  if (y.size() == 0) return;
  if (x.dim(0) <= kFewRows) return impl_->few(x, w, y, result);
  CHECK(result == LinearResult::kAdd, "silu * mul is fused for few rows only");
  CHECK(y.dtype() == DType::kF32, "the residual is f32");
  impl_->many(x, w, y, true);
}

}  // namespace kvarn::cuda
