// Bodies of the endpoints that only tell: models, health, version. Pure.
#pragma once

#include <optional>
#include <string>

#include "engine/engine.h"
#include "server/health.h"
#include "server/model_info.h"

namespace kvarn {

// {"object":"list","data":[...]}, one entry per served name.
std::string models_body(const ModelInfo& model, const EngineStats& stats);
// One entry; nothing where the name is not served.
std::optional<std::string> model_body(const ModelInfo& model, const EngineStats& stats,
                                      const std::string& name);
std::string version_body(const std::string& backend);

std::string health_body(HealthState state, const EngineStats& stats);
enum class HealthProbe : uint8_t { kHealth, kLive, kReady };
// 200 or 503, by the table of docs/api.md "Health".
int health_http_status(HealthProbe probe, HealthState state);

// What "gc" of the docs resolved to, as JSON (GetModelInfo.default_sampling_json).
std::string default_sampling_json(const SamplingDefaults& defaults);

}  // namespace kvarn
