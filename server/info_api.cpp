#include "server/info_api.h"

#include <chrono>
#include <cmath>

#include <nlohmann/json.hpp>

#include "server/build_info.h"
#include "server/json_out.h"
#include "server/metrics.h"

namespace kvarn {
namespace {

using nlohmann::ordered_json;

double rounded(double value, double steps) { return std::round(value * steps) / steps; }

ordered_json meta_json(const ModelInfo& model, const EngineStats& stats) {
  ordered_json meta;
  meta["architecture"] = model.architecture;
  meta["num_parameters"] = model.num_parameters;
  meta["weights_dtype"] = model.weights_dtype;
  meta["vocab_size"] = model.vocab_size;
  meta["context_length"] = model.max_model_len;
  meta["rope_scaling"] = nullptr;
  if (!model.rope_scaling_type.empty()) {
    meta["rope_scaling"] = {{"type", model.rope_scaling_type},
                            {"factor", model.rope_scaling_factor}};
  }
  meta["kv_cache_dtype"] = model.kv_cache_dtype;
  meta["block_size"] = model.block_size;
  meta["kv_capacity_tokens"] = model.kv_capacity_tokens;
  meta["kv_bytes_per_token"] = {{"dense", model.kv_bytes_per_token_dense},
                                {"compressed", model.kv_bytes_per_token_compressed}};
  ordered_json& compression = meta["effective_compression"];
  compression["now"] = nullptr;
  if (const std::optional<double> now = effective_compression(stats, model)) {
    compression["now"] = rounded(*now, 1e4);
  }
  compression["at_context_length"] = rounded(model.compression_at_context_length, 1e4);
  meta["max_concurrency"] = rounded(model.max_concurrency, 1e4);
  meta["reasoning_parser"] = model.reasoning_parser;
  meta["tool_call_parser"] = model.tool_call_parser;
  ordered_json& features = meta["features"] = ordered_json::object();
  for (const FeatureInfo& feature : model.features) {
    ordered_json& entry = features[feature.name];
    entry["enabled"] = feature.enabled;
    entry["reason"] = feature.reason;
  }
  return meta;
}

ordered_json entry_json(const ModelInfo& model, const EngineStats& stats, const std::string& name) {
  ordered_json entry;
  entry["id"] = name;
  entry["object"] = "model";
  entry["created"] = model.created;
  entry["owned_by"] = "kvarn";
  entry["root"] = model.served_names.front();
  entry["max_model_len"] = model.max_model_len;
  entry["meta"] = meta_json(model, stats);
  return entry;
}

}  // namespace

std::string models_body(const ModelInfo& model, const EngineStats& stats) {
  ordered_json out;
  out["object"] = "list";
  ordered_json& data = out["data"] = ordered_json::array();
  for (const std::string& name : model.served_names) {
    data.push_back(entry_json(model, stats, name));
  }
  return dump_json(out);
}

std::optional<std::string> model_body(const ModelInfo& model, const EngineStats& stats,
                                      const std::string& name) {
  if (!model.serves(name)) return std::nullopt;
  return dump_json(entry_json(model, stats, name));
}

std::string version_body(const std::string& backend) {
  const BuildInfo& build = build_info();
  ordered_json out;
  out["version"] = build.version;
  out["commit"] = build.commit;
  out["build_type"] = build.build_type;
  out["cuda"] = nullptr;
  if (!build.cuda.empty()) out["cuda"] = build.cuda;
  out["cuda_archs"] = build.cuda_archs;
  out["backend"] = backend.starts_with("cuda") ? "cuda" : "cpu";
  out["api"] = {"openai-v1", "kvarn.v1"};
  return dump_json(out);
}

std::string health_body(HealthState state, const EngineStats& stats) {
  double seconds = 0;
  if (stats.last_step.time_since_epoch().count() != 0) {
    seconds =
        std::chrono::duration<double>(std::chrono::steady_clock::now() - stats.last_step).count();
  }
  ordered_json out;
  out["status"] = health_state_name(state);
  out["running"] = stats.running;
  out["waiting"] = stats.waiting;
  out["seconds_since_last_step"] = rounded(seconds, 1e3);
  return dump_json(out);
}

int health_http_status(HealthProbe probe, HealthState state) {
  switch (state) {
    case HealthState::kLoading:
      return probe == HealthProbe::kLive ? 200 : 503;
    case HealthState::kOk:
      return 200;
    case HealthState::kDraining:
      return probe == HealthProbe::kReady ? 503 : 200;
    case HealthState::kStalled:
    case HealthState::kFailed:
      return 503;
  }
  return 503;
}

std::string default_sampling_json(const SamplingDefaults& defaults) {
  ordered_json out;
  out["temperature"] = defaults.temperature;
  out["top_p"] = defaults.top_p;
  out["top_k"] = defaults.top_k;
  out["min_p"] = defaults.min_p;
  out["repetition_penalty"] = defaults.repetition_penalty;
  if (defaults.max_new_tokens.has_value()) out["max_new_tokens"] = *defaults.max_new_tokens;
  return dump_json(out);
}

}  // namespace kvarn
