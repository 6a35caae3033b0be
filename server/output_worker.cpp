#include "server/output_worker.h"

#include <atomic>
#include <condition_variable>
#include <mutex>
#include <thread>
#include <unordered_set>
#include <utility>

#include "kernels/core/check.h"
#include "server/choice_output.h"
#include "server/http_status.h"
#include "server/metrics.h"

namespace kvarn {
namespace {

using Clock = std::chrono::steady_clock;

double seconds_between(Clock::time_point from, Clock::time_point to) {
  return std::chrono::duration<double>(to - from).count();
}

// Never started; the rest ended early.
bool is_shed(const std::string& reason) {
  return reason == "queue_full" || reason == "queue_timeout" || reason == "server_draining";
}

struct Generating;

// What the engine said, with the time at which it did: workers may lag.
struct Task {
  std::shared_ptr<Generating> generation;
  size_t prompt = 0;
  EngineEvent event;
  Clock::time_point at;
};

// One worker's inbox. Sinks share it, so an event after the worker's end is dropped, not a fault.
class Inbox {
 public:
  void push(Task task) {
    {
      const std::lock_guard lock(mutex_);
      if (closed_) return;
      tasks_.push_back(std::move(task));
    }
    ready_.notify_one();
  }
  // Waits for tasks; false: closed and empty.
  bool take(std::vector<Task>& tasks) {
    std::unique_lock lock(mutex_);
    ready_.wait(lock, [this] { return closed_ || !tasks_.empty(); });
    tasks.swap(tasks_);
    return !tasks.empty();
  }
  void close() {
    {
      const std::lock_guard lock(mutex_);
      closed_ = true;
    }
    ready_.notify_one();
  }

 private:
  std::mutex mutex_;
  std::condition_variable ready_;
  std::vector<Task> tasks_;
  bool closed_ = false;
};

struct ChoiceTimes {
  Clock::time_point first_token, last_token;
  bool has_token = false;
};

struct PromptOutput {
  OutputPlan plan;
  OutputRules rules;
  std::vector<ChoiceOutput> choices;
  std::vector<ChoiceTimes> times;
  Clock::time_point scheduled_at;
  bool scheduled = false;
};

// All prompts of one request. Touched by its worker only, after open().
struct Generating : std::enable_shared_from_this<Generating> {
  std::string response_id;
  std::shared_ptr<TokenStream> stream;
  std::shared_ptr<Inbox> inbox;
  Clock::time_point accepted_at;
  std::function<void(const Status&)> on_end;
  std::vector<std::unique_ptr<PromptOutput>> prompts;
  int32_t choices_left = 0;
  Usage usage;
  bool ended = false;
};

class Sink : public EventSink {
 public:
  Sink(std::shared_ptr<Generating> generation, size_t prompt)
      : generation_(std::move(generation)), prompt_(prompt) {}
  void on_event(RequestId, EngineEvent event) override {
    generation_->inbox->push({generation_, prompt_, std::move(event), Clock::now()});
  }

 private:
  std::shared_ptr<Generating> generation_;
  size_t prompt_;
};

}  // namespace

class OutputWorkers::Impl {
 public:
  Impl(int threads, const Tokenizer& tokenizer, const OutputFormat& format, Engine& engine,
       Metrics& metrics)
      : tokenizer_(tokenizer), format_(format), engine_(engine), metrics_(metrics) {
    for (int i = 0; i < threads; ++i) inboxes_.push_back(std::make_shared<Inbox>());
    for (const auto& inbox : inboxes_) threads_.emplace_back([this, inbox] { work(*inbox); });
  }
  ~Impl() {
    for (const auto& inbox : inboxes_) inbox->close();
    for (std::thread& thread : threads_) thread.join();
  }

  std::vector<std::shared_ptr<EventSink>> open(std::vector<OutputPlan> plans,
                                               std::string response_id,
                                               std::shared_ptr<TokenStream> stream,
                                               Clock::time_point accepted_at,
                                               std::function<void(const Status&)> on_end);
  void fail_all(const Status& why);
  size_t active() const {
    const std::lock_guard lock(mutex_);
    return active_.size();
  }

 private:
  void work(Inbox& inbox);
  void handle(Generating& generation, size_t prompt, const PrefillEvent& event);
  void handle(Generating& generation, size_t prompt, const TokenEvent& event, Clock::time_point at);
  void fail(Generating& generation, const Status& why, Clock::time_point at);
  void send(Generating& generation, Delta delta);
  void finish_choice(Generating& generation, const PromptOutput& output, size_t choice,
                     SequenceOutcome outcome, Clock::time_point at);
  void close(Generating& generation, const Status& status);

  const Tokenizer& tokenizer_;
  const OutputFormat& format_;
  const OutputFormat plain_ = OutputFormat::plain();
  Engine& engine_;
  Metrics& metrics_;
  std::vector<std::shared_ptr<Inbox>> inboxes_;
  std::vector<std::thread> threads_;
  std::atomic<size_t> next_{0};
  mutable std::mutex mutex_;
  std::unordered_set<std::shared_ptr<Generating>> active_;
};

OutputWorkers::OutputWorkers(int threads, const Tokenizer& tokenizer, const OutputFormat& format,
                             Engine& engine, Metrics& metrics)
    : impl_(std::make_unique<Impl>(threads, tokenizer, format, engine, metrics)) {}
OutputWorkers::~OutputWorkers() = default;

std::vector<std::shared_ptr<EventSink>> OutputWorkers::open(
    std::vector<OutputPlan> plans, std::string response_id, std::shared_ptr<TokenStream> stream,
    Clock::time_point accepted_at, std::function<void(const Status&)> on_end) {
  return impl_->open(std::move(plans), std::move(response_id), std::move(stream), accepted_at,
                     std::move(on_end));
}
void OutputWorkers::fail_all(const Status& why) { impl_->fail_all(why); }
size_t OutputWorkers::active() const { return impl_->active(); }

std::vector<std::shared_ptr<EventSink>> OutputWorkers::Impl::open(
    std::vector<OutputPlan> plans, std::string response_id, std::shared_ptr<TokenStream> stream,
    Clock::time_point accepted_at, std::function<void(const Status&)> on_end) {
  auto generation = std::make_shared<Generating>();
  generation->response_id = std::move(response_id);
  generation->stream = std::move(stream);
  generation->inbox = inboxes_[next_.fetch_add(1) % inboxes_.size()];
  generation->accepted_at = accepted_at;
  generation->on_end = std::move(on_end);
  std::vector<std::shared_ptr<EventSink>> sinks;
  for (OutputPlan& plan : plans) {
    auto output = std::make_unique<PromptOutput>();
    output->plan = std::move(plan);
    const OutputPlan& p = output->plan;
    output->rules = {p.stop, p.min_tokens, p.include_stop_string, p.response};
    const OutputFormat& format = p.parse ? format_ : plain_;
    const OutputParser::State start = OutputParser::start_state(format, tokenizer_, p.prompt);
    for (int32_t i = 0; i < p.n; ++i) {
      output->choices.emplace_back(p.first_choice + i, tokenizer_, format, start, output->rules);
    }
    output->times.resize(static_cast<size_t>(p.n));
    generation->choices_left += p.n;
    sinks.push_back(std::make_shared<Sink>(generation, generation->prompts.size()));
    generation->prompts.push_back(std::move(output));
  }
  const std::lock_guard lock(mutex_);
  active_.insert(std::move(generation));
  return sinks;
}

void OutputWorkers::Impl::fail_all(const Status& why) {
  const std::lock_guard lock(mutex_);
  for (const auto& generation : active_) {
    generation->inbox->push({generation, 0, ErrorEvent{why}, Clock::now()});
  }
}

void OutputWorkers::Impl::work(Inbox& inbox) {
  std::vector<Task> tasks;
  while (inbox.take(tasks)) {
    for (Task& task : tasks) {
      Generating& generation = *task.generation;
      if (generation.ended) continue;
      if (const auto* error = std::get_if<ErrorEvent>(&task.event)) {
        fail(generation, error->status, task.at);
      } else if (const auto* prefill = std::get_if<PrefillEvent>(&task.event)) {
        handle(generation, task.prompt, *prefill);
      } else {
        handle(generation, task.prompt, std::get<TokenEvent>(task.event), task.at);
      }
    }
    tasks.clear();
  }
}

void OutputWorkers::Impl::handle(Generating& generation, size_t prompt, const PrefillEvent& event) {
  PromptOutput& output = *generation.prompts[prompt];
  output.scheduled = true;
  output.scheduled_at = event.scheduled_at;
  generation.usage.prompt_tokens += event.prompt_tokens;
  generation.usage.cached_tokens += event.cached_tokens;
  PromptInfo info;
  info.prompt_index = output.plan.prompt_index;
  info.num_prompt_tokens = event.prompt_tokens;
  info.num_cached_tokens = event.cached_tokens;
  if (output.plan.response.prompt_token_ids) info.token_ids = output.plan.prompt;
  generation.stream->push(std::move(info));
}

void OutputWorkers::Impl::send(Generating& generation, Delta delta) {
  if (generation.stream->push(std::move(delta))) return;
  // The outbox is full and the stream closed itself: free the blocks, others must not wait for it.
  const Status why(StatusCode::kCancelled, "slow_reader", "the client read too slowly");
  for (const auto& output : generation.prompts) engine_.cancel(output->plan.engine_id, why);
}

void OutputWorkers::Impl::handle(Generating& generation, size_t prompt, const TokenEvent& event,
                                 Clock::time_point at) {
  PromptOutput& output = *generation.prompts[prompt];
  const auto index = static_cast<size_t>(event.choice);
  CHECK(index < output.choices.size(), "the engine sent a token for a choice that does not exist");
  ChoiceOutput& choice = output.choices[index];
  if (choice.done()) return;  // sampled before the engine heard of the stop string
  ChoiceTimes& times = output.times[index];
  if (event.sampled.token >= 0) {
    if (times.has_token) {
      metrics_.inter_token(seconds_between(times.last_token, at));
    } else {
      metrics_.time_to_first_token(seconds_between(generation.accepted_at, at));
      times.first_token = at;
      times.has_token = true;
    }
    times.last_token = at;
  }
  std::vector<Delta> deltas;
  const bool first = choice.num_tokens() == 0;
  choice.push(event, deltas);
  if (first && !output.plan.echo.empty()) {
    Delta echo;
    echo.choice = output.plan.first_choice + event.choice;
    echo.text = output.plan.echo;
    deltas.insert(deltas.begin(), std::move(echo));
  }
  for (Delta& delta : deltas) {
    generation.usage.completion_tokens += delta.num_tokens;
    generation.usage.reasoning_tokens += delta.num_reasoning_tokens;
    send(generation, std::move(delta));
  }
  if (!choice.done()) return;
  if (choice.ended_by_stop_string()) {
    engine_.finish_choice(output.plan.engine_id, event.choice);
  }
  finish_choice(generation, output, index,
                choice.finish()->kind == FinishKind::kLength ? SequenceOutcome::kLength
                                                             : SequenceOutcome::kStop,
                at);
  if (--generation.choices_left == 0) close(generation, Status::ok());
}

void OutputWorkers::Impl::finish_choice(Generating& generation, const PromptOutput& output,
                                        size_t choice, SequenceOutcome outcome,
                                        Clock::time_point at) {
  const ChoiceTimes& times = output.times[choice];
  SequenceRecord record;
  record.engine_id = output.plan.engine_id;
  record.choice = static_cast<int32_t>(choice);
  record.outcome = outcome;
  record.prompt_tokens = std::ssize(output.plan.prompt);
  record.generation_tokens = output.choices[choice].num_tokens();
  record.max_tokens = output.plan.max_tokens;
  record.e2e = seconds_between(generation.accepted_at, at);
  if (output.scheduled) {
    record.queue = seconds_between(generation.accepted_at, output.scheduled_at);
    record.inference = seconds_between(output.scheduled_at, at);
    if (times.has_token) record.prefill = seconds_between(output.scheduled_at, times.first_token);
  }
  if (times.has_token) record.decode = seconds_between(times.first_token, at);
  metrics_.sequence_finished(record);
}

void OutputWorkers::Impl::fail(Generating& generation, const Status& why, Clock::time_point at) {
  const bool shed = is_shed(why.reason());
  const bool started = !shed && why.code() != StatusCode::kInvalidArgument;
  const SequenceOutcome outcome =
      why.code() == StatusCode::kInternal ? SequenceOutcome::kError : SequenceOutcome::kAbort;
  for (const auto& output : generation.prompts) {
    engine_.cancel(output->plan.engine_id, why);  // the other prompts; unknown ids are ignored
    for (size_t i = 0; started && i < output->choices.size(); ++i) {
      if (!output->choices[i].done()) finish_choice(generation, *output, i, outcome, at);
    }
  }
  if (shed) metrics_.request_shed(why.reason());
  if (started) metrics_.request_aborted(why.reason());
  close(generation, why);
}

void OutputWorkers::Impl::close(Generating& generation, const Status& status) {
  generation.ended = true;
  {
    const std::lock_guard lock(mutex_);
    active_.erase(generation.shared_from_this());
  }
  // Counted and forgotten first: who sees the end of the stream also sees the gauges without it.
  const std::function<void(const Status&)> on_end = std::move(generation.on_end);
  if (on_end) on_end(status);
  generation.stream->end({public_error(status, generation.response_id), generation.usage});
}

}  // namespace kvarn
