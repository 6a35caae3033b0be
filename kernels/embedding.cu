// Row look-ups: token embedding (widened to fp32) and gather of activation rows. One thread block
// per row. An index outside its table is a bug that the host cannot see: the kernel traps, which
// ends the context.
#include <algorithm>

#include "kernels/cuda_check.h"
#include "kernels/device_overlap.cuh"
#include "kernels/device_vector.cuh"
#include "kernels/ops_cuda.h"

namespace kvarn::cuda {
namespace {

constexpr int kMaxThreads = 256;

template <typename T>
__global__ void __launch_bounds__(kMaxThreads)
    embed_kernel(const int32_t* __restrict__ token_ids,  // [rows]
                 const T* __restrict__ table,            // [vocab, hidden]
                 float* __restrict__ out,                // [rows, hidden]
                 int64_t vocab, int hidden) {
  let_next_kernel_begin();
  const int64_t token = token_ids[blockIdx.x];
  if (token < 0 || token >= vocab) __trap();
  table += token * hidden;
  out += int64_t{blockIdx.x} * hidden;
  const int step = static_cast<int>(blockDim.x) * kVector;
  for (int i = static_cast<int>(threadIdx.x) * kVector; i < hidden; i += step) {
    store8(out + i, load8(table + i));
  }
}

template <typename Unit>  // the widest that divides a row
__global__ void __launch_bounds__(kMaxThreads)
    gather_kernel(const Unit* __restrict__ x, const int32_t* __restrict__ rows,
                  Unit* __restrict__ y, int64_t x_rows, int64_t units) {
  let_next_kernel_begin();
  const int64_t row = rows[blockIdx.x];
  if (row < 0 || row >= x_rows) __trap();
  x += row * units;
  y += blockIdx.x * units;
  for (int64_t i = threadIdx.x; i < units; i += blockDim.x) y[i] = x[i];
}

unsigned threads_for(int64_t items) {
  return static_cast<unsigned>(std::clamp<int64_t>((items + 31) / 32 * 32, 32, kMaxThreads));
}

template <typename T>
void launch_embed(cudaStream_t stream, const int32_t* token_ids, Tensor table, Tensor out) {
  embed_kernel<T>
      <<<static_cast<unsigned>(out.dim(0)), threads_for(out.dim(1) / kVector), 0, stream>>>(
          token_ids, table.data<T>(), out.data<float>(), table.dim(0),
          static_cast<int>(out.dim(1)));
  CUDA_CHECK(cudaGetLastError());
}

template <typename Unit>
void launch_gather(cudaStream_t stream, Tensor x, const int32_t* rows, int64_t num_rows, Tensor y,
                   int64_t row_bytes) {
  const int64_t units = row_bytes / static_cast<int64_t>(sizeof(Unit));
  gather_kernel<Unit><<<static_cast<unsigned>(num_rows), threads_for(units), 0, stream>>>(
      static_cast<const Unit*>(x.raw()), rows, static_cast<Unit*>(y.raw()), x.dim(0), units);
  CUDA_CHECK(cudaGetLastError());
}

}  // namespace

void embed(cudaStream_t stream, const int32_t* token_ids, Tensor table, Tensor out) {
  CHECK(table.dims() == 2, "the table is [vocab, hidden]");
  CHECK(out.dims() == 2 && out.dtype() == DType::kF32, "out is f32 [rows, hidden]");
  CHECK(out.dim(1) == table.dim(1), "table and out have one hidden size");
  CHECK(out.dim(1) % kVector == 0, "rows are read by eights: hidden must be a multiple of 8");
  if (out.size() == 0) return;
  switch (table.dtype()) {
    case DType::kBF16:
      return launch_embed<bf16>(stream, token_ids, table, out);
    case DType::kF16:
      return launch_embed<half>(stream, token_ids, table, out);
    case DType::kF32:
      return launch_embed<float>(stream, token_ids, table, out);
    default:
      CHECK(false, "an embedding table is bf16, f16 or f32");
  }
}

void gather_rows(cudaStream_t stream, Tensor x, const int32_t* rows, int64_t num_rows, Tensor y) {
  CHECK(x.dims() == 2 && y.dims() == 2 && x.dtype() == y.dtype(), "x and y are [rows, columns]");
  CHECK(y.dim(0) == num_rows && y.dim(1) == x.dim(1), "y has a row for each index");
  if (y.size() == 0) return;
  const auto row_bytes = static_cast<int64_t>(dtype_bytes(x.dtype())) * x.dim(1);
  if (row_bytes % 16 == 0) return launch_gather<uint4>(stream, x, rows, num_rows, y, row_bytes);
  if (row_bytes % 4 == 0) return launch_gather<uint32_t>(stream, x, rows, num_rows, y, row_bytes);
  if (row_bytes % 2 == 0) return launch_gather<uint16_t>(stream, x, rows, num_rows, y, row_bytes);
  launch_gather<uint8_t>(stream, x, rows, num_rows, y, row_bytes);
}

}  // namespace kvarn::cuda
