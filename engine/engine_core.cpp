#include "engine/engine_core.h"

#include <fmt/format.h>

#include <algorithm>
#include <exception>
#include <utility>

#include "engine/kv_capacity.h"
#include "kernels/core/check.h"
#include "kernels/core/log.h"

namespace kvarn {

Result<int> resolve_max_model_len(const EngineConfig& config, const ModelRunner& runner) {
  const int64_t pool = longest_sequence(runner.kv_layout(), runner.num_pages());
  const int64_t model = runner.model_max_len();
  if (pool < 1) {
    return Status::resource_exhausted(fmt::format(
        "the KV pool of {} pages holds no sequence at all (one token needs {}); raise --kv-memory",
        runner.num_pages(), peak_pages(runner.kv_layout(), 1)));
  }
  if (config.max_model_len > model) {
    return Status::invalid_argument(
        fmt::format("--max-model-len {} exceeds the {} positions that the model supports; lower it",
                    config.max_model_len, model));
  }
  if (config.max_model_len > pool) {
    return Status::resource_exhausted(fmt::format(
        "--max-model-len {} needs {} pages, the KV pool has {}, which hold {} tokens of one "
        "sequence; set --max-model-len {} or raise --kv-memory",
        config.max_model_len, peak_pages(runner.kv_layout(), config.max_model_len),
        runner.num_pages(), pool, pool));
  }
  if (config.max_model_len > 0) return config.max_model_len;
  if (pool < model) {
    log_info(fmt::format("max_model_len_lowered model={} pool={} num_pages={}", model, pool,
                         runner.num_pages()));
  }
  return static_cast<int>(std::min(pool, model));
}

Result<std::unique_ptr<EngineCore>> EngineCore::create(const EngineConfig& config,
                                                       std::unique_ptr<ModelRunner> runner,
                                                       EngineObserver* observer) {
  KVARN_RETURN_IF_ERROR(config.validate());
  KVARN_ASSIGN_OR_RETURN(const int max_model_len, resolve_max_model_len(config, *runner));
  return std::unique_ptr<EngineCore>(
      new EngineCore(config, std::move(runner), observer, max_model_len));
}

EngineCore::EngineCore(const EngineConfig& config, std::unique_ptr<ModelRunner> runner,
                       EngineObserver* observer, int max_model_len)
    : runner_(std::move(runner)),
      observer_(observer),
      max_model_len_(max_model_len),
      capacity_tokens_(runner_->num_pages() * max_model_len /
                       peak_pages(runner_->kv_layout(), max_model_len)),
      rule_(config.reading_rule == "chunk_start" ? ReadingRule::kChunkStart
                                                 : ReadingRule::kPosition),
      blocks_(runner_->kv_layout(), runner_->num_pages(), config.enable_prefix_caching),
      scheduler_({.max_num_seqs = config.max_num_seqs,
                  .token_budget = token_budget(config),
                  .max_model_len = max_model_len,
                  .use_priority = config.scheduling_policy == "priority",
                  .max_queue_time = std::chrono::duration<double>(config.max_queue_seconds)},
                 blocks_),
      last_step_(now()) {}

Status EngineCore::check(const EngineRequest& request) const {
  const auto invalid = [](std::string message, std::string param) {
    return Status(StatusCode::kInvalidArgument, "invalid_value", std::move(message),
                  std::move(param));
  };
  if (request.sink == nullptr) return Status::internal("a request needs a sink for its events");
  if (request.prompt.empty()) return invalid("'prompt' must be at least 1 token, got 0", "prompt");
  if (request.n < 1) return invalid(fmt::format("'n' must be 1 or more, got {}", request.n), "n");
  if (request.stop.max_tokens < 0) {
    return invalid(fmt::format("'max_tokens' must be 0 or more, got {}", request.stop.max_tokens),
                   "max_tokens");
  }
  const int64_t prompt = static_cast<int64_t>(request.prompt.size());
  const int64_t total = prompt + request.stop.max_tokens;
  if (total > max_model_len_) {
    return {StatusCode::kInvalidArgument, "context_length_exceeded",
            fmt::format("this model's context is {} tokens; the prompt has {} and {} were "
                        "requested: {} > {}",
                        max_model_len_, prompt, request.stop.max_tokens, total, max_model_len_)};
  }
  const int32_t vocab = runner_->vocab_size();
  const auto bad = std::find_if(request.prompt.begin(), request.prompt.end(),
                                [&](int32_t id) { return id < 0 || id >= vocab; });
  if (bad != request.prompt.end()) {
    return invalid(fmt::format("'prompt' must be token ids in 0..{}, got {}", vocab - 1, *bad),
                   "prompt");
  }
  return {};
}

void EngineCore::cancel_all(const Status& why) {
  for (const RequestId id : scheduler_.request_ids()) cancel(id, why);
}

void EngineCore::answer_all(const Status& why) { deliver(scheduler_.answer_all(why)); }

bool EngineCore::start_step() {
  plan_ = scheduler_.plan_step(now());
  if (observer_ != nullptr) {
    for (const auto& [id, choice] : plan_.preempted) observer_->on_preemption(id, choice);
  }
  if (plan_.empty()) return false;
  build_step_batch(plan_, blocks_, rule_, batch_);
  step_started_ = now();
  try {
    running_step_ = runner_->run(batch_);
  } catch (...) {
    std::promise<StepResult> failed;
    failed.set_exception(std::current_exception());
    running_step_ = failed.get_future();
  }
  return true;
}

bool EngineCore::wait_step(std::chrono::milliseconds timeout) {
  return running_step_.wait_for(timeout) == std::future_status::ready;
}

bool EngineCore::finish_step() {
  const auto fail = [&](StatusCode code, const char* reason, const char* message,
                        const char* detail) {
    log_error(fmt::format("step_failed step={} rows={} reason={} error=\"{}\"", plan_.step,
                          plan_.num_rows, reason, detail));
    deliver(scheduler_.fail_step(plan_, Status(code, reason, message)));
  };
  // The wire's text names the class of failure only; the log has the details.
  bool device_ok = true;
  try {
    StepResult result = running_step_.get();
    const bool finite = std::none_of(result.tokens.begin(), result.tokens.end(),
                                     [](const SampledToken& t) { return t.non_finite; });
    if (!finite) {
      fail(StatusCode::kInternal, "engine_error", "the engine failed in a step",
           "logits are not finite");
    } else if (result.tokens.size() != batch_.sampling.size()) {
      fail(StatusCode::kInternal, "engine_error", "the engine failed in a step",
           "the runner returned another number of tokens than asked for");
    } else {
      encode_seconds_ += result.encode_seconds;
      const int prefill_rows = plan_.prefill_rows;
      const int decode_rows = plan_.num_rows - prefill_rows;
      deliver(scheduler_.complete_step(plan_, std::move(result)));
      if (observer_ != nullptr) {
        observer_->on_step(std::chrono::duration<double>(now() - step_started_).count(),
                           prefill_rows, decode_rows);
      }
    }
  } catch (const DeviceLost& error) {
    fail(StatusCode::kUnavailable, "engine_unavailable", "the engine lost its device",
         error.what());
    device_ok = false;
    if (observer_ != nullptr) observer_->on_device_lost();
  } catch (const std::exception& error) {
    fail(StatusCode::kInternal, "engine_error", "the engine failed in a step", error.what());
  } catch (...) {
    fail(StatusCode::kInternal, "engine_error", "the engine failed in a step",
         "an exception of unknown type");
  }
  last_step_ = now();
  return device_ok;
}

void EngineCore::check_integrity() {
  CHECK(scheduler_.idle(), "pages can be checked when no sequence holds any");
  const int64_t leaked = blocks_.audit(/*idle=*/true);
  if (leaked == leaked_pages_) return;
  leaked_pages_ = leaked;
  const BlockStats& stats = blocks_.stats();
  log_error(fmt::format("kv_pages_leaked pages={} free={} cached={} in_use={} total={}", leaked,
                        stats.pages_free, stats.pages_cached, stats.pages_in_use,
                        stats.pages_total));
}

EngineStats EngineCore::stats() const {
  const BlockStats& pages = blocks_.stats();
  const SchedulerCounters& counters = scheduler_.counters();
  EngineStats stats;
  stats.running = scheduler_.num_running();
  stats.waiting_deferred = scheduler_.num_deferred();
  stats.waiting = scheduler_.num_waiting() + stats.waiting_deferred;
  stats.pages_total = pages.pages_total;
  stats.pages_free = pages.pages_free;
  stats.pages_cached = pages.pages_cached;
  stats.pages_in_use = pages.pages_in_use;
  stats.coded_pages = pages.coded_pages;
  stats.sink_pages = pages.sink_pages;
  stats.tail_pages = pages.tail_pages;
  stats.dense_pages = pages.dense_pages;
  stats.live_tokens = pages.live_tokens;
  stats.cached_tokens = pages.cached_tokens;
  stats.capacity_tokens = capacity_tokens_;
  stats.leaked_pages = leaked_pages_;
  stats.steps_prefill = counters.steps_prefill;
  stats.steps_decode = counters.steps_decode;
  stats.steps_mixed = counters.steps_mixed;
  stats.prompt_tokens = counters.prompt_tokens;
  stats.prompt_tokens_cached = counters.prompt_tokens_cached;
  stats.generation_tokens = counters.generation_tokens;
  stats.prefix_queries = counters.prefix_queries;
  stats.prefix_hits = counters.prefix_hits;
  stats.preemptions = counters.preemptions;
  stats.tiles_encoded = counters.tiles_encoded;
  stats.coded_block_reads = counters.coded_block_reads;
  stats.encode_seconds = encode_seconds_;
  stats.last_step = last_step_;
  return stats;
}

void EngineCore::deliver(std::vector<OutgoingEvent> events) {
  for (OutgoingEvent& event : events) event.sink->on_event(event.id, std::move(event.event));
}

}  // namespace kvarn
