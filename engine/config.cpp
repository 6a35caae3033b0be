#include "engine/config.h"

#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <charconv>
#include <cmath>
#include <limits>
#include <string_view>

namespace kvarn {
namespace {

constexpr int kMaxThreads = 1024;  // beyond any host; catches a typed port or memory size
constexpr int kMaxSequences = 1 << 16;

template <size_t N>
Status one_of(std::string_view flag, const std::string& value,
              const std::array<std::string_view, N>& allowed) {
  if (std::find(allowed.begin(), allowed.end(), value) != allowed.end()) return {};
  return Status::invalid_argument(
      fmt::format("--{} must be one of {}, got '{}'", flag, fmt::join(allowed, ", "), value));
}

template <typename T>
Status in_range(std::string_view flag, T value, T low, T high) {
  if (value >= low && value <= high) return {};  // false for NaN too
  return Status::invalid_argument(
      fmt::format("--{} must be {}..{}, got {}", flag, low, high, value));
}

}  // namespace

Status EngineConfig::validate() const {
  KVARN_RETURN_IF_ERROR(
      one_of("device", device, std::array<std::string_view, 3>{"auto", "cpu", "cuda"}));
  KVARN_RETURN_IF_ERROR(in_range("threads", threads, 0, kMaxThreads));
  KVARN_RETURN_IF_ERROR(
      one_of("load-format", load_format, std::array<std::string_view, 2>{"auto", "dummy"}));
  if (load_format == "dummy" && model.empty() && shape.empty()) {
    return Status::invalid_argument(
        "--load-format dummy needs --shape (e.g. qwen3-0.6b) or --model with a config.json");
  }
  if (!shape.empty() && load_format != "dummy") {
    return Status::invalid_argument(fmt::format(
        "--shape {} makes random weights and needs --load-format dummy; drop --shape to read the "
        "weights of --model",
        shape));
  }
  constexpr int kMaxInt = std::numeric_limits<int>::max();
  KVARN_RETURN_IF_ERROR(in_range("max-model-len", max_model_len, 0, kMaxInt));
  KVARN_RETURN_IF_ERROR(in_range("max-num-seqs", max_num_seqs, 1, kMaxSequences));
  if (max_num_batched_tokens != 0 && max_num_batched_tokens < max_num_seqs + kBlockTokens) {
    return Status::invalid_argument(fmt::format(
        "--max-num-batched-tokens must be at least --max-num-seqs + {} = {} so that a prefill "
        "always gets on, got {}; raise it or lower --max-num-seqs",
        kBlockTokens, max_num_seqs + kBlockTokens, max_num_batched_tokens));
  }
  KVARN_RETURN_IF_ERROR(in_range("max-num-batched-tokens", max_num_batched_tokens, 0, kMaxInt));
  KVARN_RETURN_IF_ERROR(one_of(
      "kv-cache-dtype", kv_cache_dtype,
      std::array<std::string_view, 4>{"auto", "fp16", "kvarn_k4v2_g128", "kvarn_k4v4_g128"}));
  if (!kv_memory.empty()) {
    const Result<uint64_t> bytes = parse_bytes(kv_memory);
    if (!bytes) return Status::invalid_argument("--kv-memory: " + bytes.status().message());
  }
  if (!(gpu_memory_utilization > 0.0 && gpu_memory_utilization <= 1.0)) {
    return Status::invalid_argument(
        fmt::format("--gpu-memory-utilization must be in (0, 1], got {}", gpu_memory_utilization));
  }
  KVARN_RETURN_IF_ERROR(one_of("scheduling-policy", scheduling_policy,
                               std::array<std::string_view, 2>{"fcfs", "priority"}));
  if (tensor_parallel_size != 1) {
    return Status::invalid_argument(fmt::format(
        "--tensor-parallel-size must be 1 in this version, got {}", tensor_parallel_size));
  }
  KVARN_RETURN_IF_ERROR(in_range("max-queued-requests", max_queued_requests, 1, kMaxInt));
  KVARN_RETURN_IF_ERROR(in_range("max-queue-seconds", max_queue_seconds, 0.0, 1e9));
  if (!(engine_stall_seconds > 0.0 && engine_stall_seconds <= 1e9)) {
    return Status::invalid_argument(
        fmt::format("--engine-stall-seconds must be greater than 0, got {}", engine_stall_seconds));
  }
  return one_of("reading-rule", reading_rule,
                std::array<std::string_view, 2>{"position", "chunk_start"});
}

int token_budget(const EngineConfig& config) {
  if (config.max_num_batched_tokens > 0) return config.max_num_batched_tokens;
  return std::max(config.device == "cuda" ? 2048 : 512, config.max_num_seqs + kBlockTokens);
}

Result<uint64_t> parse_bytes(const std::string& text) {
  struct Unit {
    std::string_view name;
    double bytes;
  };
  static constexpr Unit kUnits[] = {
      {"", 1.0},     {"B", 1.0},      {"KB", 1e3},     {"MB", 1e6},     {"GB", 1e9},
      {"TB", 1e12},  {"KiB", 0x1p10}, {"MiB", 0x1p20}, {"GiB", 0x1p30}, {"TiB", 0x1p40},
      {"K", 0x1p10}, {"M", 0x1p20},   {"G", 0x1p30},   {"T", 0x1p40},
  };
  const auto bad = [&](std::string_view why) {
    return Status::invalid_argument(fmt::format(
        "'{:.64}' is not a size ({}); write it as 8GiB, 512MiB, 1.5GB or bytes", text, why));
  };
  // Plain decimal only: from_chars alone would take "inf", "1e9" and "-1".
  const size_t digits = std::min(text.find_first_not_of("0123456789."), text.size());
  double number = 0;
  const auto [end, error] = std::from_chars(text.data(), text.data() + digits, number);
  if (error != std::errc() || end != text.data() + digits) return bad("no number");
  std::string_view name = std::string_view(text).substr(digits);
  while (!name.empty() && name.front() == ' ') name.remove_prefix(1);
  const auto* const unit = std::find_if(std::begin(kUnits), std::end(kUnits),
                                        [&](const Unit& u) { return u.name == name; });
  if (unit == std::end(kUnits)) return bad("unknown unit");
  const double bytes = std::floor(number * unit->bytes);
  if (bytes < 1.0) return bad("it must be at least one byte");
  if (bytes > 0x1p53) return bad("too large");
  return static_cast<uint64_t>(bytes);
}

Result<KvFormat> resolve_kv_format(const std::string& name, int head_dim) {
  if (name == "auto") return head_dim == kCodedHeadDim ? KvFormat::kKvarnK4V2 : KvFormat::kFp16;
  for (const KvFormat format : {KvFormat::kFp16, KvFormat::kKvarnK4V2, KvFormat::kKvarnK4V4}) {
    if (name != kv_format_name(format)) continue;
    if (format != KvFormat::kFp16 && head_dim != kCodedHeadDim) {
      return Status::invalid_argument(fmt::format(
          "--kv-cache-dtype {} needs a model with head_dim {}, this one has {}; use fp16 or auto",
          name, kCodedHeadDim, head_dim));
    }
    return format;
  }
  return Status::invalid_argument(fmt::format(
      "--kv-cache-dtype must be one of auto, fp16, kvarn_k4v2_g128, kvarn_k4v4_g128, got '{}'",
      name));
}

}  // namespace kvarn
