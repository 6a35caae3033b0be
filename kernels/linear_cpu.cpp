// Dispatch of linear(): packs the activations once per call, then splits the columns of all row
// blocks of the weight over the threads. Also the scalar kernel, which is the specification: eight
// accumulator lanes along k, multiply then add, summed pairwise.
#include "kernels/linear_cpu.h"

#include <algorithm>
#include <array>
#include <cstring>

namespace kvarn::cpu {
namespace {

constexpr int kScalarLanes = 8;

size_t packed_bytes_scalar(int64_t rows, int64_t k) {
  return static_cast<size_t>(rows * k) * sizeof(float);
}

void pack_scalar(const float* x, int64_t /*rows*/, int64_t k, int64_t first, int64_t last,
                 std::byte* packed) {
  std::memcpy(packed + packed_bytes_scalar(first, k), x + first * k,
              packed_bytes_scalar(last - first, k));
}

template <typename W>
float dot_scalar(const float* x, const W* w, int64_t k) {
  std::array<float, kScalarLanes> lanes{};
  int64_t i = 0;
  for (; i + kScalarLanes <= k; i += kScalarLanes) {
    for (size_t lane = 0; lane < kScalarLanes; ++lane) {
      lanes[lane] +=
          x[i + static_cast<int64_t>(lane)] * to_float(w[i + static_cast<int64_t>(lane)]);
    }
  }
  for (size_t lane = 0; i < k; ++i, ++lane) lanes[lane] += x[i] * to_float(w[i]);
  return ((lanes[0] + lanes[4]) + (lanes[2] + lanes[6])) +
         ((lanes[1] + lanes[5]) + (lanes[3] + lanes[7]));
}

template <typename W>
void compute_scalar(const LinearJob& job, int64_t first, int64_t last) {
  const float* x = reinterpret_cast<const float*>(job.packed_x);
  const W* weight = static_cast<const W*>(job.weight);
  for (int64_t column = first; column < last; ++column) {
    for (int64_t row = 0; row < job.rows; ++row) {
      job.y[row * job.y_stride + column] =
          dot_scalar(x + row * job.k, weight + column * job.k, job.k);
    }
  }
}

template <typename W>
constexpr LinearKernel kScalarKernel = {"scalar",         1, 1, packed_bytes_scalar, pack_scalar,
                                        compute_scalar<W>};

}  // namespace

const LinearKernel& linear_kernel_scalar(DType dtype) {
  switch (dtype) {
    case DType::kBF16:
      return kScalarKernel<bf16>;
    case DType::kF16:
      return kScalarKernel<half>;
    case DType::kF32:
      return kScalarKernel<float>;
    default:
      break;
  }
  check_failed(__FILE__, __LINE__, "dtype", "linear weights are bf16, f16 or f32");
}

#if defined(__x86_64__)
const LinearKernel& linear_kernel(CpuIsa isa, DType dtype, bool fp32_activations) {
  if (dtype == DType::kBF16 && !fp32_activations) {
    if (isa >= CpuIsa::kAmxBf16) return linear_kernel_amx();
    if (isa >= CpuIsa::kAvx512Bf16) return linear_kernel_avx512_bf16();
  }
  if (isa >= CpuIsa::kAvx512) return linear_kernel_avx512(dtype);
  if (isa >= CpuIsa::kAvx2) return linear_kernel_avx2(dtype);
  return linear_kernel_scalar(dtype);
}
#else
const LinearKernel& linear_kernel(CpuIsa /*isa*/, DType dtype, bool /*fp32_activations*/) {
  return linear_kernel_scalar(dtype);
}
#endif

void Linear::run(Tensor x, const LinearWeight& weight, Tensor y) {
  const int64_t rows = x.dim(0), k = weight.in_features(), n = weight.out_features();
  if (rows == 0 || n == 0) return;

  const LinearKernel* packed_for = nullptr;
  int64_t column_offset = 0;
  for (int i = 0; i < weight.num_parts; ++i) {
    const Tensor& part = weight.parts[static_cast<size_t>(i)];
    const LinearKernel& kernel = linear_kernel(isa_, part.dtype(), fp32_activations_);
    if (packed_for == nullptr || packed_for->pack != kernel.pack) {
      const size_t bytes = kernel.packed_bytes(rows, k);
      if (scratch_.bytes() < bytes) scratch_ = allocate_host(bytes + bytes / 4);
      const int64_t blocks = (rows + kernel.row_block - 1) / kernel.row_block;
      const int64_t grain =
          std::max<int64_t>(1, 32768 / std::max<int64_t>(1, k * kernel.row_block));
      pool_.parallel_for(blocks, grain, [&](int64_t first, int64_t last, int) {
        kernel.pack(x.data<float>(), rows, k, first, last, scratch_.data());
      });
      packed_for = &kernel;
    }
    const LinearJob job{
        scratch_.data(), rows, k, part.raw(), part.dim(0), y.data<float>() + column_offset, n};
    // A chunk reads at least 64 KiB of weights: less is not worth a wake-up.
    const int64_t blocks = (job.n + kernel.column_block - 1) / kernel.column_block;
    const int64_t grain =
        std::max<int64_t>(1, 32768 / std::max<int64_t>(1, k * kernel.column_block));
    pool_.parallel_for(blocks, grain, [&](int64_t first, int64_t last, int) {
      kernel.compute(job, first * kernel.column_block, std::min(last * kernel.column_block, job.n));
    });
    column_offset += job.n;
  }
}

}  // namespace kvarn::cpu
