// EngineConfig: the only list of engine settings. Flags, the JSON file, environment variables,
// --help and the start-up dump are all made from visit(). Order: default < file < KVARN_* variable
// < flag. const after validate().
#pragma once

#include <cstdint>
#include <string>

#include "kernels/core/status.h"
#include "kernels/kv_layout.h"

namespace kvarn {

struct EngineConfig {
  std::string model;              // directory, or empty with load_format dummy and a shape
  std::string served_model_name;  // comma-separated; empty: the directory's name
  std::string device = "auto";
  int threads = 0;
  std::string load_format = "auto";
  std::string shape;
  int max_model_len = 0;
  int max_num_seqs = 256;
  int max_num_batched_tokens = 0;  // 0: 2048 on a GPU, 512 on the CPU
  std::string kv_cache_dtype = "auto";
  std::string kv_memory;  // "8GiB"; empty: see docs
  double gpu_memory_utilization = 0.90;
  bool enable_prefix_caching = true;
  std::string scheduling_policy = "fcfs";
  int tensor_parallel_size = 1;
  int max_queued_requests = 1024;
  double max_queue_seconds = 600;
  double engine_stall_seconds = 60;
  std::string reading_rule = "position";  // "chunk_start": the variant measured by `kvarn eval`

  static void visit(auto& self, auto&& field) {
    field("model", self.model, "directory with config.json, tokenizer.json and *.safetensors");
    field("served-model-name", self.served_model_name,
          "names the API answers to, comma-separated (default: the directory's name)");
    field("device", self.device, "auto, cpu or cuda; auto takes a GPU where there is one");
    field("threads", self.threads, "CPU threads; 0: one per physical core");
    field("load-format", self.load_format,
          "auto: read the weights; dummy: random weights, for benchmarks");
    field("shape", self.shape,
          "public shape for dummy weights and inspect: qwen3-0.6b, 1.7b, 4b, 8b, 14b or 32b");
    field("max-model-len", self.max_model_len,
          "longest prompt + output in tokens; 0: what model and KV pool allow");
    field("max-num-seqs", self.max_num_seqs,
          "sequences in one step; more raises throughput and KV use");
    field("max-num-batched-tokens", self.max_num_batched_tokens,
          "token budget of a step; 0: 2048 on a GPU, 512 on the CPU");
    field("kv-cache-dtype", self.kv_cache_dtype,
          "auto, fp16, kvarn_k4v2_g128 or kvarn_k4v4_g128; auto: kvarn_k4v2_g128 at head_dim 128");
    field("kv-memory", self.kv_memory,
          "size of the KV pool, as 8GiB or 512MiB (default: a quarter of free memory on the CPU, "
          "what "
          "--gpu-memory-utilization leaves on a GPU)");
    field("gpu-memory-utilization", self.gpu_memory_utilization,
          "share of device memory for weights, workspace and KV, (0, 1]");
    field("enable-prefix-caching", self.enable_prefix_caching,
          "share the KV blocks of equal prompt prefixes");
    field("scheduling-policy", self.scheduling_policy,
          "fcfs or priority (then requests may carry a priority)");
    field("tensor-parallel-size", self.tensor_parallel_size,
          "GPUs that share the model; 1 in this version");
    field("max-queued-requests", self.max_queued_requests,
          "sequences waiting beyond those running; more are refused with 429");
    field("max-queue-seconds", self.max_queue_seconds,
          "longest wait in the queue before 429; 0: no limit");
    field("engine-stall-seconds", self.engine_stall_seconds,
          "without progress for so long health turns 503; twice as long ends the process");
    field("reading-rule", self.reading_rule,
          "position (default) or chunk_start (measurements only: results depend on chunking)");
  }

  // Names the flag, the value and the allowed range.
  Status validate() const;
};

// Tokens of one step: --max-num-batched-tokens, or the default of `device` (at least max_num_seqs +
// 128). Where `device` is "auto", whoever chose one has to say so first (server/engine_factory).
int token_budget(const EngineConfig& config);

// "8GiB", "512MiB", "1.5GB", "1000000" -> bytes.
Result<uint64_t> parse_bytes(const std::string& text);
// "fp16" ... -> format; "auto" is resolved against head_dim. A KVarN format at another head_dim is
// an error.
Result<KvFormat> resolve_kv_format(const std::string& name, int head_dim);

}  // namespace kvarn
