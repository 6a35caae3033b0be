// Causal attention over pages. One partial (m, l, acc) per (row, head, block), rows in order of
// position, merged in order of blocks: no schedule can change a bit.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

#include "kernels/hadamard.h"
#include "kernels/kv_cpu.h"
#include "kernels/kv_encode_cpu.h"

namespace kvarn::cpu {

void attention(const AttentionParams& params, ThreadPool& pool, CpuIsa isa) {
  (void)isa;
  const KvLayout& layout = params.layer.layout;
  const int kv_heads = params.layer.kv_heads, head_dim = layout.head_dim;
  const int group = params.q_heads / kv_heads;
  CHECK(group * kv_heads == params.q_heads, "attention: q_heads is a multiple of kv_heads");
  const half* k_rows = params.k_rows.data<half>();
  const half* v_rows = params.v_rows.data<half>();
  for (const AttentionSequence& sequence : params.sequences) {
    pool.parallel_for(
        int64_t{sequence.num_rows} * kv_heads, 1, [&](int64_t begin, int64_t end, int) {
          thread_local std::vector<float> k, v, acc;
          k.resize(static_cast<size_t>(kBlockTokens * head_dim));
          v.resize(k.size());
          acc.resize(static_cast<size_t>(head_dim));
          for (int64_t item = begin; item < end; ++item) {
            const int64_t row = item / kv_heads, head = item % kv_heads;
            const int64_t position = sequence.first_position + row;
            const auto page = [&](int64_t id) {
              return params.layer.data + (id * kv_heads + head) * layout.page_bytes;
            };
            for (int g = 0; g < group; ++g) {
              const int64_t q_at =
                  ((sequence.first_row + row) * params.q_heads + head * group + g) * head_dim;
              const float* q = params.q.data<float>() + q_at;
              float m = -INFINITY, l = 0;
              std::fill(acc.begin(), acc.end(), 0.0f);
              for (int64_t block = 0; block <= position / kBlockTokens; ++block) {
                const BlockPages& pages = params.block_pages[sequence.first_block + block];
                const int64_t start = block * kBlockTokens;
                const int tokens =
                    static_cast<int>(std::min<int64_t>(kBlockTokens, position + 1 - start));
                if (layout.coded() &&
                    reads_coded(block, position, sequence.first_position, params.rule)) {
                  decode_tile(page(pages[0]), layout.tile(), k.data(), v.data());
                } else {
                  for (int t = 0; t < tokens; ++t) {
                    const half *k_from, *v_from;
                    if (start + t >= sequence.first_position) {
                      const int64_t at =
                          ((sequence.first_row + start + t - sequence.first_position) * kv_heads +
                           head) *
                          head_dim;
                      k_from = k_rows + at;
                      v_from = v_rows + at;
                    } else {
                      const std::byte* from =
                          page(pages[static_cast<size_t>(t / layout.exact_rows)]);
                      k_from = reinterpret_cast<const half*>(
                          from + layout.k_row_offset(t % layout.exact_rows));
                      v_from = reinterpret_cast<const half*>(
                          from + layout.v_row_offset(t % layout.exact_rows));
                    }
                    for (int d = 0; d < head_dim; ++d) {
                      k[static_cast<size_t>(t * head_dim + d)] = to_float(k_from[d]);
                      v[static_cast<size_t>(t * head_dim + d)] = to_float(v_from[d]);
                    }
                  }
                }
                float score[kBlockTokens];
                float top = m;
                for (int t = 0; t < tokens; ++t) {
                  float s = 0;
                  for (int d = 0; d < head_dim; ++d)
                    s += q[d] * k[static_cast<size_t>(t * head_dim + d)];
                  score[t] = s * params.scale;
                  top = std::max(top, score[t]);
                }
                const float alpha = std::exp(m - top);
                l *= alpha;
                for (float& a : acc) a *= alpha;
                for (int t = 0; t < tokens; ++t) {
                  const float p = std::exp(score[t] - top);
                  l += p;
                  for (int d = 0; d < head_dim; ++d)
                    acc[static_cast<size_t>(d)] += p * v[static_cast<size_t>(t * head_dim + d)];
                }
                m = top;
              }
              float* out = params.out.data<float>() + q_at;
              for (int d = 0; d < head_dim; ++d) out[d] = acc[static_cast<size_t>(d)] / l;
              if (layout.coded()) hadamard_rotate(out, head_dim);
            }
          }
        });
  }
}

}  // namespace kvarn::cpu
