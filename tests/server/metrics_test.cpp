// The metrics page: every series from the first scrape, exact counts, valid text format.
#include "server/metrics.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <map>
#include <regex>
#include <set>
#include <sstream>

namespace kvarn::test {
namespace {

using ::testing::HasSubstr;

const char* const kLabels = R"({model_name="demo",engine="0")";

std::map<std::string, double> samples(const std::string& page) {
  std::map<std::string, double> out;
  std::istringstream lines(page);
  for (std::string line; std::getline(lines, line);) {
    if (line.empty() || line[0] == '#') continue;
    const size_t space = line.rfind(' ');
    out[line.substr(0, space)] = std::stod(line.substr(space + 1));
  }
  return out;
}

TEST(Metrics, ShowEverySeriesFromTheFirstScrape) {
  const Metrics metrics("demo", true);
  const std::string page = metrics.render({});
  for (const char* family : {"vllm:num_requests_running",
                             "vllm:num_requests_waiting",
                             "vllm:num_requests_waiting_by_reason",
                             "vllm:kv_cache_usage_perc",
                             "vllm:cache_config_info",
                             "vllm:prefix_cache_queries_total",
                             "vllm:prefix_cache_hits_total",
                             "vllm:prompt_tokens_total",
                             "vllm:prompt_tokens_cached_total",
                             "vllm:generation_tokens_total",
                             "vllm:num_preemptions_total",
                             "vllm:request_success_total",
                             "vllm:iteration_tokens_total",
                             "vllm:request_prompt_tokens",
                             "vllm:request_generation_tokens",
                             "vllm:request_params_max_tokens",
                             "vllm:request_params_n",
                             "vllm:request_num_preemptions",
                             "vllm:time_to_first_token_seconds",
                             "vllm:inter_token_latency_seconds",
                             "vllm:e2e_request_latency_seconds",
                             "vllm:request_queue_time_seconds",
                             "vllm:request_inference_time_seconds",
                             "vllm:request_prefill_time_seconds",
                             "vllm:request_decode_time_seconds",
                             "kvarn:kv_bytes",
                             "kvarn:kv_tokens",
                             "kvarn:kv_effective_compression",
                             "kvarn:kv_pages_leaked",
                             "kvarn:tiles_compressed_total",
                             "kvarn:tile_compress_seconds_total",
                             "kvarn:steps_total",
                             "kvarn:step_seconds",
                             "kvarn:seconds_since_last_step",
                             "kvarn:requests_shed_total",
                             "kvarn:requests_aborted_total",
                             "kvarn:http_requests_total",
                             "kvarn:grpc_requests_total",
                             "kvarn:http_connections",
                             "kvarn:outbox_bytes",
                             "kvarn:sse_pings_total",
                             "kvarn:tool_calls_total",
                             "kvarn:device_errors_total",
                             "kvarn:feature_enabled",
                             "kvarn:build_info"}) {
    EXPECT_THAT(page, HasSubstr("# TYPE " + std::string(family) + " ")) << family;
    EXPECT_THAT(page, HasSubstr("# HELP " + std::string(family) + " ")) << family;
  }
  const auto values = samples(page);
  for (const char* series :
       {R"(kvarn:requests_shed_total{model_name="demo",engine="0",reason="queue_timeout"})",
        R"(kvarn:requests_aborted_total{model_name="demo",engine="0",reason="slow_reader"})",
        R"(vllm:request_success_total{model_name="demo",engine="0",finished_reason="length"})",
        R"(kvarn:steps_total{model_name="demo",engine="0",kind="mixed"})",
        R"(kvarn:kv_bytes{model_name="demo",engine="0",class="tile_codes"})",
        R"(vllm:time_to_first_token_seconds_bucket{model_name="demo",engine="0",le="+Inf"})"}) {
    ASSERT_TRUE(values.count(series)) << series;
    EXPECT_EQ(values.at(series), 0) << series;
  }
}

TEST(Metrics, AreValidTextFormat) {
  Metrics metrics("de\"mo\n\\", true);
  metrics.http_request("/v1/models/{id}", "GET", 200);
  metrics.time_to_first_token(0.03);
  metrics.on_step(0.01, 5, 3);
  const std::string page = metrics.render({});
  const std::regex sample(
      R"re([a-zA-Z_:][a-zA-Z0-9_:]*(\{([a-zA-Z_][a-zA-Z0-9_]*="([^"\\]|\\["\\n])*",?)*\})? (\+Inf|-?[0-9.e+-]+))re");
  std::set<std::string> seen;
  std::istringstream lines(page);
  for (std::string line; std::getline(lines, line);) {
    if (line.starts_with("# ")) continue;
    EXPECT_TRUE(std::regex_match(line, sample)) << line;
    EXPECT_TRUE(seen.insert(line.substr(0, line.rfind(' '))).second) << "twice: " << line;
  }
}

TEST(Metrics, CountExactly) {
  Metrics metrics("demo", true);
  metrics.on_preemption(7, 1);
  metrics.on_preemption(7, 1);
  metrics.on_step(0.003, 10, 0);
  metrics.on_step(0.003, 0, 4);
  metrics.on_step(0.3, 10, 4);
  SequenceRecord record;
  record.engine_id = 7;
  record.choice = 1;
  record.outcome = SequenceOutcome::kLength;
  record.prompt_tokens = 12;
  record.generation_tokens = 3;
  record.max_tokens = 3;
  record.e2e = 1.2;
  record.queue = 0.1;
  metrics.sequence_finished(record);
  metrics.request_shed("queue_full");
  metrics.request_aborted("client_gone");
  metrics.http_request("/health", "GET", 200);
  metrics.http_request("/health", "GET", 200);
  metrics.grpc_request("Generate", "OK");
  metrics.sse_ping();
  metrics.add_http_connections(3);
  metrics.add_http_connections(-1);
  metrics.outbox_bytes() += 5;
  EngineStats stats;
  stats.running = 2;
  stats.waiting = 5;
  stats.waiting_deferred = 1;
  stats.pages_total = 10;
  stats.pages_in_use = 4;
  stats.generation_tokens = 99;
  const auto values = samples(metrics.render(stats));
  const auto value = [&](const std::string& name, const std::string& labels = "") {
    const std::string key = name + kLabels + labels + "}";
    EXPECT_TRUE(values.count(key)) << key;
    return values.count(key) ? values.at(key) : -1;
  };
  EXPECT_EQ(value("vllm:num_requests_running"), 2);
  EXPECT_EQ(value("vllm:num_requests_waiting_by_reason", ",reason=\"capacity\""), 4);
  EXPECT_EQ(value("vllm:num_requests_waiting_by_reason", ",reason=\"deferred\""), 1);
  EXPECT_EQ(value("vllm:kv_cache_usage_perc"), 0.4);
  EXPECT_EQ(value("vllm:generation_tokens_total"), 99);
  EXPECT_EQ(value("vllm:request_success_total", ",finished_reason=\"length\""), 1);
  EXPECT_EQ(value("vllm:request_num_preemptions_sum"), 2);
  EXPECT_EQ(value("vllm:request_prompt_tokens_bucket", ",le=\"10\""), 0);
  EXPECT_EQ(value("vllm:request_prompt_tokens_bucket", ",le=\"20\""), 1);
  EXPECT_EQ(value("vllm:e2e_request_latency_seconds_bucket", ",le=\"1.5\""), 1);
  EXPECT_EQ(value("vllm:request_queue_time_seconds_count"), 1);
  EXPECT_EQ(value("vllm:request_prefill_time_seconds_count"), 0);  // not reached
  EXPECT_EQ(value("vllm:iteration_tokens_total_sum"), 28);
  EXPECT_EQ(value("kvarn:step_seconds_count", ",kind=\"mixed\""), 1);
  EXPECT_EQ(value("kvarn:requests_shed_total", ",reason=\"queue_full\""), 1);
  EXPECT_EQ(value("kvarn:requests_aborted_total", ",reason=\"client_gone\""), 1);
  EXPECT_EQ(value("kvarn:http_requests_total", ",route=\"/health\",method=\"GET\",status=\"200\""),
            2);
  EXPECT_EQ(value("kvarn:grpc_requests_total", ",rpc=\"Generate\",code=\"OK\""), 1);
  EXPECT_EQ(value("kvarn:sse_pings_total"), 1);
  EXPECT_EQ(value("kvarn:http_connections"), 2);
  EXPECT_EQ(value("kvarn:outbox_bytes"), 5);
}

TEST(Metrics, SplitThePoolByWhatItHolds) {
  Metrics metrics("demo", true);
  ModelInfo model;
  model.page_bytes = 13824;
  model.tile_code_bytes = 12288;
  model.page_id_bytes = 13824 * 16;
  model.kv_bytes_per_token_dense = 8192;
  model.max_model_len = 100;
  metrics.set_model(model);
  EngineStats stats;
  stats.coded_pages = 3;
  stats.sink_pages = 5;
  stats.tail_pages = 2;
  stats.pages_free = 10;
  stats.pages_total = 20;
  stats.pages_in_use = 10;
  stats.live_tokens = 600;
  const auto values = samples(metrics.render(stats));
  double sum = 0;
  for (const char* part : {"tile_codes", "tile_scales", "sink", "tail", "dense", "free"}) {
    sum += values.at(std::string("kvarn:kv_bytes") + kLabels + ",class=\"" + part + "\"}");
  }
  EXPECT_EQ(sum, 20.0 * 13824 * 16);
  EXPECT_EQ(values.at(std::string("kvarn:kv_bytes") + kLabels + ",class=\"tile_codes\"}"),
            3.0 * 12288 * 16);
  EXPECT_NEAR(values.at(std::string("kvarn:kv_effective_compression") + kLabels + "}"),
              600.0 * 8192 / (10.0 * 13824 * 16), 1e-6);
  EXPECT_EQ(effective_compression({}, model), std::nullopt);
}

TEST(Metrics, MoveUnderTheirOwnPrefixOnRequest) {
  const Metrics metrics("demo", false);
  const std::string page = metrics.render({});
  EXPECT_EQ(page.find("vllm:"), std::string::npos);
  EXPECT_THAT(page, HasSubstr("kvarn:num_requests_running"));
}

}  // namespace
}  // namespace kvarn::test
