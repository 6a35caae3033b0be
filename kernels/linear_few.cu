// y = x W^T for up to sixteen rows: a plain read of W with the tensor cores on the side.
//
// mma m16n8k8 has x as A and eight rows of W as B (PTX ISA, fragments of m16n8k8). The order of k
// within a product is free as long as A and B agree, so lane (g, q) = (lane / 4, lane % 4) loads 16
// contiguous bytes, k = 8q..8q+7 of row g of either, and these are its fragments of four products.
// Nothing is staged in shared memory: an element of W is used once.
//
// A warp keeps all its loads of W in flight: each register is loaded again, with what comes one
// round later (of the next columns, where these end), as soon as it has been used. W is requested
// before the kernel in front has ended (griddepcontrol.wait), x after.
#include <algorithm>

#include "kernels/cuda_check.h"
#include "kernels/device_overlap.cuh"
#include "kernels/device_vector.cuh"
#include "kernels/linear_few_cuda.h"

namespace kvarn::cuda {
namespace {

constexpr int kTile = 8;    // columns of y and rows of x of a product
constexpr int kChunk = 32;  // k of one 16-byte load by four lanes
constexpr int kMaxWarps = 16;
constexpr int kResidentWarps = 16;  // of a multiprocessor: 65,536 registers for up to 128 a thread
constexpr int kMaxParts = 3;

// 16-byte loads of a row of W in flight per lane: 8 in all, as far as there are registers for as
// many of each eight rows of x.
constexpr int chunks_of(int tiles, int row_blocks) { return tiles * row_blocks == 1 ? 8 : 4; }

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

struct Weight {
  const bf16* part[kMaxParts];  // [columns, k]
  int columns[kMaxParts];
  int first_column[kMaxParts];  // of y
  int first_tile[kMaxParts];    // a part begins a tile
};

struct Params {
  const bf16* x;  // [rows, k]
  Weight weight;
  void* y;  // [rows, y_columns]
  int rows, k, y_columns;
  int groups;      // tiles of y, the units of work of a block
  int iterations;  // over k
};

__device__ int part_of(const Weight& w, int tile) {
  int part = 0;
#pragma unroll
  for (int i = 1; i < kMaxParts; ++i) part += tile >= w.first_tile[i] ? 1 : 0;
  return part;
}

// 16 bytes, zeros where not `on`. Weights are constant and read once; x may have been written by
// the kernel in front and is read by every block.
#define KVARN_LOAD_IF(instruction, v, from, on)                      \
  asm volatile(                                                      \
      "{.reg .pred on; setp.ne.u32 on, %5, 0;"                       \
      " mov.b32 %0, 0; mov.b32 %1, 0; mov.b32 %2, 0; mov.b32 %3, 0;" \
      " @on " instruction " {%0, %1, %2, %3}, [%4];}"                \
      : "=&r"((v).x), "=&r"((v).y), "=&r"((v).z), "=&r"((v).w)       \
      : "l"(from), "r"(static_cast<uint32_t>(on)))
__device__ uint4 load_weight(const bf16* from, bool on) {
  uint4 v;
  KVARN_LOAD_IF("ld.global.nc.L1::no_allocate.v4.b32", v, from, on);
  return v;
}
__device__ uint4 load_if(const void* from, bool on) {
  uint4 v;
  KVARN_LOAD_IF("ld.global.v4.b32", v, from, on);
  return v;
}
#undef KVARN_LOAD_IF

// Adds the products of 32 k of eight rows of x with eight columns. A fragment of x has two words of
// each lane: one counts as row g, one as row g + 8, so of each product one half is of use: rows 0-7
// of `first`, rows 8-15 of `second`. The other halves are products of words that do not belong
// together, whatever they are.
__device__ void multiply(float (&first)[4], float (&second)[4], const uint4& x, const uint4& w) {
  const auto product = [](float(&sum)[4], uint32_t x0, uint32_t x1, uint32_t w0) {
    asm volatile(
        "mma.sync.aligned.m16n8k8.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5}, {%6},"
        " {%0, %1, %2, %3};"
        : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
        : "r"(x0), "r"(x1), "r"(w0));
  };
  product(first, x.x, x.y, w.x);
  product(second, x.x, x.y, w.y);
  product(first, x.z, x.w, w.z);
  product(second, x.z, x.w, w.w);
}

// Keeps the compiler from splitting the address into one register pair for each access.
template <typename T>
__device__ const T* as_one_address(const T* p) {
  asm volatile("" : "+l"(p));
  return p;
}

template <int kRowBlocks, LinearResult kResult, typename Y>
__global__ void __launch_bounds__(kMaxWarps * 32)
    few_rows_kernel(const __grid_constant__ Params p) {
  constexpr int kTiles = kResult == LinearResult::kSiluMul ? 2 : 1;
  constexpr int kRows = kRowBlocks * kTile;
  constexpr int kChunks = chunks_of(kTiles, kRowBlocks);
  constexpr int kWarpK = kChunks * kChunk;
  // Two, so that one barrier a group is enough: the sums of a group are read before the next
  // group's barrier, and written again only after it.
  __shared__ float shared[2][kMaxWarps][kRows][kTiles * kTile];

  const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32;
  const int warps = static_cast<int>(blockDim.x) / 32;
  const int g = lane / 4, q = lane % 4;
  const bf16* row[kTiles];  // this lane's of W
  const auto take_group = [&](int group) {
#pragma unroll
    for (int t = 0; t < kTiles; ++t) {
      const int tile = group + t * p.groups;  // the up tiles follow the gate's
      const int part = part_of(p.weight, tile);
      // Columns that are none repeat the last one; nobody reads their sums.
      const int r = min((tile - p.weight.first_tile[part]) * kTile + g, p.weight.columns[part] - 1);
      row[t] = p.weight.part[part] + int64_t{r} * p.k;
    }
  };

  uint4 w[kTiles][kChunks], x[kRowBlocks][kChunks];
  const int first_k = warp * kWarpK + q * 8, step_k = warps * kWarpK;
  int group = static_cast<int>(blockIdx.x);

  // x from `k` on; `left` elements of a row are left there.
  const auto take_x = [&](int k, int left) {
#pragma unroll
    for (int b = 0; b < kRowBlocks; ++b) {
      const bf16* from = as_one_address(p.x + (b * kTile + g) * p.k + k);
      const int here = b * kTile + g < p.rows ? left : 0;
#pragma unroll
      for (int c = 0; c < kChunks; ++c) x[b][c] = load_if(from + c * kChunk, here > c * kChunk);
    }
  };

  let_next_kernel_begin();
  take_group(group);
#pragma unroll
  for (int t = 0; t < kTiles; ++t) {
    const bf16* from = as_one_address(row[t] + first_k);
#pragma unroll
    for (int c = 0; c < kChunks; ++c) {
      w[t][c] = load_weight(from + c * kChunk, p.k - first_k > c * kChunk);
    }
  }
  wait_for_kernel_in_front();
  take_x(first_k, p.k - first_k);

  for (int buffer = 0; group < p.groups; buffer ^= 1) {
    const int next_group = group + static_cast<int>(gridDim.x);
    float first[kRowBlocks][kTiles][4] = {}, second[kRowBlocks][kTiles][4] = {};
    for (int i = 0; i < p.iterations; ++i) {
      int next_k = first_k + (i + 1) * step_k;
      int end = p.k;
      if (i + 1 == p.iterations) {
        next_k = first_k;
        if (next_group < p.groups) {
          take_group(next_group);
        } else {
          end = 0;
        }
      }
      const int left = end - next_k;  // of a row from there on
      const bf16* from[kTiles];
#pragma unroll
      for (int t = 0; t < kTiles; ++t) from[t] = as_one_address(row[t] + next_k);
#pragma unroll
      for (int c = 0; c < kChunks; ++c) {
#pragma unroll
        for (int t = 0; t < kTiles; ++t) {
#pragma unroll
          for (int b = 0; b < kRowBlocks; ++b) {
            multiply(first[b][t], second[b][t], x[b][c], w[t][c]);
          }
          w[t][c] = load_weight(from[t] + c * kChunk, left > c * kChunk);
        }
      }
      take_x(next_k, left);
    }

    // Lane (g, q) holds columns 2q and 2q + 1 of row g.
#pragma unroll
    for (int b = 0; b < kRowBlocks; ++b) {
#pragma unroll
      for (int t = 0; t < kTiles; ++t) {
        *reinterpret_cast<float2*>(&shared[buffer][warp][b * kTile + g][t * kTile + 2 * q]) =
            make_float2(first[b][t][0] + second[b][t][2], first[b][t][1] + second[b][t][3]);
      }
    }
    __syncthreads();
    for (int i = static_cast<int>(threadIdx.x); i < p.rows * kTile;
         i += static_cast<int>(blockDim.x)) {
      const int r = i / kTile, column = i % kTile, part = part_of(p.weight, group);
      const int in_part = (group - p.weight.first_tile[part]) * kTile + column;
      if (in_part >= p.weight.columns[part]) continue;
      float total[kTiles] = {};
#pragma unroll  // all loads at once: one after another they would take 0.2 us
      for (int j = 0; j < kMaxWarps; ++j) {
        if (j >= warps) continue;
#pragma unroll
        for (int t = 0; t < kTiles; ++t) total[t] += shared[buffer][j][r][t * kTile + column];
      }
      Y* y =
          static_cast<Y*>(p.y) + int64_t{r} * p.y_columns + p.weight.first_column[part] + in_part;
      float value = total[0];
      if constexpr (kResult == LinearResult::kSiluMul) {
        value = value / (1.f + expf(-value)) * total[kTiles - 1];
      }
      if constexpr (kResult == LinearResult::kAdd) value += *y;
      if constexpr (sizeof(Y) == 2) {
        y->bits = static_cast<uint16_t>(pack_bf16(value, 0.f));
      } else {
        *y = value;
      }
    }
    group = next_group;
  }
}

template <int kRowBlocks, LinearResult kResult, typename Y>
void launch(cudaStream_t stream, const Params& params, const FewRowsPlan& plan, bool overlap) {
  const LaunchConfig config(stream,
                            static_cast<unsigned>(std::min<int64_t>(plan.blocks, params.groups)),
                            static_cast<unsigned>(plan.warps * 32), overlap);
  CUDA_CHECK(cudaLaunchKernelEx(&config.value, few_rows_kernel<kRowBlocks, kResult, Y>, params));
}

template <int kRowBlocks>
void launch_result(cudaStream_t stream, const Params& params, LinearResult result, DType y_dtype,
                   const FewRowsPlan& plan, bool overlap) {
  using enum LinearResult;
  switch (result) {
    case kSiluMul:
      return launch<kRowBlocks, kSiluMul, bf16>(stream, params, plan, overlap);
    case kAdd:
      return launch<kRowBlocks, kAdd, float>(stream, params, plan, overlap);
    case kStore:
      if (y_dtype == DType::kF32) {
        return launch<kRowBlocks, kStore, float>(stream, params, plan, overlap);
      }
      return launch<kRowBlocks, kStore, bf16>(stream, params, plan, overlap);
  }
}

int64_t warp_k(int64_t rows, LinearResult result) {
  return kChunk * chunks_of(result == LinearResult::kSiluMul ? 2 : 1, rows <= kTile ? 1 : 2);
}

}  // namespace

FewRowsPlan few_rows_plan(int64_t rows, int64_t n, int64_t k, LinearResult result,
                          int multiprocessors) {
  const int64_t groups = ceil_div(result == LinearResult::kSiluMul ? n / 2 : n, kTile);
  const int64_t shares = ceil_div(k, warp_k(rows, result));  // of k, one a warp and iteration
  const int64_t per_sm = ceil_div(groups, multiprocessors);  // blocks, one after another or at once
  const auto resident = [](int64_t warps) { return kResidentWarps / warps; };
  // Shares of k, real or not, that a multiprocessor has time for until its last block ends: what is
  // lost where the warps divide k badly or the last round of blocks is not full. Blocks that follow
  // each other without prefetching anything of their own lose about 6 % (measured on an H100).
  const auto cost = [&](int64_t warps) {
    const int64_t iterations = ceil_div(shares, warps);
    const int64_t rounds = ceil_div(per_sm, resident(warps));
    const int64_t blocks = rounds * std::min(per_sm, resident(warps));
    return static_cast<double>(blocks * warps * iterations) *
           (rounds > 1 && iterations == 1 ? 1.06 : 1.0);
  };
  // A block that has a multiprocessor to itself may take all of it. Of equals the larger is faster.
  const int most = per_sm <= 1 ? kMaxWarps : 8;
  int best = 4;
  for (int warps = 5; warps <= most; ++warps) {
    if (cost(warps) <= cost(best)) best = warps;
  }
  best = static_cast<int>(std::clamp<int64_t>(shares, 1, best));
  // From nine rows on a block takes several groups, the next one's loads in flight while it ends
  // one: 114 for 151 us (head of 0.6B on an H100). For fewer rows the hardware's distribution of
  // single groups is faster by 1 to 5 %.
  return {best, rows <= kTile ? groups : std::min(groups, resident(best) * multiprocessors)};
}

void linear_few_rows(cudaStream_t stream, Tensor x, const LinearWeight& weight, Tensor y,
                     LinearResult result, const FewRowsPlan& plan, bool overlap) {
  CHECK(x.dims() == 2 && x.dtype() == DType::kBF16, "x is bf16 [rows, k]");
  const int64_t rows = x.dim(0), k = x.dim(1), n = weight.out_features();
  CHECK(rows <= kFewRows, "at most sixteen rows");
  CHECK(k % 8 == 0, "rows are read by eights: k must be a multiple of 8");
  CHECK(reinterpret_cast<uintptr_t>(x.raw()) % 16 == 0, "x is aligned to 16 bytes");
  CHECK(weight.num_parts >= 1 && weight.num_parts <= kMaxParts, "one to three parts");
  CHECK(y.dims() == 2 && y.dim(0) == rows, "y has a row for each of x");
  CHECK(plan.warps >= 1 && plan.warps <= kMaxWarps && plan.blocks >= 1, "a plan within the limits");
  if (rows == 0 || n == 0) return;

  Params params{};
  params.x = x.data<bf16>();
  params.y = y.raw();
  params.rows = static_cast<int>(rows);
  params.k = static_cast<int>(k);
  params.y_columns = static_cast<int>(y.dim(1));
  int column = 0;
  for (int i = 0; i < kMaxParts; ++i) {
    params.weight.first_tile[i] = i < weight.num_parts ? params.groups : INT32_MAX;
    if (i >= weight.num_parts) continue;
    const Tensor& part = weight.parts[static_cast<size_t>(i)];
    CHECK(part.dims() == 2 && part.dim(1) == k && part.dtype() == DType::kBF16,
          "the weight is bf16 [n, k]");
    CHECK(reinterpret_cast<uintptr_t>(part.raw()) % 16 == 0, "weights are aligned to 16 bytes");
    params.weight.part[i] = part.data<bf16>();
    params.weight.columns[i] = static_cast<int>(part.dim(0));
    params.weight.first_column[i] = column;
    column += static_cast<int>(part.dim(0));
    params.groups += static_cast<int>(ceil_div(part.dim(0), kTile));
  }
  params.iterations = static_cast<int>(ceil_div(k, plan.warps * warp_k(rows, result)));
  switch (result) {
    case LinearResult::kSiluMul:
      CHECK(n % (2 * kTile) == 0, "gate and up are whole tiles");
      CHECK(weight.num_parts == 1 || (weight.num_parts == 2 && 2 * weight.parts[0].dim(0) == n),
            "gate and up are one matrix or two equal ones");
      CHECK(y.dtype() == DType::kBF16 && 2 * y.dim(1) == n, "y is bf16 [rows, ffn]");
      params.groups /= 2;
      break;
    case LinearResult::kAdd:
      CHECK(y.dtype() == DType::kF32 && y.dim(1) == n, "the residual is f32 [rows, n]");
      break;
    case LinearResult::kStore:
      CHECK((y.dtype() == DType::kBF16 || y.dtype() == DType::kF32) && y.dim(1) == n,
            "y is bf16 or f32 [rows, n]");
      break;
  }
  const auto launcher = rows <= kTile ? launch_result<1> : launch_result<2>;
  launcher(stream, params, result, y.dtype(), plan, overlap);
}

}  // namespace kvarn::cuda
