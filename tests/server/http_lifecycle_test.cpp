// Clients that leave, readers that stop, queues that fill, engines that load, stall and die,
// servers that drain: every accepted request ends in exactly one way, and the gauges return to
// zero.
#include "server/lifecycle.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <atomic>
#include <thread>

#include <nlohmann/json.hpp>

#include "tests/server/http_client.h"
#include "tests/server/serving_fixture.h"

namespace kvarn::test {
namespace {

using namespace std::chrono_literals;
using nlohmann::json;
using ::testing::HasSubstr;
using ::testing::Not;

const std::string kEndless =
    R"({"prompt":"go on","max_tokens":3000,"stream":true,"ignore_eos":true})";

std::string code_of(const HttpResponse& response) {
  const json body = json::parse(response.body, nullptr, false);
  return body.is_object() && body.contains("error") ? body["error"].value("code", "") : "";
}

// Keeps the health true to the engine, as the main thread of the process does.
class Watching {
 public:
  explicit Watching(Serving& serving)
      : thread_([this, &serving] {
          while (!stop_) {
            serving.lifecycle->watch();
            std::this_thread::sleep_for(5ms);
          }
        }) {}
  ~Watching() {
    stop_ = true;
    thread_.join();
  }

 private:
  std::atomic<bool> stop_{false};
  std::thread thread_;
};

bool eventually(const std::function<bool()>& condition) {
  for (int i = 0; i < 2000; ++i) {
    if (condition()) return true;
    std::this_thread::sleep_for(5ms);
  }
  return false;
}

TEST(HttpLoading, AnswersOpenEndpointsAndRefusesTheRest) {
  ServingOptions options;
  options.loaded = false;
  Serving serving(options);
  const int port = serving.port();
  EXPECT_EQ(fetch(port, get("/health")).status, 503);
  EXPECT_EQ(fetch(port, get("/health/live")).status, 200);
  EXPECT_EQ(fetch(port, get("/health/ready")).status, 503);
  EXPECT_EQ(fetch(port, get("/metrics")).status, 200);
  for (const std::string& request :
       {get("/v1/models"), get("/version"), post("/v1/completions", R"({"prompt":"x"})"),
        post("/tokenize", R"({"prompt":"x"})")}) {
    const HttpResponse response = fetch(port, request);
    EXPECT_EQ(response.status, 503);
    EXPECT_EQ(code_of(response), "model_loading");
    EXPECT_GE(std::stoi(response.header("retry-after")), 1);
  }
  serving.load();
  EXPECT_EQ(fetch(port, get("/health")).status, 200);
  EXPECT_EQ(post_json(port, "/v1/completions", R"({"prompt":"x"})").status, 200);
}

class HttpDisconnect : public ::testing::TestWithParam<const char*> {
 protected:
  static void leave(HttpClient& client) {
    const std::string how = GetParam();
    if (how == "reset") {
      client.reset();
    } else if (how == "close") {
      client.close();
    } else {
      client.shutdown_write();
    }
  }
};
INSTANTIATE_TEST_SUITE_P(How, HttpDisconnect, ::testing::Values("close", "reset", "half_close"));

TEST_P(HttpDisconnect, InDecodeFreesTheBlocks) {
  Serving serving;
  HttpClient client(serving.port());
  client.send(post("/v1/completions", kEndless));
  ASSERT_TRUE(client.read_until("data: "));
  leave(client);
  EXPECT_TRUE(serving.wait_idle());
}

TEST_P(HttpDisconnect, InAFoldedAnswerFreesTheBlocks) {
  Serving serving;
  HttpClient client(serving.port());
  client.send(post("/v1/completions", R"({"prompt":"x","max_tokens":3000,"ignore_eos":true})"));
  ASSERT_TRUE(eventually([&] { return serving.stats().running == 1; }));
  leave(client);
  EXPECT_TRUE(serving.wait_idle());
  EXPECT_THAT(serving.state.metrics.render(serving.stats()),
              HasSubstr("reason=\"client_gone\"} 1\n"));
}

TEST_P(HttpDisconnect, InPrefillFreesTheBlocks) {
  ServingOptions options;
  options.runner.step_time = 20ms;
  Serving serving(options);
  HttpClient client(serving.port());
  json body{{"prompt", std::vector<int>(3000, 5)}, {"stream", true}, {"max_tokens", 10}};
  client.send(post("/v1/completions", body.dump()));
  ASSERT_TRUE(eventually([&] { return serving.stats().running == 1; }));
  leave(client);
  EXPECT_TRUE(serving.wait_idle());
  EXPECT_EQ(serving.stats().generation_tokens, 0u);
}

TEST_P(HttpDisconnect, InTheQueueLeavesTheOthersAlone) {
  ServingOptions options;
  options.engine.max_num_seqs = 1;
  Serving serving(options);
  serving.script(1, "the text of another request");
  serving.gate.close();
  HttpClient first(serving.port()), second(serving.port());
  first.send(post("/v1/completions", R"({"prompt":"x","seed":1,"max_tokens":50})"));
  ASSERT_TRUE(eventually([&] { return serving.stats().running == 1; }));
  second.send(post("/v1/completions", kEndless));
  ASSERT_TRUE(eventually([&] { return serving.stats().waiting == 1; }));
  leave(second);
  serving.gate.open();
  const json body = json::parse(first.read_response().body);
  EXPECT_EQ(body["choices"][0]["text"], "the text of another request");
  EXPECT_TRUE(serving.wait_idle());
}

TEST(HttpDisconnectStorm, LeavesNothingBehind) {
  Serving serving;
  serving.script(1, "unchanged");
  std::vector<std::thread> threads;
  std::atomic<int> right{0};
  for (int t = 0; t < 8; ++t) {
    threads.emplace_back([&, t] {
      for (int i = 0; i < 15; ++i) {
        HttpClient client(serving.port());
        if ((t + i) % 3 == 0) {
          client.send(post("/v1/completions", R"({"prompt":"x","seed":1,"max_tokens":50})"));
          const json body = json::parse(client.read_response().body, nullptr, false);
          if (body.is_object() && body["choices"][0]["text"] == "unchanged") ++right;
        } else {
          client.send(post("/v1/completions", kEndless));
          std::this_thread::sleep_for(std::chrono::milliseconds((t * 7 + i * 3) % 25));
          if (i % 2 == 0) client.reset();
        }
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  EXPECT_EQ(right, 40);
  EXPECT_TRUE(serving.wait_idle());
  const EngineStats stats = serving.stats();
  EXPECT_EQ(stats.pages_free + stats.pages_cached + stats.pages_in_use, stats.pages_total);
  EXPECT_EQ(stats.leaked_pages, 0);
  EXPECT_EQ(serving.state.metrics.outbox_bytes().load(), 0);
}

TEST(HttpSlowReader, AnAnswerThatIsNotStreamedHasNoReaderToBeSlow) {
  ServingOptions options;
  options.server.outbox_bytes = 1024;
  Serving serving(options);
  serving.script(1, "end");
  const std::string prompt(2000, 'x');  // echoed as one delta, larger than the outbox
  const json answer =
      json::parse(post_json(serving.port(), "/v1/completions",
                            R"({"echo":true,"seed":1,"max_tokens":50,"prompt":")" + prompt + "\"}")
                      .body);
  ASSERT_TRUE(answer.contains("choices")) << answer;
  EXPECT_EQ(answer["choices"][0]["text"], prompt + "end");
}

TEST(HttpSlowReader, IsDroppedAtTheBoundWhileOthersGoOn) {
  ServingOptions options;
  options.server.outbox_bytes = 64 * 1024;
  Serving serving(options);
  serving.script(1, "not disturbed");
  HttpClient slow(serving.port(), /*receive_buffer=*/4096);
  slow.send(post("/v1/completions",
                 R"({"prompt":"x","n":32,"max_tokens":3000,"ignore_eos":true,"stream":true,)"
                 R"("logprobs":20})"));
  ASSERT_TRUE(slow.read_until("data: "));
  EXPECT_TRUE(eventually([&] {
    return serving.state.metrics.render(serving.stats()).find("reason=\"slow_reader\"} 1\n") !=
           std::string::npos;
  }));
  const json other = json::parse(
      post_json(serving.port(), "/v1/completions", R"({"prompt":"x","seed":1,"max_tokens":50})")
          .body);
  EXPECT_EQ(other["choices"][0]["text"], "not disturbed");
  EXPECT_TRUE(serving.wait_idle());
  EXPECT_TRUE(slow.at_end());
  EXPECT_THAT(slow.buffered(), Not(HasSubstr("[DONE]")));
}

TEST(HttpQueue, RefusesExactlyWhatExceedsItAtOnce) {
  ServingOptions options;
  options.engine.max_num_seqs = 1;
  options.engine.max_queued_requests = 4;
  Serving serving(options);
  serving.gate.close();
  const std::string request = post("/v1/completions", R"({"prompt":"x","max_tokens":4})");
  HttpClient first(serving.port());
  first.send(request);
  ASSERT_TRUE(eventually([&] { return serving.stats().running == 1; }));
  std::vector<std::unique_ptr<HttpClient>> burst;
  for (int i = 0; i < 4; ++i) {
    burst.push_back(std::make_unique<HttpClient>(serving.port()));
    burst.back()->send(request);
    ASSERT_TRUE(eventually([&] { return serving.stats().waiting == i + 1; }));
  }
  for (int i = 0; i < 3; ++i) {
    const HttpResponse refused = fetch(serving.port(), request);
    EXPECT_EQ(refused.status, 429);
    EXPECT_EQ(code_of(refused), "queue_full");
    EXPECT_EQ(json::parse(refused.body)["error"]["type"], "rate_limit_error");
    EXPECT_GE(std::stoi(refused.header("retry-after")), 1);
    EXPECT_LE(std::stoi(refused.header("retry-after")), 60);
  }
  serving.gate.open();
  EXPECT_EQ(first.read_response().status, 200);
  for (const auto& client : burst) EXPECT_EQ(client->read_response().status, 200);
  EXPECT_TRUE(eventually([&] {
    return serving.state.metrics.render(serving.stats()).find("reason=\"queue_full\"} 3\n") !=
           std::string::npos;
  }));
}

TEST(HttpPings, KeepAStreamAliveBeforeItsFirstToken) {
  ServingOptions options;
  options.server.sse_ping_seconds = 0.05;
  Serving serving(options);
  serving.script(1, "late");
  serving.gate.close();
  HttpClient client(serving.port());
  client.send(post("/v1/completions", R"({"prompt":"x","seed":1,"stream":true})"));
  ASSERT_TRUE(client.read_until(": ping\n\n"));
  EXPECT_THAT(client.buffered(), Not(HasSubstr("data: ")));
  serving.gate.open();
  const HttpResponse response = client.read_response();
  EXPECT_EQ(response.events().back(), "[DONE]");
  EXPECT_THAT(response.body, HasSubstr("late"));
}

TEST(HttpDeadline, IsAStatusBeforeTheFirstByteAndAnEventAfterIt) {
  ServingOptions options;
  options.runner.step_time = 10ms;
  Serving serving(options);
  const std::string header = "X-Request-Timeout: 0.2\r\n";
  const HttpResponse folded = fetch(
      serving.port(),
      post("/v1/completions", R"({"prompt":"x","max_tokens":3000,"ignore_eos":true})", header));
  EXPECT_EQ(folded.status, 504);
  EXPECT_EQ(code_of(folded), "deadline_exceeded");
  EXPECT_EQ(folded.header("x-should-retry"), "false");
  HttpClient client(serving.port());
  client.send(post("/v1/completions", kEndless, header));
  const HttpResponse streamed = client.read_response();
  EXPECT_EQ(streamed.status, 200);
  ASSERT_FALSE(streamed.events().empty());
  EXPECT_EQ(json::parse(streamed.events().back())["error"]["code"], "deadline_exceeded");
  EXPECT_TRUE(client.at_end());
  EXPECT_TRUE(serving.wait_idle());
}

TEST(HttpEngineFaults, OfOneStepAnswer500WithoutDetailsAndTheServerLivesOn) {
  ServingOptions options;
  auto fail = std::make_shared<std::atomic<bool>>(true);
  options.runner.before_step = [fail](int64_t, const StepBatch&) {
    if (fail->exchange(false)) throw std::runtime_error("secret at 0xdeadbeef in /some/file");
  };
  Serving serving(options);
  const HttpResponse response =
      post_json(serving.port(), "/v1/completions", R"({"prompt":"x","max_tokens":4})");
  EXPECT_EQ(response.status, 500);
  EXPECT_EQ(code_of(response), "engine_error");
  EXPECT_THAT(response.body, Not(HasSubstr("secret")));
  EXPECT_THAT(response.body, HasSubstr("cmpl-"));
  EXPECT_EQ(post_json(serving.port(), "/v1/completions", R"({"prompt":"x","max_tokens":4})").status,
            200);
}

TEST(HttpEngineFaults, OfTheDeviceAnswerEveryClientAndTurnHealthToFailed) {
  ServingOptions options;
  options.runner.before_step = [](int64_t step, const StepBatch&) {
    if (step >= 5) throw DeviceLost("gone");
  };
  Serving serving(options);
  const Watching watching(serving);
  const HttpResponse response = post_json(serving.port(), "/v1/completions",
                                          R"({"prompt":"x","max_tokens":3000,"ignore_eos":true})");
  EXPECT_EQ(response.status, 503);
  EXPECT_EQ(code_of(response), "engine_unavailable");
  ASSERT_TRUE(eventually([&] { return serving.state.health.state() == HealthState::kFailed; }));
  for (const char* path : {"/health", "/health/live", "/health/ready"}) {
    const HttpResponse health = fetch(serving.port(), get(path));
    EXPECT_EQ(health.status, 503);
    EXPECT_EQ(json::parse(health.body)["status"], "failed");
  }
  EXPECT_THAT(
      fetch(serving.port(), get("/metrics")).body,
      HasSubstr("kvarn:device_errors_total{model_name=\"demo\",engine=\"0\",kind=\"cuda\"} 1"));
}

TEST(HttpEngineFaults, OfAStallAnswerEveryClientAndTurnHealthToStalled) {
  ServingOptions options;
  options.engine.engine_stall_seconds = 0.5;
  Serving serving(options);
  const Watching watching(serving);
  serving.gate.close();
  const HttpResponse response =
      post_json(serving.port(), "/v1/completions", R"({"prompt":"x","max_tokens":4})");
  EXPECT_EQ(response.status, 503);
  EXPECT_EQ(code_of(response), "engine_unavailable");
  EXPECT_TRUE(eventually([&] {
    const HealthState state = serving.state.health.state();
    return state == HealthState::kStalled || state == HealthState::kFailed;
  }));
  EXPECT_EQ(fetch(serving.port(), get("/health/live")).status, 503);
  serving.gate.open();
}

TEST(HttpDrain, LosesNoAcceptedRequestAndRefusesNewOnes) {
  ServingOptions options;
  options.runner.step_time = 3ms;
  Serving serving(options);
  serving.script(1, "one two three four five six seven eight nine ten eleven twelve");
  std::vector<std::unique_ptr<HttpClient>> clients;
  for (int i = 0; i < 12; ++i) {
    clients.push_back(std::make_unique<HttpClient>(serving.port()));
    clients.back()->send(post(
        "/v1/completions", i % 2 == 0 ? R"({"prompt":"x","seed":1,"max_tokens":200,"stream":true})"
                                      : R"({"prompt":"x","seed":1,"max_tokens":200})"));
  }
  HttpClient idle(serving.port());
  ASSERT_TRUE(eventually([&] { return serving.state.service()->active() == 12; }));
  bool complete = false;
  std::thread drain([&] { complete = serving.lifecycle->drain([] { return false; }); });
  ASSERT_TRUE(eventually([&] { return serving.state.health.state() == HealthState::kDraining; }));
  const HttpResponse refused = post_json(serving.port(), "/v1/completions", R"({"prompt":"x"})");
  if (refused.status != 0) {  // else the drain was over first and the port is closed
    EXPECT_EQ(refused.status, 503);
    EXPECT_EQ(code_of(refused), "server_draining");
    EXPECT_NE(refused.header("retry-after"), "");
  }
  for (size_t i = 0; i < clients.size(); ++i) {
    const HttpResponse response = clients[i]->read_response();
    EXPECT_EQ(response.status, 200);
    EXPECT_THAT(response.body, HasSubstr("twelve"));
    if (i % 2 == 0) {
      EXPECT_EQ(response.events().back(), "[DONE]");
    }
  }
  drain.join();
  EXPECT_TRUE(complete);
  EXPECT_TRUE(idle.at_end());
}

TEST(HttpDrain, EndsTheRestWithAnErrorOnASecondSignal) {
  Serving serving;
  HttpClient streamed(serving.port()), folded(serving.port());
  streamed.send(post("/v1/completions", kEndless));
  folded.send(post("/v1/completions", R"({"prompt":"x","max_tokens":3000,"ignore_eos":true})"));
  ASSERT_TRUE(streamed.read_until("data: "));
  ASSERT_TRUE(eventually([&] { return serving.state.service()->active() == 2; }));
  bool complete = true;
  std::thread drain([&] { complete = serving.lifecycle->drain([] { return true; }); });
  const HttpResponse event = streamed.read_response(), status = folded.read_response();
  drain.join();
  EXPECT_FALSE(complete);
  ASSERT_FALSE(event.events().empty());
  EXPECT_EQ(json::parse(event.events().back())["error"]["code"], "server_shutdown");
  EXPECT_EQ(status.status, 503);
  EXPECT_EQ(code_of(status), "server_shutdown");
}

}  // namespace
}  // namespace kvarn::test
