// THE device seam: every operation that differs between CPU and CUDA, and nothing else. One virtual
// call per op. Each op has a plain CPU twin in fp32 that is its specification
// (docs/architecture.md).
//
// Rules for every op: tensors are dense and live in this backend's memory, and so do the arrays of
// a StepInput, which begin_step() puts there; shapes are checked once (a bad shape is a bug,
// CHECK); zero rows do nothing; nothing is allocated; one caller at a time (the worker thread). Ops
// run in the order of their calls. On a GPU they run after the call: end_step() and download()
// wait. On the CPU the result of a row never depends on the other rows of the call, on their
// number, or on threads(); on a GPU, up to the rounding of another summation order.
//
// A failed op throws: DeviceLost where the device is gone, std::runtime_error otherwise.
#pragma once

#include <array>
#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <span>
#include <stdexcept>
#include <string>

#include "kernels/core/buffer.h"
#include "kernels/core/status.h"
#include "kernels/core/tensor.h"
#include "kernels/kv_layout.h"
#include "kernels/sampling.h"
#include "kernels/step_input.h"

namespace kvarn {

// The device answers no more; the process has to end.
struct DeviceLost : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// A weight matrix [n, k] as up to three row blocks, each [n_i, k] of one dtype (bf16, f16 or f32):
// fused QKV and gate/up without copying mapped weights. y = x W^T; column j of y belongs to row j
// of the stacked blocks.
struct LinearWeight {
  std::array<Tensor, 3> parts;
  int num_parts = 0;
  int64_t out_features() const {
    int64_t n = 0;
    for (int i = 0; i < num_parts; ++i) n += parts[static_cast<size_t>(i)].dim(0);
    return n;
  }
  int64_t in_features() const { return num_parts == 0 ? 0 : parts[0].dim(1); }
};

// Rotary embedding of one model: cos/sin tables are made by the model (YaRN included), one row per
// position.
struct RopeTable {
  Tensor cos, sin;  // f32 [max_positions, head_dim / 2], attention factor included
};

// The residual stream before a matrix: x f32 [rows, k], RMS-normed with `weight` [k] on its way in.
struct NormedInput {
  Tensor x, weight;
  float eps;
  Tensor scratch;  // [rows, k], activation dtype: room for the normed rows
};

struct QkvParams {
  Tensor qkv;  // [rows, (q_heads + 2*kv_heads) * head_dim], activation dtype: q heads, k heads, v
               // heads
  const int32_t* positions;  // [rows]
  RopeTable rope;
  Tensor q_norm, k_norm;  // [head_dim]; empty: no QK norm (then only RoPE)
  float eps;
  bool rotate;  // multiply q, k, v of each head by H/sqrt(head_dim) (coded formats)
  int q_heads, kv_heads, head_dim;
  Tensor q;     // out f32 (CPU) or f16 (GPU) [rows, q_heads, head_dim]
  Tensor k, v;  // out f16 [rows, kv_heads, head_dim]
};

// One layer's pages: address of (page, head) = data + (page * kv_heads + head) * layout.page_bytes.
struct KvLayerView {
  std::byte* data;
  int64_t num_pages;
  int kv_heads;
  KvLayout layout;
};

struct KvWriteParams {
  Tensor k, v;  // f16 [rows, kv_heads, head_dim]
  const int64_t*
      slots;  // [rows]: page * exact_rows + row within the page, or -1: this row is stored nowhere
  KvLayerView layer;
};

// Encodes complete tiles into pages, for all KV heads of every layer given. Tiles from rows of k
// and v have one layer; tiles from exact pages have any number.
struct KvEncodeParams {
  Tensor k, v;  // f16 [rows, kv_heads, head_dim]; empty when every tile comes from pages
  std::span<const EncodeTile> tiles;
  std::span<const KvLayerView> layers;  // host memory
};

// Causal attention of each row over positions 0..p of its sequence. Blocks before the row's own
// tile are read from pages, coded or exact by reads_coded(); rows of its own tile that belong to
// this step are read from k_rows/v_rows, earlier ones (decode) from exact pages. Per (row, head):
// one partial (m, l, acc) per block with rows in order of position, merged in order of blocks: the
// CPU result is the same bits for any schedule.
struct AttentionParams {
  Tensor q;               // f32 (CPU) or f16 (GPU) [rows, q_heads, head_dim], rotated when coded
  Tensor k_rows, v_rows;  // f16 [rows, kv_heads, head_dim] of this step
  std::span<const AttentionSequence> sequences;
  const BlockPages* block_pages;
  KvLayerView layer;
  int q_heads;
  float scale;  // 1/sqrt(head_dim)
  ReadingRule rule =
      ReadingRule::kPosition;  // kChunkStart: the chunk's own tiles are all read from k_rows/v_rows
  Tensor out;                  // activation dtype [rows, q_heads * head_dim], rotated back
};

// What reserve() sizes buffers by.
struct StepLimits {
  int max_rows = 0, max_logit_rows = 0;  // rows of one step; of them sampled
  int max_sequences = 0;
  int64_t max_blocks = 0;        // entries of block_pages, all sequences of a step together
  int64_t max_encode_tiles = 0;  // before the layers and in them together
  int max_model_len = 0;
  int hidden = 0, q_heads = 0, kv_heads = 0, head_dim = 0, ffn = 0, vocab = 0;
  KvLayout layout{};

  bool operator==(const StepLimits&) const = default;
};

struct DeviceMemory {
  size_t free_bytes, total_bytes;
};

struct StepTimes {
  double encode_seconds = 0;  // spent in kv_encode()
};

class Recording {
 public:
  virtual ~Recording() = default;
  virtual void replay() = 0;
};

class Backend {
 public:
  virtual ~Backend() = default;

  virtual std::string name() const = 0;        // "cpu (avx512_bf16, 2 threads)"
  virtual int threads() const = 0;             // CPU threads at work; 1 on a GPU
  virtual DType activation_dtype() const = 0;  // f32 on the CPU, bf16 on a GPU
  // Free and total bytes where allocate() takes from; none where that is the host's memory.
  virtual std::optional<DeviceMemory> device_memory() const = 0;
  virtual Buffer allocate(size_t bytes) = 0;  // start-up only; throws std::bad_alloc
  // Makes host bytes usable by the ops below. The CPU returns the same address (mapped weights are
  // not copied); a GPU copies into `into`, which must be large enough.
  virtual void* upload(const void* host, size_t bytes, Buffer& into, size_t offset) = 0;
  // Copies `bytes` of this backend's memory to the host, after every op called so far.
  virtual void download(const void* from, size_t bytes, void* host) = 0;
  // Fills bf16 `out` with N(0, stddev) in this backend's memory; element i depends on (seed, i)
  // alone and is the same on every backend (dummy weights).
  virtual void fill_normal(Tensor out, float stddev, uint64_t seed) = 0;

  // Takes what steps within `limits` need besides the caller's tensors; before the first step.
  // Called again, it changes to those limits; what it took for others stays, so that changing back
  // is free.
  virtual void reserve(const StepLimits& limits) = 0;
  // Opens a step: returns `host` with its arrays in this backend's memory, at the same addresses
  // for every step. Both arguments stay alive until end_step(). `sampling` has a row for each logit
  // row, or for the first of them where the others only fill a batch up.
  virtual StepInput begin_step(const StepInput& host, std::span<const SamplingRow> sampling) = 0;
  // Ends the step: waits for it, gives the tokens that sample() chose (none if it was not called).
  virtual StepTimes end_step(std::span<SampledToken> tokens) = 0;
  // Ops called inside `ops`, kept to be replayed on other contents of the same tensors (a CUDA
  // graph); they do not run now. nullptr where replaying gains nothing.
  virtual std::unique_ptr<Recording> record(const std::function<void()>& ops) = 0;

  virtual void embed(const int32_t* token_ids, Tensor table /*[vocab, hidden]*/,
                     Tensor out /*f32 [rows, hidden]*/) = 0;
  // The residual stream is f32 on every backend; y and delta have the activation dtype.
  virtual void rms_norm(Tensor x, Tensor weight, float eps, Tensor y) = 0;  // [rows, hidden]
  virtual void add_rms_norm(Tensor residual, Tensor delta, Tensor weight, float eps,
                            Tensor y) = 0;              // residual += delta
  virtual void add(Tensor residual, Tensor delta) = 0;  // residual += delta
  virtual void linear(Tensor x, const LinearWeight& weight,
                      Tensor y) = 0;  // [rows,k] -> [rows,n]; y may be f32 logits
  // The matrices of a decoder layer with what stands before and behind them. A backend without a
  // kernel for one takes the ops above and below, one after another. What is left in `scratch`
  // (activation dtype) means nothing.
  // y = rms_norm(x) W^T
  virtual void norm_linear(const NormedInput& input, const LinearWeight& weight, Tensor y);
  // y = silu(gate) * up, [gate, up] = rms_norm(x) W^T; scratch [rows, 2*ffn]
  virtual void norm_gate_up(const NormedInput& input, const LinearWeight& gate_up, Tensor scratch,
                            Tensor y);
  // residual += x W^T; scratch [rows, n]
  virtual void linear_add(Tensor x, const LinearWeight& weight, Tensor scratch, Tensor residual);
  virtual void qk_norm_rope_rotate(const QkvParams& params) = 0;
  virtual void kv_write(const KvWriteParams& params) = 0;
  virtual void kv_encode(const KvEncodeParams& params) = 0;
  virtual void attention_decode(const AttentionParams& params) = 0;   // sequences of one row
  virtual void attention_prefill(const AttentionParams& params) = 0;  // chunks
  virtual void silu_mul(Tensor gate_up /*[rows, 2*ffn]*/, Tensor y /*[rows, ffn]*/) = 0;
  virtual void gather_rows(Tensor x, std::span<const int32_t> rows, Tensor y) = 0;
  // Chooses a token for each row of begin_step()'s `sampling`.
  virtual void sample(Tensor logits /*f32 [rows, vocab], overwritten*/) = 0;
};

// Instruction sets of the CPU backend, weakest first. kAmxBf16 and kAvx512Bf16 round activations to
// bf16 in linear().
enum class CpuIsa : uint8_t { kScalar, kAvx2, kAvx512, kAvx512Bf16, kAmxBf16 };
const char* cpu_isa_name(CpuIsa isa);
CpuIsa best_cpu_isa();  // of this host
bool cpu_isa_supported(CpuIsa isa);

struct CpuOptions {
  int threads = 0;  // 0: physical cores
  CpuIsa isa = best_cpu_isa();
  bool fp32_activations =
      false;  // keep activations fp32 in linear() whatever the ISA (parity tests)
};
std::unique_ptr<Backend> make_cpu_backend(const CpuOptions& options);

// kUnavailable (with the reason) where this build or machine has no CUDA.
Result<std::unique_ptr<Backend>> make_cuda_backend(int device);

}  // namespace kvarn
