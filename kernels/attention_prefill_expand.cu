// Blocks of pages as plain fp16 rows in scratch, once per layer and chunk, so that every query tile
// of every head of a group finds them decoded: codes (code * step + zero) * scale in fp32, rounded
// to fp16 once; exact rows as they are. One thread block expands K or V of one block and KV head.
//
// Codes are read in the order of kv_device_layout.h, 16 bytes a thread; values go through shared
// memory, so that scratch is written in whole rows.
#include <cuda_fp16.h>

#include "kernels/attention_prefill.h"
#include "kernels/cuda_check.h"
#include "kernels/kv_device_layout.h"

namespace kvarn::cuda::prefill {
namespace {

constexpr int kThreads = 256;
constexpr int kPieces = kHeadDim / 8;  // 16-byte pieces of a row
// Of halves. 272 bytes: rows start 4 banks apart, so the 8 rows x 4 words that a warp stores meet
// every bank once.
constexpr int kPitch = kHeadDim + 8;

struct Staging {
  __half values[kTile][kPitch];
  float depth_step[kTile], depth_zero[kTile];  // along the k axis: K channels, V tokens
  float row_scale[kTile];                      // along the m axis: K tokens, V channels
};

__device__ float half_at(const std::byte* field, int index) {
  return __half2float(reinterpret_cast<const __half*>(field)[index]);
}

// A code below 2^23 as a float, without the conversion unit (16 a clock and multiprocessor).
__device__ float code_to_float(unsigned code) {
  return __uint_as_float(0x4b000000u | code) - 8388608.0f;  // 2^23
}

// Saturating: a decoded value may lie a rounding error above the largest fp16 number.
__device__ uint32_t saturated_half2(float low, float high) {
  uint32_t pair;
  asm("cvt.rn.satfinite.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  return pair;
}

// The two codes c = 0, 1 of entries (m, k), (m, k + 1).
template <bool kIsK>
__device__ void put(Staging& s, int m, int k, unsigned code0, unsigned code1) {
  const float scale = s.row_scale[m];
  const float x = fmaf(code_to_float(code0), s.depth_step[k], s.depth_zero[k]) * scale;
  const float y = fmaf(code_to_float(code1), s.depth_step[k + 1], s.depth_zero[k + 1]) * scale;
  if constexpr (kIsK) {  // m is the token, k the channel
    *reinterpret_cast<uint32_t*>(&s.values[m][k]) = saturated_half2(x, y);
  } else {
    const uint32_t pair = saturated_half2(x, y);
    s.values[k][m] = __ushort_as_half(static_cast<uint16_t>(pair));
    s.values[k + 1][m] = __ushort_as_half(static_cast<uint16_t>(pair >> 16));
  }
}

template <bool kIsK, int kBits>
__device__ void decode(const std::byte* codes, const std::byte* step, const std::byte* zero,
                       const std::byte* row_scale, Staging& s) {
  for (int i = threadIdx.x; i < kTile; i += kThreads) {
    s.depth_step[i] = half_at(step, device_depth_scale(i));
    s.depth_zero[i] = half_at(zero, device_depth_scale(i));
    s.row_scale[i] = half_at(row_scale, device_row_scale(i));
  }
  constexpr int kLoads = kTile * kHeadDim * kBits / 8 / 16 / kThreads;
  uint4 words[kLoads];
#pragma unroll
  for (int j = 0; j < kLoads; ++j)
    words[j] = reinterpret_cast<const uint4*>(codes)[j * kThreads + threadIdx.x];
  __syncthreads();
#pragma unroll
  for (int j = 0; j < kLoads; ++j) {
    const int at = j * kThreads + static_cast<int>(threadIdx.x);
    const int lane = at % 32, g = lane / 4, q = lane % 4;
    const unsigned word[4] = {words[j].x, words[j].y, words[j].z, words[j].w};
#pragma unroll
    for (int w = 0; w < 4; ++w) {
      if constexpr (kBits == 4) {
        const int m = at / 64 * 16 + g, k = 16 * (at / 32 % 2 * 4 + w) + 2 * q;
#pragma unroll
        for (int r = 0; r < 4; ++r) {  // r = r0 + 2 r1
          const unsigned pair = word[w] >> (8 * (r % 2) + 4 * (r / 2));
          put<kIsK>(s, m + 8 * (r % 2), k + 8 * (r / 2), pair & 15, pair >> 16 & 15);
        }
      } else {
        const int m = at / 32 * 16 + g;
#pragma unroll
        for (int r = 0; r < 8; ++r) {  // r = r0 + 2 r1 + 4 f
          const unsigned pair = word[w] >> (8 * (r % 2) + 2 * (r / 2 % 2) + 4 * (r / 4));
          put<kIsK>(s, m + 8 * (r % 2), 16 * (2 * w + r / 4) + 8 * (r / 2 % 2) + 2 * q, pair & 3,
                    pair >> 16 & 3);
        }
      }
    }
  }
  __syncthreads();
}

__global__ __launch_bounds__(kThreads) void expand_kernel(const __grid_constant__ Arguments a) {
  __shared__ Staging staging;
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;");  // the attention kernel may start and wait
#endif
  const ExpandTile tile = a.expand_tiles[blockIdx.x];
  if (a.chunk_exact && tile.in_chunk != 0) return;
  const int head = blockIdx.y;
  const bool is_k = blockIdx.z == 0;
  const BlockPages& pages = a.block_pages[tile.table_entry];
  const auto page = [&](int n) {
    return a.pages +
           (int64_t{pages[n]} * a.kv_heads + head) * static_cast<int64_t>(a.layout.page_bytes);
  };
  const int64_t row_size = int64_t{a.kv_heads} * kHeadDim;
  __half* to = static_cast<__half*>(is_k ? a.k_scratch : a.v_scratch) +
               int64_t{tile.scratch_tile} * kTile * row_size + head * kHeadDim;

  if (tile.exact_rows < 0) {
    const TileLayout layout =
        a.layout.format == KvFormat::kKvarnK4V4 ? make_tile_layout(4, 4) : make_tile_layout(4, 2);
    const std::byte* record = page(0);
    if (is_k) {
      decode<true, 4>(record + layout.k_codes, record + layout.k_step, record + layout.k_zero,
                      record + layout.k_token, staging);
    } else if (layout.v_bits == 4) {
      decode<false, 4>(record + layout.v_codes, record + layout.v_step, record + layout.v_zero,
                       record + layout.v_channel, staging);
    } else {
      decode<false, 2>(record + layout.v_codes, record + layout.v_step, record + layout.v_zero,
                       record + layout.v_channel, staging);
    }
    for (int i = threadIdx.x; i < kTile * kPieces; i += kThreads) {
      *reinterpret_cast<uint4*>(to + i / kPieces * row_size + i % kPieces * 8) =
          *reinterpret_cast<const uint4*>(&staging.values[i / kPieces][i % kPieces * 8]);
    }
    return;
  }

  const __half* own_row = static_cast<const __half*>(is_k ? a.k_rows : a.v_rows) +
                          tile.own_row * row_size + head * kHeadDim;
  for (int i = threadIdx.x; i < kTile * kPieces; i += kThreads) {
    const int row = i / kPieces, piece = i % kPieces;
    uint4 value{};  // rows after the last one: finite, for they are multiplied by weights of 0
    if (row < tile.exact_rows) {
      const int in_page = row % a.layout.exact_rows;
      const int at = (is_k ? in_page : a.layout.exact_rows + in_page) * 2 * kHeadDim;
      value = *reinterpret_cast<const uint4*>(page(row / a.layout.exact_rows) + at +
                                              device_exact_piece(in_page, piece));
    } else if (row == tile.exact_rows && tile.own_row >= 0) {
      value = *reinterpret_cast<const uint4*>(own_row + piece * 8);
    }
    *reinterpret_cast<uint4*>(to + row * row_size + piece * 8) = value;
  }
}

}  // namespace

void launch_expand(cudaStream_t stream, const Arguments& arguments) {
  if (arguments.num_expand_tiles == 0) return;
  const dim3 grid(static_cast<unsigned>(arguments.num_expand_tiles),
                  static_cast<unsigned>(arguments.kv_heads), 2);
  expand_kernel<<<grid, kThreads, 0, stream>>>(arguments);
  CUDA_CHECK(cudaGetLastError());
}

}  // namespace kvarn::cuda::prefill
