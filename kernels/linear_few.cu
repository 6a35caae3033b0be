// y = x W^T for up to eight rows: a plain read of W with the tensor cores on the side.
//
// mma m16n8k8 has x as A and eight rows of W as B (PTX ISA, fragments of m16n8k8). The order of k
// within a product is free as long as A and B agree, so lane (g, q) = (lane / 4, lane % 4) loads 16
// contiguous bytes, k = 8q..8q+7 of row g of either, and these are its fragments of four products.
// Nothing is staged in shared memory: an element of W is used once.
//
// A warp keeps kLoads 16-byte loads of W in flight: each register is loaded again, with what comes
// kLoads loads later (of the next tile, where this one ends), as soon as it has been used. W is
// requested before the kernel in front has ended (griddepcontrol.wait), x after.
#include <algorithm>

#include "kernels/cuda_check.h"
#include "kernels/device_vector.cuh"
#include "kernels/linear_few_cuda.h"

namespace kvarn::cuda {
namespace {

constexpr int kTileColumns = 8;  // rows of W in a tile: columns of y
constexpr int kChunk = 32;       // k of one 16-byte load by four lanes
constexpr int kLoads = 8;        // in flight per lane
constexpr int kMaxWarps = 16;
constexpr int kMaxTiles = 2;
constexpr int kMaxParts = 3;

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
  int tiles;       // of the weight; of the gate alone for kSiluMul
  int groups;      // units of work of a block: kTiles tiles each
  int iterations;  // over k
};

// The part and the first column of a tile.
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
__device__ uint4 load_x(const bf16* from, bool on) {
  uint4 v;
  KVARN_LOAD_IF("ld.global.v4.b32", v, from, on);
  return v;
}

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
__device__ const bf16* as_one_address(const bf16* p) {
  asm volatile("" : "+l"(p));
  return p;
}

// The kernel in front has ended and its writes are visible. Nothing to wait for without overlap.
__device__ void wait_for_kernel_in_front() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}
__device__ void let_next_kernel_begin() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;");
#endif
}

template <int kTiles, LinearResult kResult, typename Y>
__global__ void __launch_bounds__(kMaxWarps * 32)
    few_rows_kernel(const __grid_constant__ Params p) {
  constexpr int kChunks = kLoads / kTiles;
  constexpr int kWarpK = kChunks * kChunk;
  constexpr int kGroupColumns = kTiles * kTileColumns;
  // Two, so that one barrier a group is enough: the sums of a group are read before the next
  // group's barrier, and written again only after it.
  __shared__ float shared[2][kMaxWarps][kFewRows][kGroupColumns];

  const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32;
  const int warps = static_cast<int>(blockDim.x) / 32;
  const int g = lane / 4, q = lane % 4;
  const auto tile_of = [&](int group, int t) {
    // The up tiles follow the gate's.
    const int tile = kResult == LinearResult::kSiluMul ? group + t * p.tiles : group * kTiles + t;
    return kResult == LinearResult::kSiluMul ? tile : min(tile, p.tiles - 1);
  };
  const bf16* row[kTiles];  // this lane's of each tile
  const auto take_group = [&](int group) {
#pragma unroll
    for (int t = 0; t < kTiles; ++t) {
      const int tile = tile_of(group, t), part = part_of(p.weight, tile);
      // Columns that are none repeat the last one; nobody reads their sums.
      const int r =
          min((tile - p.weight.first_tile[part]) * kTileColumns + g, p.weight.columns[part] - 1);
      row[t] = p.weight.part[part] + int64_t{r} * p.k;
    }
  };

  uint4 w[kTiles][kChunks], x[kChunks];
  const int first_k = warp * kWarpK + q * 8, step_k = warps * kWarpK;
  const bf16* x_row = p.x + g * p.k;
  const bool has_row = g < p.rows;
  int group = static_cast<int>(blockIdx.x);

  let_next_kernel_begin();
  take_group(group);
#pragma unroll
  for (int t = 0; t < kTiles; ++t) {
    const bf16* from = as_one_address(row[t] + first_k);
#pragma unroll
    for (int c = 0; c < kChunks; ++c) {
      w[t][c] = load_weight(from + c * kChunk, c * kChunk < p.k - first_k);
    }
  }
  wait_for_kernel_in_front();
  const int x_k = has_row ? p.k : 0;  // where this lane's row of x ends
  const bf16* x_from = as_one_address(x_row + first_k);
#pragma unroll
  for (int c = 0; c < kChunks; ++c) x[c] = load_x(x_from + c * kChunk, c * kChunk < x_k - first_k);

  for (int buffer = 0; group < p.groups; buffer ^= 1) {
    const int next_group = group + static_cast<int>(gridDim.x);
    float first[kTiles][4] = {}, second[kTiles][4] = {};
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
      const int left = end - next_k, x_left = has_row ? left : 0;  // of a row from there on
      const bf16* from[kTiles];
#pragma unroll
      for (int t = 0; t < kTiles; ++t) from[t] = as_one_address(row[t] + next_k);
      x_from = as_one_address(x_row + next_k);
#pragma unroll
      for (int c = 0; c < kChunks; ++c) {
#pragma unroll
        for (int t = 0; t < kTiles; ++t) {
          multiply(first[t], second[t], x[c], w[t][c]);
          w[t][c] = load_weight(from[t] + c * kChunk, left > c * kChunk);
        }
        x[c] = load_x(x_from + c * kChunk, x_left > c * kChunk);
      }
    }

    if (has_row) {  // lane (g, q) holds columns 2q and 2q + 1 of row g
#pragma unroll
      for (int t = 0; t < kTiles; ++t) {
        *reinterpret_cast<float2*>(&shared[buffer][warp][g][t * kTileColumns + 2 * q]) =
            make_float2(first[t][0] + second[t][2], first[t][1] + second[t][3]);
      }
    }
    __syncthreads();
    const auto total = [&](int r, int column) {
      float s = 0.f;
      for (int i = 0; i < warps; ++i) s += shared[buffer][i][r][column];
      return s;
    };
    constexpr int kResultColumns = kResult == LinearResult::kSiluMul ? kTileColumns : kGroupColumns;
    for (int i = static_cast<int>(threadIdx.x); i < p.rows * kResultColumns;
         i += static_cast<int>(blockDim.x)) {
      const int r = i / kResultColumns, column = i % kResultColumns;
      const int t = column / kTileColumns;
      if (kResult != LinearResult::kSiluMul && group * kTiles + t >= p.tiles) continue;
      const int tile = tile_of(group, t), part = part_of(p.weight, tile);
      const int in_part = (tile - p.weight.first_tile[part]) * kTileColumns + column % kTileColumns;
      if (in_part >= p.weight.columns[part]) continue;
      Y* y =
          static_cast<Y*>(p.y) + int64_t{r} * p.y_columns + p.weight.first_column[part] + in_part;
      float value = total(r, column);
      if constexpr (kResult == LinearResult::kSiluMul) {
        value = value / (1.f + expf(-value)) * total(r, column + kTileColumns);
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

template <int kTiles, LinearResult kResult, typename Y>
void launch(cudaStream_t stream, const Params& params, const FewRowsPlan& plan, bool overlap) {
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = static_cast<unsigned>(std::min<int64_t>(plan.blocks, params.groups));
  config.blockDim = static_cast<unsigned>(plan.warps * 32);
  config.stream = stream;
  config.attrs = &attribute;
  config.numAttrs = overlap ? 1 : 0;
  CUDA_CHECK(cudaLaunchKernelEx(&config, few_rows_kernel<kTiles, kResult, Y>, params));
}

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

}  // namespace

FewRowsPlan few_rows_plan(int64_t n, int64_t k, LinearResult result, int multiprocessors) {
  const int tiles = result == LinearResult::kSiluMul ? 2 : 1;
  const int64_t warp_k = int64_t{kLoads / tiles} * kChunk;
  const auto warps = static_cast<int>(std::clamp<int64_t>(ceil_div(k, warp_k), 4, 8));
  (void)multiprocessors;
  return {tiles, warps, ceil_div(n, kTileColumns)};
}

void linear_few_rows(cudaStream_t stream, Tensor x, const LinearWeight& weight, Tensor y,
                     LinearResult result, const FewRowsPlan& plan, bool overlap) {
  const int64_t rows = x.dim(0), k = x.dim(1), n = weight.out_features();
  CHECK(x.dims() == 2 && x.dtype() == DType::kBF16, "x is bf16 [rows, k]");
  CHECK(rows <= kFewRows, "at most eight rows");
  CHECK(k % 8 == 0, "rows are read by eights: k must be a multiple of 8");
  CHECK(reinterpret_cast<uintptr_t>(x.raw()) % 16 == 0, "x is aligned to 16 bytes");
  CHECK(weight.num_parts >= 1 && weight.num_parts <= kMaxParts, "one to three parts");
  CHECK(y.dims() == 2 && y.dim(0) == rows, "y has a row for each of x");
  CHECK(plan.tiles >= 1 && plan.tiles <= kMaxTiles && plan.warps >= 1 && plan.warps <= kMaxWarps,
        "a plan within the limits");
  if (rows == 0 || n == 0) return;

  Params params{};
  params.x = x.data<bf16>();
  params.y = y.raw();
  params.rows = static_cast<int>(rows);
  params.k = static_cast<int>(k);
  int tile = 0, column = 0;
  for (int i = 0; i < kMaxParts; ++i) {
    const auto at = static_cast<size_t>(i);
    params.weight.first_tile[i] = i < weight.num_parts ? tile : INT32_MAX;
    if (i >= weight.num_parts) continue;
    const Tensor& part = weight.parts[at];
    CHECK(part.dims() == 2 && part.dim(1) == k && part.dtype() == DType::kBF16,
          "the weight is bf16 [n, k]");
    CHECK(reinterpret_cast<uintptr_t>(part.raw()) % 16 == 0, "weights are aligned to 16 bytes");
    params.weight.part[i] = part.data<bf16>();
    params.weight.columns[i] = static_cast<int>(part.dim(0));
    params.weight.first_column[i] = column;
    column += static_cast<int>(part.dim(0));
    tile += static_cast<int>(ceil_div(part.dim(0), kTileColumns));
  }
  if (result == LinearResult::kSiluMul) {
    CHECK(plan.tiles == 2 && tile % 2 == 0 && n % (2 * kTileColumns) == 0,
          "gate and up are whole tiles");
    CHECK(weight.num_parts == 1 || (weight.num_parts == 2 && 2 * weight.parts[0].dim(0) == n),
          "gate and up are one matrix or two equal ones");
    CHECK(y.dtype() == DType::kBF16 && 2 * y.dim(1) == n, "y is bf16 [rows, ffn]");
    tile /= 2;
  } else {
    CHECK(y.dim(1) == n, "y has a column for each row of the weight");
  }
  params.y_columns = static_cast<int>(y.dim(1));
  params.tiles = tile;
  params.groups =
      static_cast<int>(result == LinearResult::kSiluMul ? tile : ceil_div(tile, plan.tiles));
  params.iterations =
      static_cast<int>(ceil_div(k, int64_t{plan.warps} * (kLoads / plan.tiles) * kChunk));

  using enum LinearResult;
  const bool two = plan.tiles == 2;
  if (result == kSiluMul) return launch<2, kSiluMul, bf16>(stream, params, plan, overlap);
  if (result == kAdd) {
    CHECK(y.dtype() == DType::kF32, "only f32 is added to");
    return two ? launch<2, kAdd, float>(stream, params, plan, overlap)
               : launch<1, kAdd, float>(stream, params, plan, overlap);
  }
  switch (y.dtype()) {
    case DType::kBF16:
      return two ? launch<2, kStore, bf16>(stream, params, plan, overlap)
                 : launch<1, kStore, bf16>(stream, params, plan, overlap);
    case DType::kF32:
      return two ? launch<2, kStore, float>(stream, params, plan, overlap)
                 : launch<1, kStore, float>(stream, params, plan, overlap);
    default:
      CHECK(false, "linear gives bf16 or f32");
  }
}

}  // namespace kvarn::cuda
