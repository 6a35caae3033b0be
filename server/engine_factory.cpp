#include "server/engine_factory.h"

#include <system_error>

#include <fmt/format.h>

#include "kernels/core/log.h"

namespace kvarn {
namespace {

Status check_model_flag(const EngineConfig& config) {
  const bool dummy_shape = config.load_format == "dummy" && !config.shape.empty();
  if (config.model.empty()) {
    if (dummy_shape) return Status::ok();
    return Status::invalid_argument(
        "--model is required: a directory with config.json, tokenizer.json and *.safetensors (or, "
        "for benchmarks, --load-format dummy --shape qwen3-0.6b)");
  }
  std::error_code error;
  if (std::filesystem::is_directory(config.model, error)) return Status::ok();
  const bool exists = std::filesystem::exists(config.model, error);
  return Status::invalid_argument(
      fmt::format("--model '{}' {}; give the directory that holds config.json, tokenizer.json and "
                  "*.safetensors (names of a model hub are not in this version)",
                  config.model, exists ? "is not a directory" : "does not exist"));
}

}  // namespace

Status check_model(const EngineConfig& config) {
  KVARN_RETURN_IF_ERROR(check_model_flag(config));
  KVARN_ASSIGN_OR_RETURN(const ModelConfig model, read_model_config(model_source(config)));
  return resolve_kv_format(config.kv_cache_dtype, model.head_dim).status();
}

ModelSource model_source(const EngineConfig& config) {
  ModelSource source;
  source.path = config.model;
  source.format = config.load_format == "dummy" ? LoadFormat::kDummy : LoadFormat::kAuto;
  source.shape = config.shape;
  source.max_model_len = config.max_model_len;
  return source;
}

Result<std::unique_ptr<Backend>> choose_backend(const EngineConfig& config) {
  std::string why = "--device cpu";
  if (config.device != "cpu") {
    Result<std::unique_ptr<Backend>> cuda = make_cuda_backend(0);
    if (cuda.is_ok()) {
      log_info(fmt::format("backend name=\"{}\" device={}", (*cuda)->name(), config.device));
      return cuda;
    }
    const Status& error = cuda.status();
    // "No GPU here" is an ordinary answer under auto; any other trouble with one is not.
    if (config.device == "cuda" || error.code() != StatusCode::kUnavailable) {
      return Status(error.code(), error.reason(),
                    fmt::format("--device {}: {}", config.device, error.message()));
    }
    why = error.message();
  }
  CpuOptions options;
  options.threads = config.threads;
  std::unique_ptr<Backend> backend = make_cpu_backend(options);
  log_info(fmt::format("backend name=\"{}\" device={} reason=\"{}\"", backend->name(),
                       config.device, why));
  return backend;
}

Result<LoadedEngine> load_engine(const EngineConfig& config, EngineObserver* observer) {
  KVARN_RETURN_IF_ERROR(check_model(config));
  KVARN_ASSIGN_OR_RETURN(std::unique_ptr<Backend> backend, choose_backend(config));
  LoadedEngine loaded;
  loaded.backend_name = backend->name();
  loaded.on_gpu = backend->device_memory().has_value();
  loaded.config = config;
  loaded.config.device = loaded.on_gpu ? "cuda" : "cpu";  // step budgets follow the device
  if (!config.model.empty()) {
    loaded.model_dir = config.model;
    loaded.tokenizer_path = loaded.model_dir / "tokenizer.json";
  }
  KVARN_ASSIGN_OR_RETURN(std::unique_ptr<Model> model, load_model(model_source(config), *backend));
  loaded.model_config = model->config();
  KVARN_ASSIGN_OR_RETURN(
      std::unique_ptr<ModelRunner> runner,
      make_model_runner(loaded.config, std::move(backend), std::move(model), &loaded.memory_plan));
  loaded.kv_layout = runner->kv_layout();
  KVARN_ASSIGN_OR_RETURN(loaded.engine, Engine::create(loaded.config, std::move(runner), observer));
  return loaded;
}

}  // namespace kvarn
