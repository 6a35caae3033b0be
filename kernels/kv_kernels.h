// The inner kernels of the KV ops, one set per instruction set: encode one tile, attend one block.
// kv_encode_cpu.cpp and attention_cpu.cpp decide what runs where; nothing here knows sequences.
//
// Attention of one query vector to one block is a partial (m, l, acc): m the largest score, l the
// sum of p = exp(score - m), acc the sum of p times the V rows. Its arithmetic depends on the query
// and the block alone. attend() unpacks the block on the fly (few queries), expand() and
// attend_expanded() unpack it once for many: the same order of operations, hence the same bits.
// Every pointer is to host memory; no kernel allocates.
#pragma once

#include <cstddef>

#include "kernels/backend.h"
#include "kernels/kv_encode_cpu.h"
#include "kernels/kv_layout.h"

namespace kvarn::cpu {

struct AttendShape {
  TileLayout tile;  // of coded blocks
  int head_dim;     // any
  int padded_dim;   // head_dim rounded up to 16: the stride of queries and accumulators, f32
  float scale;      // softmax scale
};

// What one block of positions is to its readers: a record, or exact rows.
struct Block {
  const std::byte* record;  // coded: all 128 tokens; nullptr: exact
  const TileRows* rows;     // exact: the first `tokens` are set
  int tokens;
  const Block* next;  // attended next: brought into the cache meanwhile; or nullptr
};

// n query vectors' results: m[n], l[n], acc[n][padded_dim].
struct Partials {
  float *m, *l, *acc;
};

// A block unpacked to f32: coded values without their scales (in the order of the codes' lanes),
// exact values as they are.
struct ExpandedBlock {
  float* k;  // [padded_dim][128 tokens]
  float* v;  // [128 tokens][padded_dim]
};

constexpr int kMaxQueries = 32;  // query vectors in one call of attend_expanded()

struct KvKernels {
  int expand_from;  // query vectors from which expand() + attend_expanded() is faster than attend()
  void (*encode_tile)(const TileRows& rows, const TileLayout& tile, std::byte* record);

  // q [n][padded_dim] f32, zeros past head_dim; n >= 1. Every query sees all of block.tokens.
  void (*attend)(const AttendShape& shape, const Block& block, const float* q, int n,
                 const Partials& out);
  void (*expand)(const AttendShape& shape, const Block& block, const ExpandedBlock& out);
  // n <= kMaxQueries. Query i sees the first limits[i] tokens (ascending, 1 .. block.tokens);
  // limits may be nullptr: all.
  void (*attend_expanded)(const AttendShape& shape, const Block& block,
                          const ExpandedBlock& expanded, const float* q, int n, const int* limits,
                          const Partials& out);
  // into = into merged with the next block's partial.
  void (*merge)(int n, int padded_dim, const Partials& from, const Partials& into);
  // The attention of one query vector, out [head_dim]: acc / l, rotated back (as hadamard_rotate()
  // does, bit for bit) if the layout is coded.
  void (*finish)(const AttendShape& shape, bool rotate, const float* acc, float l, float* out);
};

// The kernels of this instruction set, which the host must have.
const KvKernels& kv_kernels(CpuIsa isa);

extern const KvKernels kKvKernelsPortable;
extern const KvKernels kKvKernelsAvx2;
extern const KvKernels kKvKernelsAvx512;

}  // namespace kvarn::cpu
