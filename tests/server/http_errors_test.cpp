// Every row of the error table that an HTTP client can cause: status, code, param, headers, and
// whether the connection goes on.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <nlohmann/json.hpp>

#include "server/openai_api.h"
#include "server/routes.h"
#include "tests/server/http_client.h"
#include "tests/server/serving_fixture.h"

namespace kvarn::test {
namespace {

using namespace std::chrono_literals;
using nlohmann::json;

struct Expected {
  int status;
  const char* code;
  const char* param = nullptr;  // null: JSON null
  bool closes = false;
};

void expect_error(const HttpResponse& response, const Expected& expected, const std::string& what) {
  ASSERT_EQ(response.status, expected.status) << what << "\n" << response.body;
  const json body = json::parse(response.body, nullptr, false);
  ASSERT_TRUE(body.is_object() && body.contains("error")) << what;
  const json& error = body["error"];
  EXPECT_EQ(error["code"], expected.code) << what << "\n" << response.body;
  if (expected.param == nullptr) {
    EXPECT_TRUE(error["param"].is_null()) << what << "\n" << response.body;
  } else {
    EXPECT_EQ(error["param"], expected.param) << what << "\n" << response.body;
  }
  EXPECT_TRUE(error["message"].is_string());
  EXPECT_EQ(error["type"], expected.status == 429  ? "rate_limit_error"
                           : expected.status < 500 ? "invalid_request_error"
                                                   : "server_error");
  EXPECT_NE(response.header("x-request-id"), "") << what;
}

class HttpErrors : public ::testing::Test {
 protected:
  // A connection of its own: the answer, and that the server closes or goes on.
  void expect(const std::string& request, const Expected& expected) {
    HttpClient client(port);
    client.send(request);
    const HttpResponse response = client.read_response();
    expect_error(response, expected, request.substr(0, 300));
    if (expected.closes) {
      EXPECT_EQ(response.header("connection"), "close") << request.substr(0, 200);
      EXPECT_TRUE(client.at_end()) << request.substr(0, 200);
    } else {
      client.send(get("/health"));
      EXPECT_EQ(client.read_response().status, 200) << request.substr(0, 200);
    }
  }
  void expect_body(const std::string& path, const std::string& body, const Expected& expected) {
    expect(post(path, body), expected);
  }

  Serving serving;
  int port = serving.port();
};

TEST_F(HttpErrors, MalformedFraming) {
  const Expected malformed{400, "malformed_request", nullptr, true};
  expect("nonsense\r\n\r\n", malformed);
  expect("GET /health HTTP/1.1\r\n\r\n", malformed);
  expect("GET /health HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n", malformed);
  expect("GET /health HTTP/2.0\r\nHost: a\r\n\r\n", malformed);
  expect("GET /health HTTP/1.1\r\nHost: a\r\nbad header\r\n\r\n", malformed);
  const std::string head =
      "POST /tokenize HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\n";
  expect(head + "Content-Length: 2\r\nTransfer-Encoding: chunked\r\n\r\n{}", malformed);
  expect(head + "Transfer-Encoding: chunked\r\nContent-Length: 2\r\n\r\n2\r\n{}\r\n0\r\n\r\n",
         malformed);
  expect(head + "Transfer-Encoding: gzip\r\n\r\n", malformed);
  expect(head + "Transfer-Encoding: gzip, chunked\r\n\r\n0\r\n\r\n", malformed);
  expect(head + "Content-Length: 1\r\nContent-Length: 2\r\n\r\n{}", malformed);
  expect(head + "Content-Length: -1\r\n\r\n", malformed);
  expect(head + "Transfer-Encoding: chunked\r\n\r\nzz\r\n{}\r\n", malformed);
}

TEST_F(HttpErrors, PathsAndMethods) {
  expect(get("/nowhere"), {404, "not_found"});
  expect(get("/v1/models/"), {404, "not_found"});
  expect(get("/health/"), {404, "not_found"});
  expect(get("/v1/models/other"), {404, "model_not_found", "model"});
  for (const Endpoint& endpoint : endpoints()) {
    const std::string path(endpoint.pattern);
    const std::string wrong = endpoint.takes_body() ? "GET" : "DELETE";
    const HttpResponse response = fetch(port, wrong + " " + path + " HTTP/1.1\r\nHost: a\r\n\r\n");
    expect_error(response, {405, "method_not_allowed"}, path);
    EXPECT_EQ(response.header("allow"), endpoint.allow());
    if (endpoint.takes_body()) {
      HttpClient client(port);
      client.send("HEAD " + path + " HTTP/1.1\r\nHost: a\r\n\r\n");
      EXPECT_EQ(client.read_response(/*head=*/true).status, 405);
    }
  }
}

TEST_F(HttpErrors, EndpointsOfLaterStagesNameThemselves) {
  int seen = 0;
  for (const Endpoint& endpoint : endpoints()) {
    if (endpoint.handler != Handler::kLaterStage) continue;
    ++seen;
    const std::string path(endpoint.pattern);
    const HttpResponse response = fetch(port, endpoint.takes_body() ? post(path, "{}") : get(path));
    expect_error(response, {501, "unsupported_endpoint"}, path);
    EXPECT_EQ(response.header("x-should-retry"), "false");
    EXPECT_THAT(response.body, ::testing::HasSubstr(path));
  }
  EXPECT_EQ(seen, 13);
}

TEST_F(HttpErrors, SizesAndTimes) {
  expect("GET /" + std::string(9000, 'a') + " HTTP/1.1\r\nHost: a\r\n\r\n",
         {414, "uri_too_long", nullptr, true});
  expect("GET /" + std::string(60000, 'a'), {414, "uri_too_long", nullptr, true});
  expect(get("/health", "X-Long: " + std::string(33 * 1024, 'a') + "\r\n"),
         {431, "headers_too_large", nullptr, true});
  expect(get("/health", "X-Long: " + std::string(90 * 1024, 'a') + "\r\n"),
         {431, "headers_too_large", nullptr, true});
  expect(
      "POST /tokenize HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\nContent-Length: "
      "16777217\r\n\r\n",
      {413, "body_too_large", nullptr, true});
}

TEST_F(HttpErrors, ChunkedBodiesAreCutAtTheLimitToo) {
  ServingOptions options;
  options.server.max_body_bytes = 4096;
  Serving small(options);
  HttpClient client(small.port());
  client.send(
      "POST /tokenize HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\nTransfer-Encoding: "
      "chunked\r\n\r\n");
  const std::string piece = "400\r\n" + std::string(1024, ' ') + "\r\n";
  for (int i = 0; i < 8; ++i) client.send(piece);
  expect_error(client.read_response(), {413, "body_too_large"}, "chunked");
}

TEST_F(HttpErrors, SlowHeadersAndBodies) {
  ServingOptions options;
  options.server.header_seconds = options.server.body_seconds = 0.2;
  options.server.keep_alive_seconds = 0.3;
  Serving slow(options);
  HttpClient header(slow.port());
  header.send("GET /health HTTP/1.1\r\nHo");
  expect_error(header.read_response(), {408, "request_timeout"}, "header");
  EXPECT_TRUE(header.at_end());
  HttpClient body(slow.port());
  body.send(
      "POST /tokenize HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\nContent-Length: "
      "100\r\n\r\n{");
  expect_error(body.read_response(), {408, "request_timeout"}, "body");
  EXPECT_TRUE(body.at_end());
  HttpClient idle(slow.port());
  EXPECT_TRUE(idle.at_end());
  EXPECT_EQ(idle.buffered(), "");
}

TEST_F(HttpErrors, TooManyConnections) {
  ServingOptions options;
  options.server.max_connections = 2;
  Serving small(options);
  HttpClient first(small.port()), second(small.port());
  first.send(get("/health"));
  second.send(get("/health"));
  EXPECT_EQ(first.read_response().status, 200);
  EXPECT_EQ(second.read_response().status, 200);
  HttpClient third(small.port());
  const HttpResponse response = third.read_response();
  expect_error(response, {503, "too_many_connections"}, "third");
  EXPECT_NE(response.header("retry-after"), "");
  EXPECT_EQ(response.header("connection"), "close");
}

TEST_F(HttpErrors, MediaTypesAndExpectations) {
  const auto with_type = [](const std::string& headers) {
    return "POST /tokenize HTTP/1.1\r\nHost: a\r\n" + headers + "Content-Length: 2\r\n\r\n{}";
  };
  const Expected unsupported{415, "unsupported_media_type"};
  expect(with_type(""), unsupported);
  expect(with_type("Content-Type: text/plain\r\n"), unsupported);
  expect(with_type("Content-Type: application/json; charset=latin1\r\n"), unsupported);
  expect(with_type("Content-Type: application/json\r\nContent-Encoding: gzip\r\n"), unsupported);
  HttpClient client(port);
  client.send(with_type("Content-Type: application/json\r\nExpect: magic\r\n"));
  expect_error(client.read_response(), {417, "expectation_failed"}, "expect");
}

TEST_F(HttpErrors, BodiesThatAreNotTheJsonWeNeed) {
  const std::string path = "/v1/chat/completions";
  for (const std::string body :
       {"", "  ", "{", "{\"a\":1}x", "nope", R"({"a":"\ud800"})", R"({"a":1e999})", "{'a':1}"}) {
    expect_body(path, body, {400, "invalid_json"});
  }
  expect_body(path, "{\"a\":\"\xff\xfe\"}", {400, "invalid_utf8"});
  expect_body(path, "[]", {400, "body_not_object"});
  expect_body(path, "null", {400, "body_not_object"});
  expect_body(path, "{\"a\":" + std::string(100, '[') + std::string(100, ']') + "}",
              {400, "json_too_deep"});
  expect_body(path, "{\"a\":" + std::string(100000, '['), {400, "json_too_deep"});
  std::string wide = "{";
  for (int i = 0; i < 5000; ++i) wide += "\"k" + std::to_string(i) + "\":0,";
  expect_body(path, wide + "\"z\":0}", {400, "invalid_value"});
  std::string many = "{\"a\":[";
  for (int i = 0; i < 300000; ++i) many += "[],";
  expect_body(path, many + "0]}", {400, "invalid_value"});
}

TEST_F(HttpErrors, FieldsOfTheRequest) {
  const std::string chat = "/v1/chat/completions", raw = "/v1/completions";
  expect_body(chat, "{}", {400, "missing_required_parameter", "messages"});
  expect_body(chat, R"({"messages":[]})", {400, "invalid_value", "messages"});
  expect_body(chat, R"({"messages":"hi"})", {400, "invalid_type", "messages"});
  expect_body(chat, R"({"messages":[{"content":"x"}]})",
              {400, "missing_required_parameter", "messages[0].role"});
  expect_body(chat, R"({"messages":[{"role":"user"}]})",
              {400, "missing_required_parameter", "messages[0].content"});
  expect_body(chat,
              R"({"messages":[{"role":"user","content":[{"type":"image_url","image_url":{}}]}]})",
              {400, "unsupported_parameter", "messages[0].content[0].type"});
  expect_body(chat, R"({"messages":[{"role":"user","content":"x"}],"model":"other"})",
              {404, "model_not_found", "model"});
  expect_body(raw, "{}", {400, "missing_required_parameter", "prompt"});
  expect_body(raw, R"({"prompt":""})", {400, "invalid_value", "prompt"});
  expect_body(raw, R"({"prompt":["a",""]})", {400, "invalid_value", "prompt[1]"});
  expect_body(raw, R"({"prompt":["a",1]})", {400, "invalid_type", "prompt[1]"});
  expect_body(raw, R"({"prompt":[1,99999]})", {400, "invalid_value", "prompt[1]"});
  expect_body(raw, R"({"prompt":"x","temperature":2.5})", {400, "invalid_value", "temperature"});
  expect_body(raw, R"({"prompt":"x","temperature":"1"})", {400, "invalid_type", "temperature"});
  expect_body(raw, R"({"prompt":"x","logprobs":21})", {400, "invalid_value", "logprobs"});
  expect_body(raw, R"({"prompt":"x","echo":true,"logprobs":1})",
              {400, "unsupported_parameter", "echo"});
  expect_body(raw, R"({"prompt":"x","n":65})", {400, "invalid_value", "n"});
  const json ids = std::vector<int>(4090, 5);
  expect_body(raw, json{{"prompt", ids}, {"max_tokens", 7}}.dump(),
              {400, "context_length_exceeded", "prompt"});
  expect_body(raw, json{{"prompt", json::array({json::array({1}), ids})}, {"max_tokens", 7}}.dump(),
              {400, "context_length_exceeded", "prompt[1]"});
  expect(post(raw, R"({"prompt":"x"})", "X-Request-Timeout: soon\r\n"),
         {400, "invalid_value", "X-Request-Timeout"});
  expect_body("/detokenize", R"({"tokens":[1,-1]})", {400, "invalid_value", "tokens[1]"});
  expect_body("/detokenize", "{}", {400, "missing_required_parameter", "tokens"});
  expect_body("/tokenize", "{}", {400, "missing_required_parameter", "prompt"});
  expect_body("/tokenize", R"({"prompt":"a","messages":[]})", {400, "invalid_value", "messages"});
}

TEST_F(HttpErrors, TheContextMessageHasTheNumbers) {
  const json ids = std::vector<int>(4090, 5);
  const HttpResponse response =
      post_json(port, "/v1/completions", json{{"prompt", ids}, {"max_tokens", 7}}.dump());
  EXPECT_EQ(json::parse(response.body)["error"]["message"],
            "this model's context is 4096 tokens; the prompt has 4090 and 7 were requested: 4097 > "
            "4096");
}

TEST_F(HttpErrors, FieldsOfLaterStagesNameThemselvesWithARemedy) {
  for (const UnsupportedField& field : unsupported_fields()) {
    const char* path = field.chat ? "/v1/chat/completions" : "/v1/completions";
    json body = field.chat ? json::parse(R"({"messages":[{"role":"user","content":"x"}]})")
                           : json{{"prompt", "x"}};
    body[field.name] = json{{"any", "value"}};
    const HttpResponse response = post_json(port, path, body.dump());
    expect_error(response, {400, "unsupported_parameter", field.name}, field.name);
    EXPECT_THAT(response.body, ::testing::HasSubstr(field.remedy));
    body[field.name] = nullptr;
    body["max_tokens"] = 2;
    EXPECT_EQ(post_json(port, path, body.dump()).status, 200) << field.name;
  }
}

}  // namespace
}  // namespace kvarn::test
