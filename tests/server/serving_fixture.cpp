#include "tests/server/serving_fixture.h"

#include <chrono>
#include <cstdlib>
#include <thread>

#include "kernels/core/check.h"
#include "kernels/core/log.h"
#include "server/model_files.h"

namespace kvarn::test {
namespace {

const std::string kDemoModel = std::string(KVARN_SOURCE_DIR) + "/assets/demo-model";
constexpr int kVocab = 6144;

ModelInfo model_info(const Engine& engine, const ServingOptions& options) {
  ModelInfo info;
  info.served_names = {"demo", "demo/alias"};
  info.architecture = "Qwen3ForCausalLM";
  info.vocab_size = kVocab;
  info.max_model_len = engine.max_model_len();
  info.kv_cache_dtype = "kvarn_k4v2_g128";
  info.kv_bytes_per_token_dense = 8192;
  info.page_bytes = 13824;
  info.tile_code_bytes = 12288;
  info.page_id_bytes = 13824 * 16;
  info.kv_capacity_tokens = engine.stats().capacity_tokens;
  info.eos_token_ids = {6118, kDemoEos};
  info.reasoning_parser = "qwen3";
  info.features = {{"kv_compression", true, ""}, {"lora", false, "It belongs to a later stage."}};
  info.max_num_seqs = options.engine.max_num_seqs;
  info.max_queued_requests = options.engine.max_queued_requests;
  info.created = 1790000000;
  info.system_fingerprint = "kvarn-test-00000000";
  info.backend = "cpu (fake)";
  return info;
}

}  // namespace

void Gate::close() {
  const std::lock_guard lock(mutex_);
  open_ = false;
}
void Gate::open() {
  const std::lock_guard lock(mutex_);
  open_ = true;
  changed_.notify_all();
}
void Gate::pass() {
  std::unique_lock lock(mutex_);
  changed_.wait(lock, [this] { return open_; });
}

ServingOptions::ServingOptions() {
  server.port = 0;
  server.grpc_port = 0;
  engine.max_model_len = 4096;
  engine.max_num_seqs = 64;
  engine.max_num_batched_tokens = 512;
  runner.num_pages = 4000;
  runner.model_max_len = 4096;
  runner.vocab_size = kVocab;
}

const Tokenizer& demo_tokenizer() {
  static const std::unique_ptr<Tokenizer> tokenizer =
      Tokenizer::load(kDemoModel + "/tokenizer.json").value();
  return *tokenizer;
}

Serving::Serving(ServingOptions options)
    : state(options.server, {"demo", "demo/alias"}), options_(std::move(options)) {
  set_log_level(LogLevel::kOff);
  http = HttpServer::start(state).value();
  lifecycle = std::make_unique<Lifecycle>(state, *http, nullptr);
  if (options_.loaded) load();
}

Serving::~Serving() {
  gate.open();
  http->stop(std::chrono::milliseconds(0));
  state.close_service();
}

void Serving::load() {
  FakeRunnerOptions runner = options_.runner;
  const auto before = runner.before_step;
  runner.before_step = [this, before](int64_t step, const StepBatch& batch) {
    gate.pass();
    if (before) before(step, batch);
  };
  runner.next_token = [this](uint64_t, const SamplingRow& row) { return next_token(row); };
  if (runner.step_time.count() == 0) runner.step_time = std::chrono::milliseconds(1);
  engine = Engine::create(options_.engine, std::make_unique<FakeModelRunner>(std::move(runner)),
                          &state.metrics)
               .value();
  GenerationService::Parts parts;
  parts.config = options_.server;
  parts.model = model_info(*engine, options_);
  parts.tokenizer = Tokenizer::load(kDemoModel + "/tokenizer.json").value();
  parts.chat_template = load_chat_template(kDemoModel).value();
  parts.engine = engine.get();
  parts.metrics = &state.metrics;
  state.metrics.set_model(parts.model);
  state.set_service(std::make_unique<GenerationService>(std::move(parts)));
  state.health.set(HealthState::kOk);
}

void Serving::script(int64_t seed, const std::string& text) {
  std::vector<int32_t> tokens = demo_tokenizer().encode(text);
  tokens.push_back(kDemoEos);
  script_tokens(seed, std::move(tokens));
}

void Serving::script_tokens(int64_t seed, std::vector<int32_t> tokens) {
  const std::lock_guard lock(scripts_mutex_);
  scripts_[static_cast<uint64_t>(seed)] = std::move(tokens);
}

int32_t Serving::next_token(const SamplingRow& row) {
  static const int32_t filler = demo_tokenizer().encode(" token").front();
  const std::lock_guard lock(scripts_mutex_);
  const auto script = scripts_.find(row.seed);
  if (script == scripts_.end()) return filler;
  return row.output_position < script->second.size() ? script->second[row.output_position] : filler;
}

bool Serving::wait_idle() const {
  const auto until = std::chrono::steady_clock::now() + std::chrono::seconds(10);
  while (std::chrono::steady_clock::now() < until) {
    const EngineStats stats = engine->stats();
    if (stats.running == 0 && stats.waiting == 0 && stats.pages_in_use == 0 &&
        state.service()->active() == 0) {
      return true;
    }
    std::this_thread::sleep_for(std::chrono::milliseconds(5));
  }
  return false;
}

}  // namespace kvarn::test
