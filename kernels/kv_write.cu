// Stores this step's K and V rows in the exact pages named by their slots, in the order of
// kv_device_layout.h: rows in order, their 16-byte pieces permuted by XOR. Bytes are copied, one
// piece of K and the same of V a thread.
#include <cuda_runtime.h>

#include "kernels/cuda_check.h"
#include "kernels/kv_device_layout.h"
#include "kernels/ops_cuda.h"

namespace kvarn::cuda {
namespace {

constexpr int kThreads = 256;

struct WriteArgs {
  const uint4* k;        // [rows][kv_heads][pieces]
  const uint4* v;        // the same
  const int64_t* slots;  // [rows]
  std::byte* pages;
  int64_t num_pieces;  // of K, all rows
  int kv_heads, pieces, exact_rows, page_bytes;
};

__global__ void __launch_bounds__(kThreads) kv_write_kernel(WriteArgs args) {
  const int64_t at = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (at >= args.num_pieces) return;
  const int row_pieces = args.kv_heads * args.pieces;
  const int64_t row = at / row_pieces;
  const int64_t slot = args.slots[row];
  if (slot < 0) return;
  const int in_row = static_cast<int>(at - row * row_pieces);
  const int head = in_row / args.pieces, piece = in_row % args.pieces;
  // The launcher has checked that every slot of the pool fits in 31 bits.
  const int page = static_cast<int>(slot) / args.exact_rows;
  const int page_row = static_cast<int>(slot) % args.exact_rows;
  std::byte* to = args.pages + (int64_t{page} * args.kv_heads + head) * args.page_bytes +
                  16 * args.pieces * page_row + device_exact_piece(page_row, piece);
  *reinterpret_cast<uint4*>(to) = args.k[at];
  *reinterpret_cast<uint4*>(to + 16 * args.pieces * args.exact_rows) = args.v[at];
}

}  // namespace

void kv_write(cudaStream_t stream, const KvWriteParams& params) {
  const KvLayout& layout = params.layer.layout;
  const int kv_heads = params.layer.kv_heads;
  const int64_t rows = params.k.empty() ? 0 : params.k.dim(0);
  if (rows == 0) return;
  CHECK(params.k.dtype() == DType::kF16 && params.v.dtype() == DType::kF16,
        "kv_write: k and v are f16");
  CHECK(params.k.dims() == 3 && params.k.dim(1) == kv_heads && params.k.dim(2) == layout.head_dim,
        "kv_write: k is [rows, kv_heads, head_dim]");
  CHECK(params.v.dims() == 3 && params.v.dim(0) == rows && params.v.dim(1) == kv_heads &&
            params.v.dim(2) == layout.head_dim,
        "kv_write: v has the shape of k");
  CHECK(layout.head_dim % 64 == 0, "kv_write: the pieces of a row are permuted in eights");
  CHECK(params.layer.num_pages * layout.exact_rows <= INT32_MAX, "kv_write: slots fit in 31 bits");
  WriteArgs args{};
  args.k = static_cast<const uint4*>(params.k.raw());
  args.v = static_cast<const uint4*>(params.v.raw());
  args.slots = params.slots;
  args.pages = params.layer.data;
  args.kv_heads = kv_heads;
  args.pieces = layout.head_dim / 8;
  args.exact_rows = layout.exact_rows;
  args.page_bytes = layout.page_bytes;
  args.num_pieces = rows * kv_heads * args.pieces;
  const auto blocks = static_cast<unsigned>((args.num_pieces + kThreads - 1) / kThreads);
  kv_write_kernel<<<blocks, kThreads, 0, stream>>>(args);
  CUDA_CHECK(cudaGetLastError());
}

}  // namespace kvarn::cuda
