// Prefill attention for compute capability 9.0 (code for sm_90a), after FlashAttention-3 (arXiv
// 2407.08608): a producer thread copies tiles by TMA, two warp groups of 64 queries each multiply
// them with wgmma. While one group's products run, the other one computes its softmax (turns), and
// within a group the scores of the next key tile are computed under the softmax of this one.
// PTX ISA: "Asynchronous Warpgroup Level Matrix Multiply-Accumulate", "mbarrier", "cp.async.bulk".
//
// Blocks are persistent: each takes the next (query tile, head) from a counter, longest first.
// A query tile's own block comes first, so that every row has a finite maximum from then on; then
// the earlier blocks in order, so that blocks of the grid share them in L2.
//
// Shared memory holds tiles of 128 rows as two halves of 64 columns: rows of 128 bytes in the
// 128-byte CU_TENSOR_MAP_SWIZZLE_128B, which TMA writes and wgmma reads.
#include <cuda.h>
#include <cuda_fp16.h>

#include <algorithm>
#include <stdexcept>

#include "kernels/attention_prefill_device.cuh"
#include "kernels/attention_prefill_wgmma.cuh"
#include "kernels/cuda_check.h"

namespace kvarn::cuda::prefill {
namespace {

constexpr int kGroups = 2;                                    // warp groups that multiply
[[maybe_unused]] constexpr int kGroupRows = kTile / kGroups;  // queries of one
constexpr int kThreads = 128 * (1 + kGroups);                 // group 0 produces
constexpr int kStages = 2;        // key tiles in flight, of K and of V each
constexpr int kHalfColumns = 64;  // 128 bytes: the widest swizzle
constexpr int kHalfTile = kTile * kHalfColumns;
[[maybe_unused]] constexpr uint32_t kTileBytes = 2 * kTile * kHeadDim;
[[maybe_unused]] constexpr int kConsumerWarps = 4 * kGroups;
// Registers a thread: a block starts with 168 each, and its groups share these 64,512.
constexpr int kProducerRegisters = 40, kConsumerRegisters = 232;
static_assert(128 * kProducerRegisters + 128 * kGroups * kConsumerRegisters == kThreads * 168);

struct TensorMaps {
  CUtensorMap q, k_rows, v_rows, k_scratch, v_scratch;
};

struct Shared {
  __half q[2][2][kHalfTile];  // [slot][half]; at the end of a tile its output
  __half k[kStages][2][kHalfTile];
  __half v[kStages][2][kHalfTile];
  uint64_t q_full[2], q_empty[2];
  uint64_t k_full[kStages], k_empty[kStages], v_full[kStages], v_empty[kStages];
  QueryTile tile[2];  // of the slot of q
  int head[2];        // -1: no more
};
constexpr size_t kSharedBytes = sizeof(Shared) + 1024;  // the swizzle needs tiles at 1024 bytes

#ifdef __CUDA_ARCH_FEAT_SM90_ALL

// Barriers of some of the warps, by number; 0 is __syncthreads().
constexpr int kTurnBarrier = 1;    // + group: this group may issue its products
constexpr int kValuesBarrier = 3;  // both groups
constexpr int kOutputBarrier = 4;  // + group

__device__ void copy_tile(__half (&to)[2][kHalfTile], const CUtensorMap& map, uint64_t& barrier,
                          int head, int row) {
  expect_bytes(barrier, kTileBytes);
  copy_box(to[0], map, barrier, head * kHeadDim, row);
  copy_box(to[1], map, barrier, head * kHeadDim + kHalfColumns, row);
}

struct Softmax {
  float top[2], sum[2], keep[2];  // of rows g and g + 8; `sum` of this lane's columns

  // Scores to weights; `keep`: the factor of everything summed before.
  __device__ void update(float (&s)[64], float scale) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      float best = top[r];
#pragma unroll
      for (int j = 0; j < 16; ++j)
        best = fmaxf(best, fmaxf(s[4 * j + 2 * r], s[4 * j + 2 * r + 1]));
      best = quad_max(best);
      keep[r] = exp2_approx((top[r] - best) * scale);
      top[r] = best;
      const float shift = best * scale;
      float even = 0, odd = 0;
#pragma unroll
      for (int j = 0; j < 16; ++j) {
        float &x = s[4 * j + 2 * r], &y = s[4 * j + 2 * r + 1];
        x = exp2_approx(fmaf(x, scale, -shift));
        y = exp2_approx(fmaf(y, scale, -shift));
        even += x;
        odd += y;
      }
      sum[r] = fmaf(sum[r], keep[r], even + odd);
    }
  }
};

__device__ void produce(Shared& s, const Arguments& a, const TensorMaps& maps, int* counter) {
  const int items = a.num_query_tiles * a.q_heads, group = a.q_heads / a.kv_heads;
  Ring<2> q_ring;
  Ring<kStages> ring;
  bool expanded = a.num_expand_tiles == 0;
  for (int item = blockIdx.x;;) {
    wait(s.q_empty[q_ring.slot], q_ring.phase ^ 1);
    if (item >= items) {
      if (!expanded) wait_for_launch_before();  // never over before it
      s.head[q_ring.slot] = -1;
      arrive(s.q_full[q_ring.slot]);
      return;
    }
    const QueryTile tile = a.query_tiles[item / a.q_heads];
    const int head = item % a.q_heads, kv_head = head / group, own = own_block(tile);
    s.tile[q_ring.slot] = tile;
    s.head[q_ring.slot] = head;
    copy_tile(s.q[q_ring.slot], maps.q, s.q_full[q_ring.slot], head, tile.first_row);
    q_ring.advance();
    for (int step = 0; step <= own; ++step) {
      const int block = step == 0 ? own : step - 1;
      const bool direct = from_rows(tile, block, a.chunk_exact);
      const int row = row_of_block(tile, block, direct);
      wait(s.k_empty[ring.slot], ring.phase ^ 1);
      if (!direct && !expanded) {  // scratch is written by the launch before this one
        wait_for_launch_before();
        expanded = true;
      }
      copy_tile(s.k[ring.slot], direct ? maps.k_rows : maps.k_scratch, s.k_full[ring.slot], kv_head,
                row);
      wait(s.v_empty[ring.slot], ring.phase ^ 1);
      copy_tile(s.v[ring.slot], direct ? maps.v_rows : maps.v_scratch, s.v_full[ring.slot], kv_head,
                row);
      ring.advance();
    }
    // One is taken for each item that is computed. Whoever takes the last resets the counter for
    // the next launch.
    const int taken = atomicAdd(counter, 1);
    if (taken == items - 1) *counter = 0;
    item = static_cast<int>(gridDim.x) + taken;
  }
}

// Writes the group's 64 rows, through its rows of the q slot.
__device__ void write_output(__half (&staging)[2][kHalfTile], const float (&o)[64],
                             const Softmax& softmax, const Arguments& a, const QueryTile& tile,
                             int head, int group, int thread) {
  const int lane = thread % 32, g = lane / 4, q = lane % 4;
  auto* words = reinterpret_cast<std::byte*>(&staging[0][0]);
  const float back = a.rotate ? rsqrtf(static_cast<float>(kHeadDim)) : 1.0f;
  // 16-byte piece of a row, permuted so that the 8 rows of a warp meet every bank once.
  const auto at = [&](int row, int piece) {
    return (piece / 8 * kTile + row) * 128 + (piece % 8 ^ (row & 7)) * 16;
  };
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    float x[kHeadDim / 4];
    const float factor = back / quad_sum(softmax.sum[r]);
#pragma unroll
    for (int i = 0; i < kHeadDim / 4; ++i) x[i] = o[i / 2 * 4 + 2 * r + i % 2] * factor;
    if (a.rotate) rotate_back(x, q);
    const int row = group * kGroupRows + thread / 32 * 16 + g + 8 * r;
#pragma unroll
    for (int j = 0; j < kHeadDim / 8; ++j) {
      *reinterpret_cast<uint32_t*>(words + at(row, j) + 4 * q) = pack_bf162(x[2 * j], x[2 * j + 1]);
    }
  }
  sync_warps(kOutputBarrier + group, 128);
  const int64_t stride = int64_t{a.q_heads} * kHeadDim;
  auto* out = static_cast<__nv_bfloat16*>(a.out) + tile.first_row * stride + head * kHeadDim;
#pragma unroll
  for (int i = thread; i < kGroupRows * kHeadDim / 8; i += 128) {
    const int row = group * kGroupRows + i / 16, piece = i % 16;
    if (row >= tile.rows) continue;
    *reinterpret_cast<uint4*>(out + row * stride + 8 * piece) =
        *reinterpret_cast<const uint4*>(words + at(row, piece));
  }
}

__device__ void consume(Shared& s, const Arguments& a, int group) {
  const int thread = threadIdx.x % 128, lane = thread % 32, g = lane / 4, q = lane % 4;
  const bool signals = lane == 0;
  const float scale = a.scale * 1.4426950408889634f;  // powers of 2 instead of e
  Ring<2> q_ring;
  Ring<kStages> k_ring, v_ring;
  if (group == 1) arrive_warps(kTurnBarrier, 256);  // group 0 begins
  for (;; q_ring.advance()) {
    wait(s.q_full[q_ring.slot], q_ring.phase);
    const int head = s.head[q_ring.slot];
    if (head < 0) return;
    const QueryTile tile = s.tile[q_ring.slot];
    const int own = own_block(tile), late = first_in_block(tile);
    const uint64_t query = descriptor(s.q[q_ring.slot][0] + group * kGroupRows * kHalfColumns, 0);
    float o[64], score[64];
    uint32_t weight[8][4];
    Softmax softmax;
#pragma unroll
    for (int i = 0; i < 64; ++i) o[i] = 0;
    softmax.top[0] = softmax.top[1] = -INFINITY;
    softmax.sum[0] = softmax.sum[1] = 0;

    // Descriptors count 16 bytes: a depth of 16 columns is 32 bytes, the next half a half tile.
    const auto issue_scores = [&] {
      wait(s.k_full[k_ring.slot], k_ring.phase);
      const uint64_t keys = descriptor(s.k[k_ring.slot][0], 0);
      begin_products();
#pragma unroll
      for (int depth = 0; depth < 8; ++depth) {
        const uint64_t offset = depth / 4 * (kHalfTile * 2 / 16) + depth % 4 * 2;
        multiply_scores(score, query + offset, keys + offset, depth != 0);
      }
      commit_products();
    };
    const auto issue_values = [&] {
      wait(s.v_full[v_ring.slot], v_ring.phase);
      const uint64_t values = descriptor(s.v[v_ring.slot][0], kHalfTile * 2);
      begin_products();
#pragma unroll
      for (int depth = 0; depth < 8; ++depth)  // 16 rows of 128 bytes
        multiply_values(o, weight[depth], values + depth * (16 * 128 / 16));
      commit_products();
    };
    const auto release_keys = [&] {
      if (signals) arrive(s.k_empty[k_ring.slot]);
      k_ring.advance();
    };
    const auto release_values = [&] {
      if (signals) arrive(s.v_empty[v_ring.slot]);
      v_ring.advance();
    };
    const auto pack_weights = [&] {
#pragma unroll
      for (int i = 0; i < 32; ++i)
        weight[i / 4][i % 4] = pack_half2(score[2 * i], score[2 * i + 1]);
    };

    sync_warps(kTurnBarrier + group, 256);
    issue_scores();
    arrive_warps(kTurnBarrier + 1 - group, 256);
    wait_products<0>(score);
    release_keys();
    const int first_query = late + group * kGroupRows + thread / 32 * 16 + g;
#pragma unroll
    for (int i = 0; i < 64; ++i) {  // causal: key index <= query index
      const int key = i / 4 * 8 + 2 * q + i % 2;
      if (key > first_query + i / 2 % 2 * 8) score[i] = -INFINITY;
    }
    softmax.update(score, scale);
    pack_weights();
    if (late == 0 && tile.rows < kTile) {
      // Rows behind the chunk's last one belong to others. Their weights are 0, but 0 * NaN is not.
      wait(s.v_full[v_ring.slot], v_ring.phase);
      auto* values = reinterpret_cast<uint4*>(&s.v[v_ring.slot][0][0]);
      for (int i = tile.rows * 16 + group * 128 + thread; i < kTile * 16; i += 256)
        values[i % 16 / 8 * (kHalfTile / 8) + i / 16 * 8 + i % 8] = uint4{};
      fence_async_proxy();
      sync_warps(kValuesBarrier, 256);
    }
    for (int step = 1; step <= own; ++step) {
      sync_warps(kTurnBarrier + group, 256);
      issue_scores();
      issue_values();
      arrive_warps(kTurnBarrier + 1 - group, 256);
      wait_products<1>(score);
      release_keys();
      softmax.update(score, scale);
      wait_products<0>(o);
      release_values();
#pragma unroll
      for (int i = 0; i < 64; ++i) o[i] *= softmax.keep[i / 2 % 2];
      pack_weights();
    }
    issue_values();
    wait_products<0>(o);
    release_values();
    write_output(s.q[q_ring.slot], o, softmax, a, tile, head, group, thread);
    fence_async_proxy();  // TMA writes the slot next
    if (signals) arrive(s.q_empty[q_ring.slot]);
  }
}

#endif  // __CUDA_ARCH_FEAT_SM90_ALL

__global__ __launch_bounds__(kThreads,
                             1) void attend_kernel(const __grid_constant__ Arguments a,
                                                   const __grid_constant__ TensorMaps maps,
                                                   int* counter) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  extern __shared__ std::byte memory[];
  Shared& s = *reinterpret_cast<Shared*>(memory + (-shared_address(memory) & 1023));
  if (threadIdx.x == 0) {
    for (const CUtensorMap* map : {&maps.q, &maps.k_rows, &maps.v_rows}) {
      asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory");
    }
    for (int i = 0; i < 2; ++i) {
      init_barrier(s.q_full[i], 1);
      init_barrier(s.q_empty[i], kConsumerWarps);
    }
    for (int i = 0; i < kStages; ++i) {
      init_barrier(s.k_full[i], 1);
      init_barrier(s.v_full[i], 1);
      init_barrier(s.k_empty[i], kConsumerWarps);
      init_barrier(s.v_empty[i], kConsumerWarps);
    }
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  }
  __syncthreads();
  if (threadIdx.x < 128) {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kProducerRegisters));
    if (threadIdx.x == 0) produce(s, a, maps, counter);
  } else {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kConsumerRegisters));
    consume(s, a, static_cast<int>(threadIdx.x) / 128 - 1);
  }
#else
  __trap();  // wgmma_available() said so
#endif
}

__global__ void probe_kernel(int* available) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  *available = 1;
#else
  *available = 0;
#endif
}

using EncodeTiled = decltype(&cuTensorMapEncodeTiled);

// The one driver function that this needs, found at run time: nothing links with libcuda.
EncodeTiled encode_tiled() {
  static const EncodeTiled function = [] {
    void* address = nullptr;
    cudaDriverEntryPointQueryResult found{};
    CUDA_CHECK(cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &address, 12000,
                                                cudaEnableDefault, &found));
    if (found != cudaDriverEntryPointSuccess)
      throw std::runtime_error("the NVIDIA driver has no cuTensorMapEncodeTiled");
    return reinterpret_cast<EncodeTiled>(address);
  }();
  return function;
}

// f16 [rows, heads * 128], copied in boxes of 128 rows x 64 columns.
CUtensorMap make_map(const void* data, int64_t rows, int heads) {
  CUtensorMap map;
  const cuuint64_t sizes[] = {static_cast<cuuint64_t>(heads) * kHeadDim,
                              static_cast<cuuint64_t>(rows)};
  const cuuint64_t stride[] = {sizes[0] * 2};
  const cuuint32_t box[] = {kHalfColumns, kTile}, steps[] = {1, 1};
  const CUresult result =
      encode_tiled()(&map, CU_TENSOR_MAP_DATA_TYPE_FLOAT16, 2, const_cast<void*>(data), sizes,
                     stride, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
                     CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  CHECK(result == CUDA_SUCCESS, "prefill attention: tensors are aligned to 16 bytes");
  return map;
}

}  // namespace

bool wgmma_available() {
  int device = 0, major = 0, minor = 0;
  CUDA_CHECK(cudaGetDevice(&device));
  CUDA_CHECK(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device));
  CUDA_CHECK(cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device));
  if (major != 9 || minor != 0) return false;
  int* flag = nullptr;
  int available = 0;
  CUDA_CHECK(cudaMalloc(&flag, sizeof(int)));
  probe_kernel<<<1, 1>>>(flag);
  const cudaError_t error = cudaMemcpy(&available, flag, sizeof(int), cudaMemcpyDeviceToHost);
  cudaFree(flag);
  CUDA_CHECK(error);
  return available != 0;
}

void launch_wgmma(cudaStream_t stream, const Arguments& arguments, int* counter,
                  int num_multiprocessors) {
  if (arguments.num_query_tiles == 0) return;
  const Arguments& a = arguments;
  TensorMaps maps{};
  maps.q = make_map(a.q, a.rows, a.q_heads);
  maps.k_rows = make_map(a.k_rows, a.rows, a.kv_heads);
  maps.v_rows = make_map(a.v_rows, a.rows, a.kv_heads);
  maps.k_scratch = make_map(a.k_scratch, a.scratch_rows, a.kv_heads);
  maps.v_scratch = make_map(a.v_scratch, a.scratch_rows, a.kv_heads);
  CUDA_CHECK(cudaFuncSetAttribute(attend_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                  static_cast<int>(kSharedBytes)));
  const int items = a.num_query_tiles * a.q_heads;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(std::min(items, num_multiprocessors)));
  config.blockDim = dim3(kThreads);
  config.dynamicSmemBytes = kSharedBytes;
  config.stream = stream;
  cudaLaunchAttribute early{};
  early.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  early.val.programmaticStreamSerializationAllowed = 1;
  config.attrs = &early;
  // Only behind launch_expand(), which itself starts when everything before it is done.
  config.numAttrs = a.num_expand_tiles > 0 ? 1 : 0;
  CUDA_CHECK(cudaLaunchKernelEx(&config, attend_kernel, a, maps, counter));
}

}  // namespace kvarn::cuda::prefill
