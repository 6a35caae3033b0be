// Prefill attention for every GPU with mma.m16n8k16 (compute capability 8.0 on): online softmax
// over key tiles of 64 rows, after FlashAttention-2 (arXiv 2307.08691). A thread block of 4 warps
// takes one query tile and head; a warp owns 32 queries, so each key fragment serves two MMAs.
//
// Shared memory holds rows of 256 bytes whose 16-byte pieces are permuted by XOR with row & 7, so
// that ldmatrix meets every bank once. K and V have two slots each, filled by cp.async one key tile
// ahead. Masked scores are -inf; key rows that the sequence does not have are zeros.
#include <cuda_fp16.h>

#include "kernels/attention_prefill_device.cuh"
#include "kernels/cuda_check.h"

namespace kvarn::cuda::prefill {
namespace {

constexpr int kWarps = 4, kThreads = 32 * kWarps;
constexpr int kKeys = 64;              // rows of a key tile here: half a block
constexpr int kPieces = kHeadDim / 8;  // 16-byte pieces of a row
constexpr int kRowTiles = 2;           // m16 tiles of a warp

struct Shared {
  uint4 q[kTile * kPieces];
  uint4 k[2][kKeys * kPieces];
  uint4 v[2][kKeys * kPieces];
};

__device__ uint32_t shared_address(const void* p) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}
__device__ uint32_t piece_address(const uint4* tile, int row, int piece) {
  return shared_address(tile + row * kPieces + (piece ^ (row & 7)));
}
// Copies 16 bytes, or zeros when `valid` is false (`from` must be an address all the same).
__device__ void copy_async(uint32_t to, const void* from, bool valid) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from),
               "r"(valid ? 16 : 0)
               : "memory");
}
__device__ void commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int kLeft>
__device__ void wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kLeft) : "memory");
}
__device__ void load_matrices(uint32_t (&to)[4], uint32_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
               : "r"(address)
               : "memory");
}
__device__ void load_matrices_transposed(uint32_t (&to)[4], uint32_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
               : "r"(address)
               : "memory");
}
__device__ void multiply(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
      "{%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// Rows [0, rows) of a matrix with `stride` halves between rows; rows from `valid` on become zeros.
__device__ void copy_tile(uint4* to, const __half* from, int64_t stride, int rows, int valid) {
  for (int i = threadIdx.x; i < rows * kPieces; i += kThreads) {
    const int row = i / kPieces, piece = i % kPieces;
    const bool there = row < valid;
    copy_async(piece_address(to, row, piece), from + (there ? row * stride : 0) + piece * 8, there);
  }
}

__global__ __launch_bounds__(kThreads, 2) void attend_kernel(const __grid_constant__ Arguments a) {
  extern __shared__ uint4 memory[];
  Shared& s = *reinterpret_cast<Shared*>(memory);
  const QueryTile tile = a.query_tiles[blockIdx.x / a.q_heads];
  const int head = blockIdx.x % a.q_heads, kv_head = head / (a.q_heads / a.kv_heads);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, q = lane % 4;
  const int64_t kv_stride = int64_t{a.kv_heads} * kHeadDim,
                q_stride = int64_t{a.q_heads} * kHeadDim;
  const int own = own_block(tile), late = first_in_block(tile);
  // The last key that any query sees is key late + rows - 1 of its own block.
  const int steps = 2 * own + (late + tile.rows + kKeys - 1) / kKeys;

  const auto copy_keys = [&](uint4* to, const void* scratch, const void* rows, int step) {
    const int block = step / 2;
    const bool direct = from_rows(tile, block, a.chunk_exact);
    const int skipped = step % 2 * kKeys;
    const int valid = direct && block == own ? tile.rows - skipped : kKeys;
    const int64_t row = row_of_block(tile, block, direct) + skipped;
    copy_tile(
        to,
        static_cast<const __half*>(direct ? rows : scratch) + row * kv_stride + kv_head * kHeadDim,
        kv_stride, kKeys, valid);
  };
  copy_tile(s.q, static_cast<const __half*>(a.q) + tile.first_row * q_stride + head * kHeadDim,
            q_stride, kTile, tile.rows);
  copy_keys(s.k[0], a.k_scratch, a.k_rows, 0);
  commit();
  copy_keys(s.v[0], a.v_scratch, a.v_rows, 0);
  commit();

  float acc[kRowTiles][kHeadDim / 8][4] = {};
  float top[kRowTiles][2], sum[kRowTiles][2] = {};  // maximum of scores; of this lane's weights
  for (int t = 0; t < kRowTiles; ++t) top[t][0] = top[t][1] = -INFINITY;
  const float scale = a.scale * 1.4426950408889634f;  // powers of 2 instead of e

  for (int step = 0; step < steps; ++step) {
    wait<1>();  // K has arrived, V may be on its way
    __syncthreads();
    if (step + 1 < steps) copy_keys(s.k[(step + 1) % 2], a.k_scratch, a.k_rows, step + 1);
    commit();
    float score[kRowTiles][kKeys / 8][4] = {};
#pragma unroll
    for (int depth = 0; depth < kHeadDim / 16; ++depth) {
      uint32_t query[kRowTiles][4];
#pragma unroll
      for (int t = 0; t < kRowTiles; ++t) {
        load_matrices(query[t],
                      piece_address(s.q, 32 * warp + 16 * t + lane % 16, 2 * depth + lane / 16));
      }
#pragma unroll
      for (int n = 0; n < kKeys / 16; ++n) {  // 16 keys: two n8 tiles
        uint32_t key[4];
        load_matrices(key, piece_address(s.k[step % 2], 16 * n + lane % 8 + lane / 16 * 8,
                                         2 * depth + lane / 8 % 2));
#pragma unroll
        for (int t = 0; t < kRowTiles; ++t) {
          multiply(score[t][2 * n], query[t], key[0], key[1]);
          multiply(score[t][2 * n + 1], query[t], key[2], key[3]);
        }
      }
    }
    if (step >= 2 * own) {  // causal: key index <= query index
#pragma unroll
      for (int t = 0; t < kRowTiles; ++t) {
#pragma unroll
        for (int i = 0; i < kKeys / 2; ++i) {
          const int key = step % 2 * kKeys + i / 4 * 8 + 2 * q + i % 2;
          const int query = late + 32 * warp + 16 * t + g + i / 2 % 2 * 8;
          if (key > query) score[t][i / 4][i % 4] = -INFINITY;
        }
      }
    }
    uint32_t weight[kRowTiles][kKeys / 16][4];
#pragma unroll
    for (int t = 0; t < kRowTiles; ++t) {
#pragma unroll
      for (int r = 0; r < 2; ++r) {  // rows g and g + 8
        float best = top[t][r];
#pragma unroll
        for (int j = 0; j < kKeys / 8; ++j)
          best = fmaxf(best, fmaxf(score[t][j][2 * r], score[t][j][2 * r + 1]));
        best = quad_max(best);
        // Every row sees key 0 of block 0, which comes first, so `best` is finite.
        const float keep = exp2_approx((top[t][r] - best) * scale);
        const float shift = best * scale;
        top[t][r] = best;
        float total = sum[t][r] * keep;
#pragma unroll
        for (int j = 0; j < kKeys / 8; ++j) {
          const float x = exp2_approx(fmaf(score[t][j][2 * r], scale, -shift));
          const float y = exp2_approx(fmaf(score[t][j][2 * r + 1], scale, -shift));
          total += x + y;
          weight[t][j / 2][j % 2 * 2 + r] = pack_half2(x, y);
        }
        sum[t][r] = total;
#pragma unroll
        for (int j = 0; j < kHeadDim / 8; ++j) {
          acc[t][j][2 * r] *= keep;
          acc[t][j][2 * r + 1] *= keep;
        }
      }
    }
    wait<1>();  // V has arrived
    __syncthreads();
    if (step + 1 < steps) copy_keys(s.v[(step + 1) % 2], a.v_scratch, a.v_rows, step + 1);
    commit();
#pragma unroll
    for (int depth = 0; depth < kKeys / 16; ++depth) {
#pragma unroll
      for (int n = 0; n < kHeadDim / 16; ++n) {
        uint32_t value[4];
        load_matrices_transposed(
            value, piece_address(s.v[step % 2], 16 * depth + lane % 16, 2 * n + lane / 16));
#pragma unroll
        for (int t = 0; t < kRowTiles; ++t) {
          multiply(acc[t][2 * n], weight[t][depth], value[0], value[1]);
          multiply(acc[t][2 * n + 1], weight[t][depth], value[2], value[3]);
        }
      }
    }
  }

  const float back = a.rotate ? rsqrtf(static_cast<float>(kHeadDim)) : 1.0f;
#pragma unroll
  for (int t = 0; t < kRowTiles; ++t) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      float o[kHeadDim / 4];
      const float factor = back / quad_sum(sum[t][r]);
#pragma unroll
      for (int i = 0; i < kHeadDim / 4; ++i) o[i] = acc[t][i / 2][2 * r + i % 2] * factor;
      if (a.rotate) rotate_back(o, q);
      const int row = 32 * warp + 16 * t + g + 8 * r;
      if (row >= tile.rows) continue;
      auto* out = static_cast<__nv_bfloat16*>(a.out) + (tile.first_row + row) * q_stride +
                  head * kHeadDim + 2 * q;
#pragma unroll
      for (int j = 0; j < kHeadDim / 8; ++j)
        *reinterpret_cast<uint32_t*>(out + 8 * j) = pack_bf162(o[2 * j], o[2 * j + 1]);
    }
  }
}

}  // namespace

void launch_mma(cudaStream_t stream, const Arguments& arguments) {
  if (arguments.num_query_tiles == 0) return;
  CUDA_CHECK(cudaFuncSetAttribute(attend_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                  static_cast<int>(sizeof(Shared))));
  const auto grid = static_cast<unsigned>(arguments.num_query_tiles * arguments.q_heads);
  attend_kernel<<<grid, kThreads, sizeof(Shared), stream>>>(arguments);
  CUDA_CHECK(cudaGetLastError());
}

}  // namespace kvarn::cuda::prefill
