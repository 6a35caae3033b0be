// The HTTP door over loopback, with the real engine on scripted tokens: answers, framing,
// connections.
#include "server/http_server.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <nlohmann/json.hpp>

#include "server/routes.h"
#include "tests/server/http_client.h"
#include "tests/server/serving_fixture.h"

namespace kvarn::test {
namespace {

using nlohmann::json;
using ::testing::HasSubstr;

std::string chat(int seed, const std::string& more = "") {
  return R"({"messages":[{"role":"user","content":"Hi"}],"seed":)" + std::to_string(seed) + more +
         "}";
}

class HttpServerTest : public ::testing::Test {
 protected:
  Serving serving;
  int port = serving.port();
};

TEST_F(HttpServerTest, AnswersAChatInTheOfficialShape) {
  serving.script(1, "<think>\nEasy.\n</think>\n\nHello there.");
  const HttpResponse response = post_json(port, "/v1/chat/completions", chat(1));
  ASSERT_EQ(response.status, 200) << response.body;
  EXPECT_EQ(response.header("content-type"), "application/json; charset=utf-8");
  const json body = json::parse(response.body);
  EXPECT_THAT(body["id"].get<std::string>(), ::testing::StartsWith("chatcmpl-"));
  EXPECT_EQ(body["object"], "chat.completion");
  EXPECT_EQ(body["model"], "demo");
  const json& choice = body["choices"][0];
  EXPECT_EQ(choice["message"]["role"], "assistant");
  EXPECT_EQ(choice["message"]["content"], "Hello there.");
  EXPECT_TRUE(choice["message"]["refusal"].is_null());
  EXPECT_EQ(choice["message"]["reasoning_content"], "Easy.");
  EXPECT_EQ(choice["message"]["reasoning"], "Easy.");
  EXPECT_EQ(choice["finish_reason"], "stop");
  EXPECT_TRUE(choice["stop_reason"].is_null());
  EXPECT_TRUE(choice["logprobs"].is_null());
  const json& usage = body["usage"];
  const auto output =
      demo_tokenizer().encode("<think>\nEasy.\n</think>\n\nHello there.").size() + 1;
  EXPECT_EQ(usage["completion_tokens"], output);
  EXPECT_EQ(usage["total_tokens"].get<int>(),
            usage["prompt_tokens"].get<int>() + static_cast<int>(output));
  EXPECT_GT(usage["completion_tokens_details"]["reasoning_tokens"].get<int>(), 2);
  EXPECT_TRUE(serving.wait_idle());
}

TEST_F(HttpServerTest, StreamsRoleDeltasFinishUsageAndDone) {
  serving.script(2, "Hello there.");
  const HttpResponse response = post_json(
      port, "/v1/chat/completions",
      chat(2, R"(,"stream":true,"stream_options":{"include_usage":true},"enable_thinking":false)"));
  ASSERT_EQ(response.status, 200) << response.body;
  EXPECT_EQ(response.header("content-type"), "text/event-stream; charset=utf-8");
  EXPECT_EQ(response.header("cache-control"), "no-cache");
  EXPECT_EQ(response.header("x-accel-buffering"), "no");
  std::vector<std::string> events = response.events();
  ASSERT_GE(events.size(), 5u);
  EXPECT_EQ(events.back(), "[DONE]");
  events.pop_back();
  const json role = json::parse(events.front());
  EXPECT_EQ(role["object"], "chat.completion.chunk");
  EXPECT_EQ(role["choices"][0]["delta"], json::parse(R"({"role":"assistant","content":""})"));
  EXPECT_TRUE(role["usage"].is_null());
  std::string text;
  for (size_t i = 1; i + 2 < events.size(); ++i) {
    const json chunk = json::parse(events[i]);
    text += chunk["choices"][0]["delta"]["content"].get<std::string>();
    EXPECT_TRUE(chunk["choices"][0]["finish_reason"].is_null());
  }
  EXPECT_EQ(text, "Hello there.");
  const json finish = json::parse(events[events.size() - 2]);
  EXPECT_EQ(finish["choices"][0]["delta"], json::object());
  EXPECT_EQ(finish["choices"][0]["finish_reason"], "stop");
  const json usage = json::parse(events.back());
  EXPECT_TRUE(usage["choices"].empty());
  EXPECT_GT(usage["usage"]["completion_tokens"].get<int>(), 0);
}

TEST_F(HttpServerTest, AnswersCompletionsOfSeveralPromptsByIndex) {
  serving.script(3, " yes");
  const HttpResponse response =
      post_json(port, "/v1/completions",
                R"({"prompt":["one","two"],"n":2,"seed":3,"max_tokens":8,"echo":true})");
  ASSERT_EQ(response.status, 200) << response.body;
  const json body = json::parse(response.body);
  EXPECT_EQ(body["object"], "text_completion");
  ASSERT_EQ(body["choices"].size(), 4u);
  EXPECT_EQ(body["choices"][1]["text"], "one yes");
  EXPECT_EQ(body["choices"][2]["text"], "two yes");
  EXPECT_EQ(body["choices"][3]["index"], 3);
}

TEST_F(HttpServerTest, AnswersZeroMaxTokensWithThePrefillOnly) {
  const json body = json::parse(
      post_json(port, "/v1/completions", R"({"prompt":"one two","max_tokens":0})").body);
  EXPECT_EQ(body["choices"][0]["text"], "");
  EXPECT_EQ(body["choices"][0]["finish_reason"], "length");
  EXPECT_EQ(body["usage"]["completion_tokens"], 0);
}

TEST_F(HttpServerTest, EndsAtAStopStringAndSaysWhich) {
  serving.script(4, "one two three four");
  const json body =
      json::parse(post_json(port, "/v1/completions",
                            R"({"prompt":"x","seed":4,"max_tokens":50,"stop":["three"]})")
                      .body);
  EXPECT_EQ(body["choices"][0]["text"], "one two ");
  EXPECT_EQ(body["choices"][0]["stop_reason"], "three");
  EXPECT_EQ(body["choices"][0]["finish_reason"], "stop");
  EXPECT_TRUE(serving.wait_idle());
}

TEST_F(HttpServerTest, GivesOneLogprobEntryPerToken) {
  serving.script(5, "Hello there.");
  const json body =
      json::parse(post_json(port, "/v1/chat/completions",
                            chat(5, R"(,"logprobs":true,"top_logprobs":2,"return_token_ids":true)"))
                      .body);
  const json& choice = body["choices"][0];
  const size_t tokens = body["usage"]["completion_tokens"].get<size_t>();
  EXPECT_EQ(choice["logprobs"]["content"].size(), tokens);
  EXPECT_TRUE(choice["logprobs"]["refusal"].is_null());
  EXPECT_EQ(choice["logprobs"]["content"][0]["top_logprobs"].size(), 2u);
  EXPECT_EQ(choice["token_ids"].size(), tokens);
  EXPECT_EQ(body["prompt_token_ids"].size(), body["usage"]["prompt_tokens"].get<size_t>());
}

TEST_F(HttpServerTest, KeepsTheConnectionAndAnswersPipelinedRequestsInOrder) {
  serving.script(6, "first");
  HttpClient client(port);
  client.send(post("/v1/completions", R"({"prompt":"x","seed":6})") + get("/version") +
              get("/v1/models/demo%2Falias"));
  const HttpResponse first = client.read_response(), second = client.read_response(),
                     third = client.read_response();
  EXPECT_EQ(json::parse(first.body)["choices"][0]["text"], "first");
  EXPECT_EQ(json::parse(second.body)["backend"], "cpu");
  EXPECT_EQ(json::parse(third.body)["id"], "demo/alias");
  client.send(get("/health"));
  EXPECT_EQ(client.read_response().status, 200);
}

TEST_F(HttpServerTest, AnswersHttp10AndCloses) {
  serving.script(7, "old client");
  HttpClient client(port);
  const std::string body = R"({"prompt":"x","seed":7,"stream":true})";
  client.send(
      "POST /v1/completions HTTP/1.0\r\nContent-Type: application/json\r\nContent-Length: " +
      std::to_string(body.size()) + "\r\n\r\n" + body);
  const HttpResponse response = client.read_response();
  EXPECT_EQ(response.status, 200);
  EXPECT_EQ(response.header("transfer-encoding"), "");
  ASSERT_FALSE(response.events().empty());
  EXPECT_EQ(response.events().back(), "[DONE]");
  EXPECT_TRUE(client.at_end());
}

TEST_F(HttpServerTest, AnswersHeadWithTheHeadersOfGet) {
  HttpClient client(port);
  client.send("HEAD /v1/models HTTP/1.1\r\nHost: test\r\n\r\n" + get("/v1/models"));
  const HttpResponse head = client.read_response(/*head=*/true), full = client.read_response();
  EXPECT_EQ(head.status, 200);
  EXPECT_EQ(head.header("content-length"), full.header("content-length"));
  EXPECT_EQ(head.header("content-length"), std::to_string(full.body.size()));
}

TEST_F(HttpServerTest, AnswersOptionsOnEveryPath) {
  for (const Endpoint& endpoint : endpoints()) {
    const HttpResponse response =
        fetch(port, "OPTIONS " + std::string(endpoint.pattern) + " HTTP/1.1\r\nHost: test\r\n\r\n");
    EXPECT_EQ(response.status, 204) << endpoint.pattern;
    EXPECT_EQ(response.header("allow"), endpoint.allow());
    EXPECT_EQ(response.body, "");
  }
}

TEST_F(HttpServerTest, TakesAChunkedUpload) {
  serving.script(8, "chunks");
  HttpClient client(port);
  const std::string body = R"({"prompt":"x","seed":8})";
  client.send(
      "POST /v1/completions HTTP/1.1\r\nHost: t\r\nContent-Type: application/json; "
      "charset=UTF-8\r\n"
      "Transfer-Encoding: chunked\r\n\r\n5\r\n" +
      body.substr(0, 5) + "\r\n");
  client.send("12\r\n" + body.substr(5) + "\r\n0\r\n\r\n");
  EXPECT_EQ(json::parse(client.read_response().body)["choices"][0]["text"], "chunks");
}

TEST_F(HttpServerTest, AsksForTheBodyOnlyAfterTheHeaderChecks) {
  serving.script(9, "continued");
  const std::string body = R"({"prompt":"x","seed":9})";
  HttpClient client(port);
  client.send(
      "POST /v1/completions HTTP/1.1\r\nHost: t\r\nContent-Type: application/json\r\nExpect: "
      "100-continue\r\nContent-Length: " +
      std::to_string(body.size()) + "\r\n\r\n");
  EXPECT_EQ(client.read_response().status, 100);
  client.send(body);
  EXPECT_EQ(json::parse(client.read_response().body)["choices"][0]["text"], "continued");

  HttpClient large(port);
  large.send(
      "POST /v1/completions HTTP/1.1\r\nHost: t\r\nContent-Type: application/json\r\nExpect: "
      "100-continue\r\nContent-Length: 999999999\r\n\r\n");
  EXPECT_EQ(large.read_response().status, 413);
}

TEST_F(HttpServerTest, KeepsAValidRequestIdAndReplacesAnother) {
  EXPECT_EQ(fetch(port, get("/health", "X-Request-Id: a.b:c-1\r\n")).header("x-request-id"),
            "a.b:c-1");
  const std::string replaced =
      fetch(port, get("/nowhere", "X-Request-Id: no spaces\r\n")).header("x-request-id");
  EXPECT_THAT(replaced, ::testing::StartsWith("req-"));
}

TEST_F(HttpServerTest, TokenisesDetokenisesAndRendersAlike) {
  const json rendered = json::parse(
      post_json(port, "/apply-template",
                R"({"messages":[{"role":"user","content":"Hé"}],"return_token_ids":true})")
          .body);
  EXPECT_THAT(rendered["prompt"].get<std::string>(), HasSubstr("<|im_start|>user\nHé"));
  const json tokens =
      json::parse(post_json(port, "/tokenize", json{{"prompt", rendered["prompt"]}}.dump()).body);
  EXPECT_EQ(tokens["tokens"], rendered["token_ids"]);
  EXPECT_EQ(tokens["count"], rendered["count"]);
  EXPECT_EQ(tokens["max_model_len"], 4096);
  const json chat_tokens = json::parse(
      post_json(port, "/tokenize", R"({"messages":[{"role":"user","content":"Hé"}]})").body);
  EXPECT_EQ(chat_tokens["tokens"], tokens["tokens"]);
  const json text =
      json::parse(post_json(port, "/detokenize", json{{"tokens", tokens["tokens"]}}.dump()).body);
  EXPECT_EQ(text["prompt"], rendered["prompt"]);
  EXPECT_EQ(text["content"], rendered["prompt"]);
}

TEST_F(HttpServerTest, ShowsModelsVersionHealthAndMetrics) {
  const json models = json::parse(fetch(port, get("/v1/models")).body);
  ASSERT_EQ(models["data"].size(), 2u);
  EXPECT_EQ(models["data"][0]["owned_by"], "kvarn");
  EXPECT_EQ(models["data"][1]["root"], "demo");
  EXPECT_EQ(models["data"][0]["meta"]["context_length"], 4096);
  EXPECT_FALSE(models["data"][0]["meta"]["features"]["lora"]["enabled"].get<bool>());
  EXPECT_EQ(json::parse(fetch(port, get("/version")).body)["api"][0], "openai-v1");
  for (const char* path : {"/health", "/health/live", "/health/ready"}) {
    const HttpResponse health = fetch(port, get(path));
    EXPECT_EQ(health.status, 200);
    EXPECT_EQ(json::parse(health.body)["status"], "ok");
  }
  const HttpResponse metrics = fetch(port, get("/metrics?x=1"));
  EXPECT_EQ(metrics.header("content-type"), "text/plain; version=0.0.4; charset=utf-8");
  EXPECT_THAT(metrics.body, HasSubstr("vllm:num_requests_running{model_name=\"demo\""));
}

}  // namespace
}  // namespace kvarn::test
