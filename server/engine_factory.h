// EngineConfig -> a running engine: the start-up that every command shares. Picks the backend (and
// logs why), reads the model, makes the runner with its KV pool and starts the engine thread.
#pragma once

#include <filesystem>
#include <memory>
#include <string>

#include "engine/config.h"
#include "engine/engine.h"
#include "engine/model_runner.h"
#include "kernels/backend.h"
#include "models/model.h"

namespace kvarn {

// Everything a front end needs to know about the engine it serves.
struct LoadedEngine {
  EngineConfig config;  // with the device that was chosen instead of "auto"
  std::unique_ptr<Engine> engine;
  ModelConfig model_config;
  KvLayout kv_layout{};
  MemoryPlan memory_plan;
  std::string backend_name;  // "cpu (avx512_bf16, 2 threads)"
  bool on_gpu = false;
  // The model's directory: tokenizer.json, tokenizer_config.json and generation_config.json lie
  // here. Empty for dummy weights of a public shape, which have no tokenizer.
  std::filesystem::path model_dir;
  std::filesystem::path tokenizer_path;  // model_dir / "tokenizer.json"; empty as above
};

// Blocks until the engine runs. `observer` may be null and must outlive the engine. Errors name the
// flag or file at fault and the fix.
Result<LoadedEngine> load_engine(const EngineConfig& config, EngineObserver* observer);

// What can be known of the model before it is loaded: --model is there, its config.json is sound,
// and
// --kv-cache-dtype suits it. Errors name the flag or file at fault and the fix.
Status check_model(const EngineConfig& config);

// The steps of load_engine for commands that talk to the model directly (`eval`, `inspect`).
ModelSource model_source(const EngineConfig& config);
// --device auto falls back to the CPU and logs the reason once; cuda fails loudly without a GPU.
Result<std::unique_ptr<Backend>> choose_backend(const EngineConfig& config);

}  // namespace kvarn
