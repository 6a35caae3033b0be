#include "server/metrics.h"

#include <array>
#include <chrono>
#include <map>
#include <mutex>
#include <utility>
#include <vector>

#include <fmt/core.h>

#include "server/build_info.h"
#include "server/prometheus_text.h"

namespace kvarn {
namespace {

const std::vector<double> kIterationTokens{1,   8,    16,   32,   64,   128,  256,
                                           512, 1024, 2048, 4096, 8192, 16384};
const std::vector<double> kFirstToken{.001, .005, .01, .02, .04, .06, .08, .1, .25, .5,  .75,
                                      1,    2.5,  5,   7.5, 10,  20,  40,  80, 160, 640, 2560};
const std::vector<double> kInterToken{.01, .025, .05, .075, .1,  .15, .2, .3, .4, .5,
                                      .75, 1,    2.5, 5,    7.5, 10,  20, 40, 80};
const std::vector<double> kRequestSeconds{.3, .5, .8, 1,  1.5, 2,   2.5, 5,   10,   15,  20,
                                          30, 40, 50, 60, 120, 240, 480, 960, 1920, 7680};
const std::vector<double> kStepSeconds{.0005, .001, .002, .005, .01, .02, .05,
                                       .1,    .2,   .5,   1,    2,   5,   10};
const std::vector<double> kRequestN{1, 2, 5, 10, 20};
const std::vector<double> kPreemptions{1, 2, 3, 4, 5, 10, 20};
constexpr double kUnknownModelLen = 100000;  // bounds of token histograms until the model is known

constexpr std::array kShedReasons = {"queue_full", "queue_timeout", "model_loading",
                                     "server_draining", "too_many_connections"};
constexpr std::array kAbortReasons = {"client_gone",       "slow_reader",     "deadline_exceeded",
                                      "request_aborted",   "server_shutdown", "engine_error",
                                      "engine_unavailable"};
constexpr std::array kOutcomes = {"stop", "length", "abort", "error"};
constexpr std::array kStepKinds = {"prefill", "decode", "mixed"};

using LabelledCounts = std::map<std::vector<std::string>, uint64_t>;

double number(auto value) { return static_cast<double>(value); }

}  // namespace

class Metrics::Impl {
 public:
  Impl(std::string name, bool vllm)
      : model_name(std::move(name)), prefix(vllm ? "vllm:" : "kvarn:") {
    for (const char* reason : kShedReasons) shed[{reason}] = 0;
    for (const char* reason : kAbortReasons) aborted[{reason}] = 0;
    for (const char* parser : {"hermes", "qwen3_coder"}) {
      for (const char* result : {"ok", "malformed"}) tool_calls[{parser, result}] = 0;
    }
    for (const char* kind : {"cuda", "nccl"}) device_errors[{kind}] = 0;
  }

  std::string standard(std::string_view name) const { return fmt::format("{}{}", prefix, name); }

  void write_engine(PrometheusPage& page, const EngineStats& stats) const;
  void write_kv(PrometheusPage& page, const EngineStats& stats) const;
  void write_requests(PrometheusPage& page) const;
  void write_server(PrometheusPage& page) const;
  void write_counts(PrometheusPage& page, std::string_view name, std::string_view help,
                    const std::vector<std::string>& labels, const LabelledCounts& counts) const;
  void write_histogram(PrometheusPage& page, std::string_view name, std::string_view help,
                       const Histogram& histogram) const {
    page.family(standard(name), "histogram", help);
    page.histogram(standard(name), {}, histogram);
  }

  mutable std::mutex mutex;
  const std::string model_name;
  const std::string prefix;
  std::optional<ModelInfo> model;
  std::map<std::pair<RequestId, int>, int> preemptions;  // of sequences that still run

  Histogram iteration_tokens{kIterationTokens};
  std::array<Histogram, 3> step_seconds{Histogram{kStepSeconds}, Histogram{kStepSeconds},
                                        Histogram{kStepSeconds}};
  Histogram prompt_tokens{one_two_five(kUnknownModelLen)};
  Histogram generation_tokens{one_two_five(kUnknownModelLen)};
  Histogram max_tokens{one_two_five(kUnknownModelLen)};
  Histogram request_n{kRequestN}, num_preemptions{kPreemptions};
  Histogram first_token{kFirstToken}, inter_token{kInterToken};
  Histogram e2e{kRequestSeconds}, queue{kRequestSeconds}, inference{kRequestSeconds},
      prefill{kRequestSeconds}, decode{kRequestSeconds};
  std::array<uint64_t, 4> outcomes{};
  LabelledCounts shed, aborted, tool_calls, device_errors, http_requests, grpc_requests;
  int64_t http_connections = 0;
  uint64_t sse_pings = 0;
  std::atomic<int64_t> outbox_bytes{0};
};

Metrics::Metrics(std::string model_name, bool vllm_names)
    : impl_(std::make_unique<Impl>(std::move(model_name), vllm_names)) {}
Metrics::~Metrics() = default;

void Metrics::set_model(const ModelInfo& model) {
  const std::lock_guard lock(impl_->mutex);
  impl_->model = model;
  const std::vector<double> bounds = one_two_five(model.max_model_len);
  impl_->prompt_tokens = Histogram{bounds};
  impl_->generation_tokens = Histogram{bounds};
  impl_->max_tokens = Histogram{bounds};
}

void Metrics::on_step(double seconds, int prefill_tokens, int decode_tokens) {
  const std::lock_guard lock(impl_->mutex);
  const size_t kind = prefill_tokens == 0 ? 1 : decode_tokens == 0 ? 0 : 2;
  impl_->step_seconds[kind].observe(seconds);
  impl_->iteration_tokens.observe(prefill_tokens + decode_tokens);
}

void Metrics::on_preemption(RequestId id, int choice) {
  const std::lock_guard lock(impl_->mutex);
  ++impl_->preemptions[{id, choice}];
}

void Metrics::request_accepted(int64_t n) {
  const std::lock_guard lock(impl_->mutex);
  impl_->request_n.observe(number(n));
}

void Metrics::time_to_first_token(double seconds) {
  const std::lock_guard lock(impl_->mutex);
  impl_->first_token.observe(seconds);
}

void Metrics::inter_token(double seconds) {
  const std::lock_guard lock(impl_->mutex);
  impl_->inter_token.observe(seconds);
}

void Metrics::sequence_finished(const SequenceRecord& record) {
  const std::lock_guard lock(impl_->mutex);
  ++impl_->outcomes[static_cast<size_t>(record.outcome)];
  impl_->prompt_tokens.observe(number(record.prompt_tokens));
  impl_->generation_tokens.observe(number(record.generation_tokens));
  impl_->max_tokens.observe(number(record.max_tokens));
  const auto preempted = impl_->preemptions.find({record.engine_id, record.choice});
  impl_->num_preemptions.observe(preempted == impl_->preemptions.end() ? 0 : preempted->second);
  if (preempted != impl_->preemptions.end()) impl_->preemptions.erase(preempted);
  const auto observe = [](Histogram& histogram, double seconds) {
    if (seconds >= 0) histogram.observe(seconds);
  };
  observe(impl_->e2e, record.e2e);
  observe(impl_->queue, record.queue);
  observe(impl_->inference, record.inference);
  observe(impl_->prefill, record.prefill);
  observe(impl_->decode, record.decode);
}

void Metrics::request_shed(std::string_view code) {
  const std::lock_guard lock(impl_->mutex);
  ++impl_->shed[{std::string(code)}];
}

void Metrics::request_aborted(std::string_view code) {
  const std::lock_guard lock(impl_->mutex);
  ++impl_->aborted[{std::string(code)}];
}

void Metrics::tool_call(std::string_view parser, bool ok) {
  const std::lock_guard lock(impl_->mutex);
  ++impl_->tool_calls[{std::string(parser), ok ? "ok" : "malformed"}];
}

void Metrics::device_error(std::string_view kind) {
  const std::lock_guard lock(impl_->mutex);
  ++impl_->device_errors[{std::string(kind)}];
}

void Metrics::http_request(std::string_view route, std::string_view method, int status) {
  const std::lock_guard lock(impl_->mutex);
  ++impl_->http_requests[{std::string(route), std::string(method), fmt::format("{}", status)}];
}

void Metrics::grpc_request(std::string_view rpc, std::string_view code) {
  const std::lock_guard lock(impl_->mutex);
  ++impl_->grpc_requests[{std::string(rpc), std::string(code)}];
}

void Metrics::add_http_connections(int64_t delta) {
  const std::lock_guard lock(impl_->mutex);
  impl_->http_connections += delta;
}

std::atomic<int64_t>& Metrics::outbox_bytes() { return impl_->outbox_bytes; }

void Metrics::sse_ping() {
  const std::lock_guard lock(impl_->mutex);
  ++impl_->sse_pings;
}

std::optional<double> effective_compression(const EngineStats& stats, const ModelInfo& model) {
  if (stats.live_tokens <= 0 || stats.pages_in_use <= 0 || model.page_id_bytes == 0) {
    return std::nullopt;
  }
  return number(stats.live_tokens) * number(model.kv_bytes_per_token_dense) /
         (number(stats.pages_in_use) * number(model.page_id_bytes));
}

std::string Metrics::render(const EngineStats& stats) const {
  const std::lock_guard lock(impl_->mutex);
  PrometheusPage page({{"model_name", impl_->model_name}, {"engine", "0"}});
  impl_->write_engine(page, stats);
  impl_->write_kv(page, stats);
  impl_->write_requests(page);
  impl_->write_server(page);
  return page.take();
}

void Metrics::Impl::write_engine(PrometheusPage& page, const EngineStats& stats) const {
  page.gauge(standard("num_requests_running"), "Sequences in the running batch.",
             number(stats.running));
  page.gauge(standard("num_requests_waiting"), "Sequences that wait to run.",
             number(stats.waiting));
  const std::string by_reason = standard("num_requests_waiting_by_reason");
  page.family(by_reason, "gauge", "Sequences that wait to run, by what they wait for.");
  page.sample(by_reason, {{"reason", "capacity"}}, number(stats.waiting - stats.waiting_deferred));
  page.sample(by_reason, {{"reason", "deferred"}}, number(stats.waiting_deferred));
  page.gauge(standard("kv_cache_usage_perc"),
             "Pages held by live sequences / all pages, 0 to 1; cached pages count as free.",
             stats.pages_total == 0 ? 0 : number(stats.pages_in_use) / number(stats.pages_total));
  page.counter(standard("prefix_cache_queries_total"),
               "Prompt tokens looked up in the prefix cache.", number(stats.prefix_queries));
  page.counter(standard("prefix_cache_hits_total"), "Prompt tokens found in the prefix cache.",
               number(stats.prefix_hits));
  page.counter(standard("prompt_tokens_total"), "Prompt tokens, cached ones included.",
               number(stats.prompt_tokens));
  page.counter(standard("prompt_tokens_cached_total"),
               "Prompt tokens served from the prefix cache.", number(stats.prompt_tokens_cached));
  page.counter(standard("generation_tokens_total"), "Generated tokens.",
               number(stats.generation_tokens));
  page.counter(standard("num_preemptions_total"), "Preempted sequences.",
               number(stats.preemptions));
  write_histogram(page, "iteration_tokens_total", "Tokens computed per step, prompt and generated.",
                  iteration_tokens);
  page.family("kvarn:steps_total", "counter", "Steps of the engine.");
  const std::array steps = {stats.steps_prefill, stats.steps_decode, stats.steps_mixed};
  for (size_t kind = 0; kind < kStepKinds.size(); ++kind) {
    page.sample("kvarn:steps_total", {{"kind", kStepKinds[kind]}}, number(steps[kind]));
  }
  page.family("kvarn:step_seconds", "histogram", "Duration of a step.");
  for (size_t kind = 0; kind < kStepKinds.size(); ++kind) {
    page.histogram("kvarn:step_seconds", {{"kind", kStepKinds[kind]}}, step_seconds[kind]);
  }
  const auto since = std::chrono::steady_clock::now() - stats.last_step;
  page.gauge("kvarn:seconds_since_last_step", "Time since the engine finished a step.",
             stats.last_step.time_since_epoch().count() == 0
                 ? 0
                 : std::chrono::duration<double>(since).count());
}

void Metrics::Impl::write_kv(PrometheusPage& page, const EngineStats& stats) const {
  const ModelInfo info = model.value_or(ModelInfo{});
  page.family(standard("cache_config_info"), "gauge", "Settings of the KV cache, as labels.");
  page.sample(standard("cache_config_info"),
              {{"block_size", fmt::format("{}", info.block_size)},
               {"cache_dtype", info.kv_cache_dtype},
               {"num_gpu_blocks", fmt::format("{}", info.total_kv_blocks)},
               {"kv_cache_size_tokens", fmt::format("{}", info.kv_capacity_tokens)},
               {"kv_cache_max_concurrency", fmt::format("{:.2f}", info.max_concurrency)},
               {"enable_prefix_caching", info.enable_prefix_caching ? "True" : "False"},
               {"gpu_memory_utilization", fmt::format("{}", info.gpu_memory_utilization)}},
              1);
  const double page_bytes = number(info.page_id_bytes);
  const double codes_share =
      info.page_bytes == 0 ? 0 : number(info.tile_code_bytes) / number(info.page_bytes);
  const double coded_bytes = number(stats.coded_pages) * page_bytes;
  page.family("kvarn:kv_bytes", "gauge", "Bytes of the KV pool by what they hold.");
  const std::array<std::pair<const char*, double>, 6> classes = {{
      {"tile_codes", coded_bytes * codes_share},
      {"tile_scales", coded_bytes - coded_bytes * codes_share},
      {"sink", number(stats.sink_pages) * page_bytes},
      {"tail", number(stats.tail_pages) * page_bytes},
      {"dense", number(stats.dense_pages) * page_bytes},
      {"free", number(stats.pages_free) * page_bytes},
  }};
  for (const auto& [name, bytes] : classes) {
    page.sample("kvarn:kv_bytes", {{"class", name}}, bytes);
  }
  page.family("kvarn:kv_tokens", "gauge", "Tokens in the KV pool.");
  page.sample("kvarn:kv_tokens", {{"state", "live"}}, number(stats.live_tokens));
  page.sample("kvarn:kv_tokens", {{"state", "cached"}}, number(stats.cached_tokens));
  page.sample("kvarn:kv_tokens", {{"state", "capacity"}}, number(info.kv_capacity_tokens));
  page.gauge("kvarn:kv_effective_compression",
             "Bytes the live tokens would need dense / bytes their pages hold; 1 when idle.",
             effective_compression(stats, info).value_or(1));
  page.gauge("kvarn:kv_pages_leaked",
             "Pages that are neither free, cached nor in use, found when idle; 0, or a bug.",
             number(stats.leaked_pages));
  page.counter("kvarn:tiles_compressed_total", "Tiles that were encoded.",
               number(stats.tiles_encoded));
  page.counter("kvarn:tile_compress_seconds_total", "Time spent encoding tiles.",
               stats.encode_seconds);
}

void Metrics::Impl::write_requests(PrometheusPage& page) const {
  page.family(standard("request_success_total"), "counter", "Finished choices.");
  for (size_t outcome = 0; outcome < kOutcomes.size(); ++outcome) {
    page.sample(standard("request_success_total"), {{"finished_reason", kOutcomes[outcome]}},
                number(outcomes[outcome]));
  }
  write_histogram(page, "request_prompt_tokens", "Prompt tokens of a sequence.", prompt_tokens);
  write_histogram(page, "request_generation_tokens", "Generated tokens of a sequence.",
                  generation_tokens);
  write_histogram(page, "request_params_max_tokens", "Output limit of a sequence.", max_tokens);
  write_histogram(page, "request_params_n", "Choices of a request.", request_n);
  write_histogram(page, "request_num_preemptions", "Preemptions of a sequence.", num_preemptions);
  write_histogram(page, "time_to_first_token_seconds", "From acceptance to the first token.",
                  first_token);
  write_histogram(page, "inter_token_latency_seconds",
                  "Time between tokens, one observation per token after the first.", inter_token);
  write_histogram(page, "e2e_request_latency_seconds", "From acceptance to the end.", e2e);
  write_histogram(page, "request_queue_time_seconds", "From acceptance to the schedule.", queue);
  write_histogram(page, "request_inference_time_seconds", "From the schedule to the end.",
                  inference);
  write_histogram(page, "request_prefill_time_seconds", "From the schedule to the first token.",
                  prefill);
  write_histogram(page, "request_decode_time_seconds", "From the first token to the end.", decode);
}

void Metrics::Impl::write_counts(PrometheusPage& page, std::string_view name, std::string_view help,
                                 const std::vector<std::string>& labels,
                                 const LabelledCounts& counts) const {
  page.family(name, "counter", help);
  for (const auto& [values, count] : counts) {
    Labels pairs;
    for (size_t i = 0; i < labels.size(); ++i) pairs.emplace_back(labels[i], values[i]);
    page.sample(name, pairs, number(count));
  }
}

void Metrics::Impl::write_server(PrometheusPage& page) const {
  write_counts(page, "kvarn:requests_shed_total", "Requests that were never started.", {"reason"},
               shed);
  write_counts(page, "kvarn:requests_aborted_total", "Requests that ended early.", {"reason"},
               aborted);
  write_counts(page, "kvarn:http_requests_total", "Answered HTTP requests.",
               {"route", "method", "status"}, http_requests);
  write_counts(page, "kvarn:grpc_requests_total", "Answered RPCs.", {"rpc", "code"}, grpc_requests);
  page.gauge("kvarn:http_connections", "Open HTTP connections.", number(http_connections));
  page.gauge("kvarn:outbox_bytes", "Bytes that wait for clients to read.",
             number(outbox_bytes.load(std::memory_order_relaxed)));
  page.counter("kvarn:sse_pings_total", "Keep-alive comments sent.", number(sse_pings));
  write_counts(page, "kvarn:tool_calls_total", "Tool calls in outputs.", {"parser", "result"},
               tool_calls);
  write_counts(page, "kvarn:device_errors_total", "Device errors.", {"kind"}, device_errors);
  page.family("kvarn:feature_enabled", "gauge", "1 where the feature is on; the reason where not.");
  for (const FeatureInfo& feature : model.value_or(ModelInfo{}).features) {
    page.sample("kvarn:feature_enabled", {{"feature", feature.name}, {"reason", feature.reason}},
                feature.enabled ? 1 : 0);
  }
  page.family("kvarn:build_info", "gauge", "The build, as labels.");
  page.sample("kvarn:build_info",
              {{"version", build_info().version},
               {"commit", build_info().commit},
               {"backend", model.value_or(ModelInfo{}).backend}},
              1);
}

}  // namespace kvarn
