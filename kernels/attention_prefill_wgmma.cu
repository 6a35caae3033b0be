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
// 128-byte swizzle, which TMA writes and wgmma reads.
#include <cuda.h>
#include <cuda_fp16.h>

#include <algorithm>
#include <stdexcept>

#include "kernels/attention_prefill_device.cuh"
#include "kernels/cuda_check.h"

namespace kvarn::cuda::prefill {
namespace {

constexpr int kGroups = 2;                     // warp groups that multiply
constexpr int kGroupRows = kTile / kGroups;    // queries of one
constexpr int kThreads = 128 * (1 + kGroups);  // group 0 produces
constexpr int kStages = 2;                     // key tiles in flight, of K and of V each
constexpr int kHalfColumns = 64;               // 128 bytes: the widest swizzle
constexpr int kHalfTile = kTile * kHalfColumns;
constexpr uint32_t kTileBytes = 2 * kTile * kHeadDim;
constexpr int kConsumerWarps = 4 * kGroups;
// Registers a thread. A block starts with 168 each (384 * 168 = 64,512), and the groups share
// these.
constexpr int kProducerRegisters = 40, kConsumerRegisters = 232;
static_assert(128 * kProducerRegisters + 128 * kGroups * kConsumerRegisters == kThreads * 168);

struct TensorMaps {
  CUtensorMap q, k_rows, v_rows, k_scratch, v_scratch;
  CUtensorMap pages;  // only where reads_pages
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

__device__ uint32_t shared_address(const void* p) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}

__device__ void init_barrier(uint64_t& barrier, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(&barrier)),
               "r"(arrivals)
               : "memory");
}
__device__ void expect_bytes(uint64_t& barrier, uint32_t bytes) {
  asm volatile(
      "mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(&barrier)),
      "r"(bytes)
      : "memory");
}
__device__ void arrive(uint64_t& barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(&barrier))
               : "memory");
}
// Waits until the phase of this parity is over.
__device__ void wait(uint64_t& barrier, int parity) {
  asm volatile(
      "{\n.reg .pred done;\n"
      "again:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
      "@!done bra again;\n}" ::"r"(shared_address(&barrier)),
      "r"(parity)
      : "memory");
}

// A box of a map from (column, row); rows past its end arrive as zeros.
__device__ void copy_box(__half* to, const CUtensorMap& map, uint64_t& barrier, int column,
                         int row) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, "
      "%4}], [%2];" ::"r"(shared_address(to)),
      "l"(&map), "r"(shared_address(&barrier)), "r"(column), "r"(row)
      : "memory");
}
__device__ void copy_tile(__half (&to)[2][kHalfTile], const CUtensorMap& map, uint64_t& barrier,
                          int head, int row) {
  expect_bytes(barrier, kTileBytes);
  copy_box(to[0], map, barrier, head * kHeadDim, row);
  copy_box(to[1], map, barrier, head * kHeadDim + kHalfColumns, row);
}

// A block of fp16 pages: their pieces are permuted (device_exact_piece) as the 128-byte swizzle
// does.
constexpr int kPageRows = make_kv_layout(KvFormat::kFp16, kHeadDim).exact_rows;
constexpr int kPages = kTile / kPageRows;
static_assert(kPageRows % 8 == 0 && kTile % kPageRows == 0);
// `rows`: of the maps of pages, where the block's pages begin.
__device__ void copy_pages(__half (&to)[2][kHalfTile], const CUtensorMap& map, uint64_t& barrier,
                           const int (&rows)[kPages], int first) {
  expect_bytes(barrier, kTileBytes);
#pragma unroll
  for (int n = 0; n < kPages; ++n) {
    copy_box(to[0] + n * kPageRows * kHalfColumns, map, barrier, 0, rows[n] + first);
    copy_box(to[1] + n * kPageRows * kHalfColumns, map, barrier, kHalfColumns, rows[n] + first);
  }
}

// Barriers of some of the warps, by number; 0 is __syncthreads().
constexpr int kTurnBarrier = 1;    // + group: this group may issue its products
constexpr int kValuesBarrier = 3;  // both groups
constexpr int kOutputBarrier = 4;  // + group
__device__ void sync_warps(int barrier, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(barrier), "r"(threads) : "memory");
}
__device__ void arrive_warps(int barrier, int threads) {
  asm volatile("bar.arrive %0, %1;" ::"r"(barrier), "r"(threads) : "memory");
}
// Ordinary writes to shared memory before it are seen by wgmma and TMA after it.
__device__ void fence_async_proxy() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// Matrix descriptor: 128-byte swizzle, groups of 8 rows 1024 bytes apart. `leading` is the distance
// of 64-column halves where columns are the long axis of the operand (V), else without meaning.
__device__ uint64_t descriptor(const __half* tile, uint32_t leading) {
  const uint64_t address = shared_address(tile);
  return (address & 0x3ffff) >> 4 | uint64_t{leading >> 4} << 16 | uint64_t{1024 >> 4} << 32 |
         uint64_t{1} << 62;
}

#define KVARN_D8(i)                                                                               \
  "+f"(d[8 * i]), "+f"(d[8 * i + 1]), "+f"(d[8 * i + 2]), "+f"(d[8 * i + 3]), "+f"(d[8 * i + 4]), \
      "+f"(d[8 * i + 5]), "+f"(d[8 * i + 6]), "+f"(d[8 * i + 7])
#define KVARN_D64                                                                            \
  KVARN_D8(0), KVARN_D8(1), KVARN_D8(2), KVARN_D8(3), KVARN_D8(4), KVARN_D8(5), KVARN_D8(6), \
      KVARN_D8(7)
#define KVARN_D_NAMES                                                                       \
  "{%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23," \
  "%24,%25,%26,%27,%28,%29,%30,%31,%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,"    \
  "%45,%46,%47,%48,%49,%50,%51,%52,%53,%54,%55,%56,%57,%58,%59,%60,%61,%62,%63}"

// d (64 x 128) = or += A (64 x 16, shared) B^T (128 rows of 16, shared).
__device__ void multiply_scores(float (&d)[64], uint64_t a, uint64_t b, bool add) {
  asm volatile(
      "{\n.reg .pred add;\nsetp.ne.b32 add, %66, 0;\n"
      "wgmma.mma_async.sync.aligned.m64n128k16.f32.f16.f16 " KVARN_D_NAMES
      ", %64, %65, add, 1, 1, 0, 0;\n}"
      : KVARN_D64
      : "l"(a), "l"(b), "r"(static_cast<int>(add)));
}
// d (64 x 128) += A (64 x 16, registers) B (16 rows of 128, shared).
__device__ void multiply_values(float (&d)[64], const uint32_t (&a)[4], uint64_t b) {
  asm volatile("wgmma.mma_async.sync.aligned.m64n128k16.f32.f16.f16 " KVARN_D_NAMES
               ", {%64,%65,%66,%67}, %68, 1, 1, 1, 1;"
               : KVARN_D64
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
}
#undef KVARN_D8
#undef KVARN_D64
#undef KVARN_D_NAMES

__device__ void begin_products() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ void commit_products() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int kLeft>
__device__ void wait_products(float (&d)[64]) {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kLeft) : "memory");
#pragma unroll
  for (int i = 0; i < 64; ++i) asm volatile("" : "+f"(d[i])::"memory");  // not read before
}

// Slot and phase of a ring.
template <int kSlots>
struct Ring {
  int slot = 0, phase = 0;
  __device__ void advance() {
    if (++slot == kSlots) {
      slot = 0;
      phase ^= 1;
    }
  }
};

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
      const bool paged = !direct && a.reads_pages && first_in_block(tile) == 0;
      int rows[kPages] = {};
      if (paged) {  // loaded before the wait, which hides their latency
#pragma unroll
        for (int n = 0; n < kPages; ++n) {
          rows[n] =
              (a.block_pages[tile.first_block + block][n] * a.kv_heads + kv_head) * 2 * kPageRows;
        }
      }
      wait(s.k_empty[ring.slot], ring.phase ^ 1);
      if (paged) {
        copy_pages(s.k[ring.slot], maps.pages, s.k_full[ring.slot], rows, 0);
        wait(s.v_empty[ring.slot], ring.phase ^ 1);
        copy_pages(s.v[ring.slot], maps.pages, s.v_full[ring.slot], rows, kPageRows);
      } else {
        if (!direct && !expanded) {  // scratch is written by the launch before this one
          asm volatile("griddepcontrol.wait;" ::: "memory");
          expanded = true;
        }
        copy_tile(s.k[ring.slot], direct ? maps.k_rows : maps.k_scratch, s.k_full[ring.slot],
                  kv_head, row);
        wait(s.v_empty[ring.slot], ring.phase ^ 1);
        copy_tile(s.v[ring.slot], direct ? maps.v_rows : maps.v_scratch, s.v_full[ring.slot],
                  kv_head, row);
      }
      ring.advance();
    }
    // Every block takes one item more than it computes. The last of all to do so resets the counter
    // for the next launch.
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

// f16 [rows, heads * 128], copied in boxes of `box_rows` rows x 64 columns.
CUtensorMap make_map(const void* data, int64_t rows, int heads, int box_rows,
                     CUtensorMapSwizzle swizzle) {
  CUtensorMap map;
  const cuuint64_t sizes[] = {static_cast<cuuint64_t>(heads) * kHeadDim,
                              static_cast<cuuint64_t>(rows)};
  const cuuint64_t stride[] = {sizes[0] * 2};
  const cuuint32_t box[] = {kHalfColumns, static_cast<cuuint32_t>(box_rows)};
  const cuuint32_t steps[] = {1, 1};
  const CUresult result =
      encode_tiled()(&map, CU_TENSOR_MAP_DATA_TYPE_FLOAT16, 2, const_cast<void*>(data), sizes,
                     stride, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE, swizzle,
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
  const auto rows_map = [](const void* data, int64_t rows, int heads) {
    return make_map(data, rows, heads, kTile, CU_TENSOR_MAP_SWIZZLE_128B);
  };
  TensorMaps maps{};
  maps.q = rows_map(a.q, a.rows, a.q_heads);
  maps.k_rows = rows_map(a.k_rows, a.rows, a.kv_heads);
  maps.v_rows = rows_map(a.v_rows, a.rows, a.kv_heads);
  maps.k_scratch = rows_map(a.k_scratch, a.scratch_rows, a.kv_heads);
  maps.v_scratch = rows_map(a.v_scratch, a.scratch_rows, a.kv_heads);
  if (a.reads_pages) {  // rows of K, then rows of V, of every (page, head)
    maps.pages = make_map(a.pages, a.num_pages * a.kv_heads * 2 * a.layout.exact_rows, 1,
                          a.layout.exact_rows, CU_TENSOR_MAP_SWIZZLE_NONE);
  }
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
