// The gRPC door over loopback: the real engine on scripted tokens, the library's own client.
#include <gmock/gmock.h>
#include <google/protobuf/stubs/logging.h>
#include <grpcpp/grpcpp.h>
#include <gtest/gtest.h>

#include <atomic>
#include <cmath>
#include <functional>
#include <map>
#include <random>
#include <thread>

#include <fmt/format.h>

#include "grpc/health/v1/health.grpc.pb.h"
#include "inference.grpc.pb.h"
#include "server/grpc_convert.h"
#include "server/grpc_server.h"
#include "tests/server/serving_fixture.h"

namespace kvarn::test {
namespace {

using ::testing::HasSubstr;
using HealthResponse = grpc::health::v1::HealthCheckResponse;

std::string metadata(const grpc::ClientContext& context, const char* key) {
  const auto& map = context.GetServerTrailingMetadata();
  const auto it = map.find(key);
  return it == map.end() ? "" : std::string(it->second.data(), it->second.size());
}

class GrpcTest : public ::testing::Test {
 protected:
  void start(ServingOptions options = {}) {
    serving_ = std::make_unique<Serving>(std::move(options));
    server_ = start_grpc_server(serving_->state).value();  // port 0 here: any free one
    connect({});
  }
  void connect(const grpc::ChannelArguments& arguments) {
    channel_ = grpc::CreateCustomChannel(fmt::format("127.0.0.1:{}", server_->port()),
                                         grpc::InsecureChannelCredentials(), arguments);
    inference_ = v1::Inference::NewStub(channel_);
    control_ = v1::Control::NewStub(channel_);
    health_ = grpc::health::v1::Health::NewStub(channel_);
  }
  v1::GenerateRequest text_request(int64_t seed) {
    v1::GenerateRequest request;
    request.set_text("Once upon a time");
    request.mutable_sampling()->set_seed(seed);
    return request;
  }
  v1::GenerateRequest chat_request(int64_t seed) {
    v1::GenerateRequest request;
    v1::ChatMessage& message = *request.mutable_chat()->add_messages();
    message.set_role("user");
    message.set_content("Hello!");
    request.mutable_sampling()->set_seed(seed);
    return request;
  }
  // The messages of a stream; EXPECTs that it ends well.
  std::vector<v1::GenerateResponse> stream(const v1::GenerateRequest& request) {
    grpc::ClientContext context;
    const auto reader = inference_->GenerateStream(&context, request);
    std::vector<v1::GenerateResponse> messages;
    for (v1::GenerateResponse message; reader->Read(&message);) messages.push_back(message);
    const grpc::Status status = reader->Finish();
    EXPECT_TRUE(status.ok()) << status.error_message();
    return messages;
  }
  HealthResponse::ServingStatus check(const std::string& service) {
    grpc::ClientContext context;
    grpc::health::v1::HealthCheckRequest request;
    request.set_service(service);
    HealthResponse response;
    const grpc::Status status = health_->Check(&context, request, &response);
    return status.ok() ? response.status() : HealthResponse::SERVICE_UNKNOWN;
  }

  std::unique_ptr<Serving> serving_;
  std::unique_ptr<GrpcServer> server_;  // ends first
  std::shared_ptr<grpc::Channel> channel_;
  std::unique_ptr<v1::Inference::Stub> inference_;
  std::unique_ptr<v1::Control::Stub> control_;
  std::unique_ptr<grpc::health::v1::Health::Stub> health_;
};

v1::GenerateResponse fold(const std::vector<v1::GenerateResponse>& messages) {
  v1::GenerateResponse folded;
  std::map<uint32_t, v1::SequenceOutput> outputs;
  for (const v1::GenerateResponse& message : messages) {
    folded.set_id(message.id());
    if (message.has_prompt_info()) *folded.mutable_prompt_info() = message.prompt_info();
    if (message.has_usage()) *folded.mutable_usage() = message.usage();
    for (const v1::SequenceOutput& delta : message.outputs()) {
      v1::SequenceOutput& whole = outputs[delta.index()];
      whole.set_index(delta.index());
      whole.set_text(whole.text() + delta.text());
      whole.set_reasoning(whole.reasoning() + delta.reasoning());
      whole.set_num_tokens(whole.num_tokens() + delta.num_tokens());
      whole.mutable_token_ids()->MergeFrom(delta.token_ids());
      whole.mutable_logprobs()->MergeFrom(delta.logprobs());
      if (delta.has_finish()) *whole.mutable_finish() = delta.finish();
    }
  }
  for (const auto& [index, output] : outputs) *folded.add_outputs() = output;
  return folded;
}

TEST_F(GrpcTest, GenerateAnswersWithTextUsageAndWhatEndedIt) {
  start();
  serving_->script(1, " there was a king.");
  grpc::ClientContext context;
  context.AddMetadata("x-request-id", "tale-1");
  v1::GenerateResponse response;
  const grpc::Status status = inference_->Generate(&context, text_request(1), &response);
  ASSERT_TRUE(status.ok()) << status.error_message();
  ASSERT_EQ(response.outputs_size(), 1);
  EXPECT_EQ(response.outputs(0).text(), " there was a king.");
  EXPECT_EQ(response.outputs(0).finish().reason(), v1::FinishInfo::REASON_STOP);
  EXPECT_EQ(response.outputs(0).finish().eos_token_id(), static_cast<uint32_t>(kDemoEos));
  EXPECT_EQ(response.outputs(0).finish().num_output_tokens(), response.usage().completion_tokens());
  EXPECT_EQ(response.outputs(0).num_tokens(), response.usage().completion_tokens());
  EXPECT_EQ(response.prompt_info().num_prompt_tokens(), response.usage().prompt_tokens());
  EXPECT_FALSE(response.id().empty());
  EXPECT_EQ(metadata(context, "x-request-id"), "tale-1");
}

TEST_F(GrpcTest, ALabelOfOtherCharactersIsReplaced) {
  start();
  serving_->script(1, "x");
  grpc::ClientContext context;
  context.AddMetadata("x-request-id", "not a label!");
  v1::GenerateResponse response;
  ASSERT_TRUE(inference_->Generate(&context, text_request(1), &response).ok());
  EXPECT_THAT(metadata(context, "x-request-id"), testing::StartsWith("req-"));
}

TEST_F(GrpcTest, TheFoldOfAStreamIsTheAnswerOfGenerate) {
  start();
  serving_->script(1, "<think>\nEasy \u00fc\n</think>\n\nIt is 4, \u4e16\u754c.");
  v1::GenerateRequest request = chat_request(1);
  request.mutable_sampling()->set_n(3);
  request.mutable_response()->set_token_ids(true);
  request.mutable_response()->set_prompt_token_ids(true);
  request.mutable_response()->set_logprobs(true);
  grpc::ClientContext context;
  v1::GenerateResponse whole;
  ASSERT_TRUE(inference_->Generate(&context, request, &whole).ok());
  ASSERT_EQ(whole.outputs_size(), 3);
  EXPECT_EQ(whole.outputs(0).text(), "It is 4, \u4e16\u754c.");
  EXPECT_EQ(whole.outputs(0).reasoning(), "Easy \u00fc");
  EXPECT_GT(whole.prompt_info().token_ids_size(), 0);

  const std::vector<v1::GenerateResponse> messages = stream(request);
  v1::GenerateResponse folded = fold(messages);
  folded.set_id(whole.id());
  folded.mutable_prompt_info()->set_num_cached_tokens(whole.prompt_info().num_cached_tokens());
  folded.mutable_usage()->set_cached_tokens(whole.usage().cached_tokens());
  EXPECT_EQ(folded.ShortDebugString(), whole.ShortDebugString());
  // Of the messages: one output each, prompt_info first, usage last.
  for (size_t i = 0; i < messages.size(); ++i) {
    EXPECT_LE(messages[i].outputs_size(), 1);
    EXPECT_EQ(messages[i].has_prompt_info(), i == 0);
    EXPECT_EQ(messages[i].has_usage(), i + 1 == messages.size());
    EXPECT_EQ(messages[i].id(), messages[0].id());
  }
}

TEST_F(GrpcTest, WithoutTextOnlyTokenIdsComeBack) {
  start();
  serving_->script(1, " there was a king.");
  v1::GenerateRequest request = text_request(1);
  request.mutable_response()->set_text(false);
  grpc::ClientContext context;
  v1::GenerateResponse response;
  ASSERT_TRUE(inference_->Generate(&context, request, &response).ok());
  EXPECT_EQ(response.outputs(0).text(), "");
  EXPECT_EQ(response.outputs(0).token_ids_size(),
            static_cast<int>(response.usage().completion_tokens()));
}

TEST_F(GrpcTest, EveryErrorHasItsStatusCodeAndParam) {
  start();
  struct Case {
    const char* what;
    std::function<void(v1::GenerateRequest&)> bend;
    grpc::StatusCode status;
    const char *code, *param;
  };
  const std::vector<Case> cases = {
      {"no prompt", [](auto& r) { r.clear_prompt(); }, grpc::INVALID_ARGUMENT,
       "missing_required_parameter", "prompt"},
      {"empty text", [](auto& r) { r.set_text(""); }, grpc::INVALID_ARGUMENT, "invalid_value",
       "text"},
      {"unknown model", [](auto& r) { r.set_model("other"); }, grpc::NOT_FOUND, "model_not_found",
       "model"},
      {"temperature", [](auto& r) { r.mutable_sampling()->set_temperature(2.5); },
       grpc::INVALID_ARGUMENT, "invalid_value", "sampling.temperature"},
      {"NaN", [](auto& r) { r.mutable_sampling()->set_top_p(NAN); }, grpc::INVALID_ARGUMENT,
       "invalid_value", "sampling.top_p"},
      {"n", [](auto& r) { r.mutable_sampling()->set_n(1000); }, grpc::INVALID_ARGUMENT,
       "invalid_value", "sampling.n"},
      {"top_logprobs without logprobs", [](auto& r) { r.mutable_response()->set_top_logprobs(3); },
       grpc::INVALID_ARGUMENT, "invalid_value", "response.top_logprobs"},
      {"token id", [](auto& r) { r.mutable_token_ids()->add_ids(4'000'000'000u); },
       grpc::INVALID_ARGUMENT, "invalid_value", "token_ids.ids[0]"},
      {"too long", [](auto& r) { r.mutable_stopping()->set_max_tokens(100'000); },
       grpc::INVALID_ARGUMENT, nullptr, nullptr},
      {"priority", [](auto& r) { r.set_priority(1); }, grpc::INVALID_ARGUMENT,
       "unsupported_parameter", "priority"},
      {"structured output", [](auto& r) { r.mutable_structured_output()->set_json_object(true); },
       grpc::INVALID_ARGUMENT, "unsupported_parameter", "structured_output"},
      {"bypass", [](auto& r) { r.mutable_cache()->set_bypass_prefix_cache(true); },
       grpc::INVALID_ARGUMENT, "unsupported_parameter", "cache.bypass_prefix_cache"},
      {"thinking budget", [](auto& r) { r.mutable_stopping()->set_thinking_token_budget(5); },
       grpc::INVALID_ARGUMENT, "unsupported_parameter", "stopping.thinking_token_budget"},
      {"tools", [](auto& r) { r.mutable_chat()->add_tools_json("{}"); }, grpc::INVALID_ARGUMENT,
       nullptr, nullptr},
      {"kwargs no JSON", [](auto& r) { r.mutable_chat()->set_template_kwargs_json("{"); },
       grpc::INVALID_ARGUMENT, "invalid_json", "chat.template_kwargs_json"},
      {"kwargs no object", [](auto& r) { r.mutable_chat()->set_template_kwargs_json("[]"); },
       grpc::INVALID_ARGUMENT, "invalid_type", "chat.template_kwargs_json"},
      {"no messages", [](auto& r) { r.mutable_chat(); }, grpc::INVALID_ARGUMENT, nullptr,
       "chat.messages"},
      {"role", [](auto& r) { r.mutable_chat()->add_messages()->set_role("boss"); },
       grpc::INVALID_ARGUMENT, "invalid_value", "chat.messages[0].role"},
  };
  for (const Case& c : cases) {
    v1::GenerateRequest request = text_request(1);
    c.bend(request);
    grpc::ClientContext context;
    v1::GenerateResponse response;
    const grpc::Status status = inference_->Generate(&context, request, &response);
    EXPECT_EQ(status.error_code(), c.status) << c.what << ": " << status.error_message();
    if (c.code != nullptr) {
      EXPECT_EQ(metadata(context, "kvarn-error-code"), c.code) << c.what;
    }
    if (c.param != nullptr) {
      EXPECT_EQ(metadata(context, "kvarn-error-param"), c.param) << c.what;
    }
    EXPECT_NE(metadata(context, "x-request-id"), "") << c.what;

    grpc::ClientContext streamed;  // a stream refuses alike, before any message
    const auto reader = inference_->GenerateStream(&streamed, request);
    EXPECT_FALSE(reader->Read(&response)) << c.what;
    const grpc::Status stream_status = reader->Finish();
    EXPECT_EQ(stream_status.error_code(), status.error_code()) << c.what;
    EXPECT_EQ(stream_status.error_message(), status.error_message()) << c.what;
  }
  EXPECT_TRUE(serving_->wait_idle());
}

TEST_F(GrpcTest, CallsOfALaterStageSayThatTheyAreNotImplemented) {
  start();
  const auto expect_later = [](const grpc::Status& status, const grpc::ClientContext& context) {
    EXPECT_EQ(status.error_code(), grpc::UNIMPLEMENTED);
    EXPECT_EQ(metadata(context, "kvarn-error-code"), "unsupported_endpoint");
  };
  grpc::ClientContext abort, list, reset;
  v1::AbortResponse aborted;
  v1::ListRequestsResponse listed;
  v1::ResetPrefixCacheResponse was_reset;
  expect_later(control_->Abort(&abort, {}, &aborted), abort);
  expect_later(control_->ListRequests(&list, {}, &listed), list);
  expect_later(control_->ResetPrefixCache(&reset, {}, &was_reset), reset);
}

TEST_F(GrpcTest, ACancelledStreamFreesItsPages) {
  start();
  grpc::ClientContext context;
  v1::GenerateRequest request = text_request(7);  // without a script: it never ends by itself
  request.mutable_stopping()->set_max_tokens(4000);
  const auto reader = inference_->GenerateStream(&context, request);
  v1::GenerateResponse message;
  ASSERT_TRUE(reader->Read(&message));
  EXPECT_GT(serving_->stats().running, 0);
  context.TryCancel();
  while (reader->Read(&message)) {
  }
  EXPECT_EQ(reader->Finish().error_code(), grpc::CANCELLED);
  EXPECT_TRUE(serving_->wait_idle());
  EXPECT_LT(serving_->stats().generation_tokens, 4000u);
}

TEST_F(GrpcTest, ACallCancelledInTheQueueLeavesIt) {
  start();
  serving_->gate.close();
  grpc::ClientContext context;
  std::thread caller([&] {
    v1::GenerateResponse response;
    EXPECT_EQ(inference_->Generate(&context, text_request(7), &response).error_code(),
              grpc::CANCELLED);
  });
  while (serving_->state.service()->active() == 0) std::this_thread::yield();
  context.TryCancel();
  caller.join();
  serving_->gate.open();
  EXPECT_TRUE(serving_->wait_idle());
}

TEST_F(GrpcTest, ADeadlineEndsTheRequestAndFreesItsPages) {
  start();
  grpc::ClientContext context;
  context.set_deadline(std::chrono::system_clock::now() + std::chrono::milliseconds(100));
  v1::GenerateRequest request = text_request(7);
  request.mutable_stopping()->set_max_tokens(4000);
  v1::GenerateResponse response;
  EXPECT_EQ(inference_->Generate(&context, request, &response).error_code(),
            grpc::DEADLINE_EXCEEDED);
  EXPECT_TRUE(serving_->wait_idle());
  EXPECT_LT(serving_->stats().generation_tokens, 4000u);
}

TEST_F(GrpcTest, AClientThatTakesNothingIsDroppedAndOthersDoNotNotice) {
  ServingOptions options;
  options.server.outbox_bytes = 2048;
  options.server.write_seconds = 1;
  start(std::move(options));
  grpc::ChannelArguments narrow;  // a small window, so that little waits below us
  narrow.SetInt(GRPC_ARG_HTTP2_STREAM_LOOKAHEAD_BYTES, 1);
  narrow.SetInt(GRPC_ARG_HTTP2_BDP_PROBE, 0);
  connect(narrow);
  grpc::ClientContext context;
  v1::GenerateRequest request = text_request(7);
  request.mutable_stopping()->set_max_tokens(4000);
  request.mutable_response()->set_logprobs(true);  // bulk
  request.mutable_response()->set_top_logprobs(20);
  const auto reader = inference_->GenerateStream(&context, request);
  reader->WaitForInitialMetadata();
  EXPECT_TRUE(serving_->wait_idle());  // the engine is done with it at the outbox's bound
  EXPECT_LT(serving_->stats().generation_tokens, 4000u);
  serving_->script(1, "still here");
  grpc::ClientContext other;
  v1::GenerateResponse response;
  ASSERT_TRUE(inference_->Generate(&other, text_request(1), &response).ok());
  EXPECT_EQ(response.outputs(0).text(), "still here");
  v1::GenerateResponse message;
  while (reader->Read(&message)) {
  }
  EXPECT_EQ(reader->Finish().error_code(), grpc::CANCELLED);
}

TEST_F(GrpcTest, HealthFollowsTheStateOfTheServer) {
  ServingOptions options;
  options.loaded = false;
  start(std::move(options));
  EXPECT_EQ(check(""), HealthResponse::NOT_SERVING);
  grpc::ClientContext loading;
  v1::GenerateResponse response;
  EXPECT_EQ(inference_->Generate(&loading, text_request(1), &response).error_code(),
            grpc::UNAVAILABLE);
  EXPECT_EQ(metadata(loading, "kvarn-error-code"), "model_loading");

  grpc::ClientContext known, unknown;
  grpc::health::v1::HealthCheckRequest request;
  const auto watch = health_->Watch(&known, request);
  HealthResponse seen;
  ASSERT_TRUE(watch->Read(&seen));
  EXPECT_EQ(seen.status(), HealthResponse::NOT_SERVING);
  serving_->load();
  ASSERT_TRUE(watch->Read(&seen));
  EXPECT_EQ(seen.status(), HealthResponse::SERVING);
  for (const char* service : {"", "kvarn.v1.Inference", "kvarn.v1.Control"}) {
    EXPECT_EQ(check(service), HealthResponse::SERVING) << service;
  }
  EXPECT_EQ(check("nobody"), HealthResponse::SERVICE_UNKNOWN);
  serving_->state.health.set(HealthState::kDraining);
  ASSERT_TRUE(watch->Read(&seen));
  EXPECT_EQ(seen.status(), HealthResponse::NOT_SERVING);
  grpc::ClientContext draining;
  EXPECT_EQ(inference_->Generate(&draining, text_request(1), &response).error_code(),
            grpc::UNAVAILABLE);
  EXPECT_EQ(metadata(draining, "kvarn-error-code"), "server_draining");
  known.TryCancel();
  EXPECT_EQ(watch->Finish().error_code(), grpc::CANCELLED);

  request.set_service("nobody");
  const auto unknown_watch = health_->Watch(&unknown, request);
  ASSERT_TRUE(unknown_watch->Read(&seen));
  EXPECT_EQ(seen.status(), HealthResponse::SERVICE_UNKNOWN);
  unknown.TryCancel();
}

TEST_F(GrpcTest, AnUnmountedServiceIsUnimplementedAndUnknownToHealth) {
  ServingOptions options;
  options.server.grpc_services = "inference";
  start(std::move(options));
  grpc::ClientContext context;
  v1::GetLoadResponse load;
  EXPECT_EQ(control_->GetLoad(&context, {}, &load).error_code(), grpc::UNIMPLEMENTED);
  EXPECT_EQ(check("kvarn.v1.Control"), HealthResponse::SERVICE_UNKNOWN);
  EXPECT_EQ(check("kvarn.v1.Inference"), HealthResponse::SERVING);
}

TEST_F(GrpcTest, AnOversizedMessageIsRefusedAndTheNextOneServed) {
  ServingOptions options;
  options.server.grpc_max_message_bytes = 4096;
  start(std::move(options));
  serving_->script(1, "fits");
  v1::GenerateRequest request = text_request(1);
  request.set_text(std::string(10'000, 'x'));
  grpc::ClientContext large, small;
  v1::GenerateResponse response;
  EXPECT_EQ(inference_->Generate(&large, request, &response).error_code(),
            grpc::RESOURCE_EXHAUSTED);
  EXPECT_TRUE(inference_->Generate(&small, text_request(1), &response).ok());
}

TEST_F(GrpcTest, TextCallsAgreeWithEachOther) {
  start();
  grpc::ClientContext a, b, c, d;
  v1::TokenizeRequest tokenize;
  tokenize.set_text("Gr\u00fc\u00dfe, \u4e16\u754c!");
  v1::TokenizeResponse ids;
  ASSERT_TRUE(inference_->Tokenize(&a, tokenize, &ids).ok());
  EXPECT_EQ(ids.max_model_len(), 4096u);
  v1::DetokenizeRequest detokenize;
  *detokenize.mutable_token_ids() = ids.token_ids();
  v1::DetokenizeResponse text;
  ASSERT_TRUE(inference_->Detokenize(&b, detokenize, &text).ok());
  EXPECT_EQ(text.text(), tokenize.text());

  v1::RenderChatRequest render;
  *render.mutable_chat() = chat_request(1).chat();
  render.mutable_chat()->set_template_kwargs_json("{\"enable_thinking\": false}");
  v1::RenderChatResponse rendered;
  ASSERT_TRUE(inference_->RenderChat(&c, render, &rendered).ok());
  EXPECT_THAT(rendered.text(), HasSubstr("Hello!"));
  EXPECT_THAT(rendered.text(), testing::EndsWith("</think>\n\n"));

  detokenize.add_token_ids(6144);
  const grpc::Status status = inference_->Detokenize(&d, detokenize, &text);
  EXPECT_EQ(status.error_code(), grpc::INVALID_ARGUMENT);
  EXPECT_EQ(metadata(d, "kvarn-error-param"), fmt::format("token_ids[{}]", ids.token_ids_size()));
}

TEST_F(GrpcTest, ControlTellsWhatIsServedAndHowBusyItIs) {
  start();
  grpc::ClientContext a, b, c;
  v1::GetServerInfoResponse server;
  ASSERT_TRUE(control_->GetServerInfo(&a, {}, &server).ok());
  EXPECT_EQ(server.api_version(), "kvarn.v1");
  EXPECT_EQ(server.services_size(), 2);
  EXPECT_EQ(server.max_model_len(), 4096u);
  EXPECT_EQ(server.features(1).reason(), "It belongs to a later stage.");
  v1::GetModelInfoResponse model;
  ASSERT_TRUE(control_->GetModelInfo(&b, {}, &model).ok());
  EXPECT_EQ(model.model_id(), "demo");
  EXPECT_THAT(model.default_sampling_json(), HasSubstr("\"temperature\""));
  serving_->gate.close();
  grpc::ClientContext context;
  v1::GenerateRequest request = text_request(7);
  const auto reader = inference_->GenerateStream(&context, request);
  while (serving_->state.service()->active() == 0) std::this_thread::yield();
  context.TryCancel();
  serving_->gate.open();
  EXPECT_TRUE(serving_->wait_idle());
  v1::GetLoadResponse load;
  ASSERT_TRUE(control_->GetLoad(&c, {}, &load).ok());
  EXPECT_EQ(load.running(), 0u);
  EXPECT_EQ(load.kv_usage(), 0.0);
  EXPECT_GT(load.kv_free_tokens(), 0u);
}

TEST_F(GrpcTest, ShutdownWaitsForRunningCallsButNotForOpenWatches) {
  start();
  serving_->script(1, "finished in time");
  serving_->gate.close();
  grpc::ClientContext watching, context;
  const auto watch = health_->Watch(&watching, {});
  HealthResponse seen;
  ASSERT_TRUE(watch->Read(&seen));
  v1::GenerateResponse response;
  grpc::Status status;
  std::thread caller([&] { status = inference_->Generate(&context, text_request(1), &response); });
  while (serving_->state.service()->active() == 0) std::this_thread::yield();
  std::thread opener([&] {
    std::this_thread::sleep_for(std::chrono::milliseconds(100));
    serving_->gate.open();
  });
  const auto started = std::chrono::steady_clock::now();
  server_->shutdown(started + std::chrono::seconds(30));
  EXPECT_LT(std::chrono::steady_clock::now() - started, std::chrono::seconds(10));
  caller.join();
  opener.join();
  EXPECT_TRUE(status.ok()) << status.error_message();
  EXPECT_EQ(response.outputs(0).text(), "finished in time");
}

TEST_F(GrpcTest, ShutdownCancelsWhatRunsAtTheDeadline) {
  start();
  grpc::ClientContext context;
  v1::GenerateRequest request = text_request(7);
  request.mutable_stopping()->set_max_tokens(4000);
  const auto reader = inference_->GenerateStream(&context, request);
  v1::GenerateResponse message;
  ASSERT_TRUE(reader->Read(&message));
  server_->shutdown(std::chrono::steady_clock::now());
  while (reader->Read(&message)) {
  }
  EXPECT_FALSE(reader->Finish().ok());
  EXPECT_TRUE(serving_->wait_idle());
}

TEST_F(GrpcTest, APortInUseIsAnErrorThatNamesTheFlag) {
  start();
  ServingOptions options;
  options.server.grpc_port = server_->port();
  Serving second(std::move(options));
  const auto refused = start_grpc_server(second.state);
  ASSERT_FALSE(refused.is_ok());
  EXPECT_THAT(refused.status().message(), HasSubstr("--grpc-port"));
}

TEST_F(GrpcTest, AStormOfCancelsLeavesNothingBehind) {
  start();
  serving_->script(1, "the answer of others stays whole");
  std::vector<std::thread> clients;
  std::atomic<int> whole = 0;
  for (int i = 0; i < 8; ++i) {
    clients.emplace_back([&, i] {
      std::mt19937 random(static_cast<unsigned>(i));
      for (int round = 0; round < 25; ++round) {
        grpc::ClientContext context;
        v1::GenerateResponse response;
        if (i % 2 == 0) {
          const bool ok = inference_->Generate(&context, text_request(1), &response).ok();
          if (ok && response.outputs(0).text() == "the answer of others stays whole") ++whole;
          continue;
        }
        v1::GenerateRequest request = text_request(7);
        request.mutable_stopping()->set_max_tokens(2000);
        const auto reader = inference_->GenerateStream(&context, request);
        for (unsigned reads = random() % 8; reads > 0 && reader->Read(&response); --reads) {
        }
        context.TryCancel();
        reader->Finish();
      }
    });
  }
  for (std::thread& client : clients) client.join();
  EXPECT_EQ(whole, 100);
  EXPECT_TRUE(serving_->wait_idle());
  EXPECT_EQ(serving_->stats().leaked_pages, 0);
}

TEST(GrpcConvertTest, NoMutatedMessageCrashesTheConversion) {
  v1::GenerateRequest valid;
  v1::ChatMessage& message = *valid.mutable_chat()->add_messages();
  message.set_role("assistant");
  message.set_reasoning_content("r");
  message.add_tool_calls()->set_arguments("{\"a\": 1}");
  valid.mutable_chat()->set_template_kwargs_json("{\"enable_thinking\": [false, {\"x\": 1e5}]}");
  valid.mutable_chat()->add_tools_json("{\"type\": \"function\"}");
  valid.mutable_sampling()->set_temperature(0.5);
  (*valid.mutable_sampling()->mutable_logit_bias())[5] = 1.f;
  const std::string bytes = valid.SerializeAsString();
  google::protobuf::SetLogHandler(nullptr);  // it would print each invalid string
  std::mt19937 random(3);
  int parsed = 0;
  for (int i = 0; i < 50000; ++i) {
    std::string mutated = bytes;
    for (unsigned edits = 1 + random() % 3; edits > 0; --edits) {
      mutated[random() % mutated.size()] = static_cast<char>(random());
    }
    v1::GenerateRequest request;
    if (!request.ParseFromString(mutated)) continue;
    ++parsed;
    const auto converted = grpc_convert::to_request(request, 20);
    if (!converted.is_ok()) {
      EXPECT_FALSE(converted.status().param().empty());
    }
  }
  EXPECT_GT(parsed, 5000);
}

TEST(GrpcConvertTest, AFloatBecomesTheDoubleOfItsShortestForm) {
  v1::GenerateRequest proto;
  proto.set_text("x");
  proto.mutable_sampling()->set_temperature(0.1f);
  EXPECT_EQ(*grpc_convert::to_request(proto, 20).value().sampling.temperature, 0.1);
}

TEST(GrpcConvertTest, AnEmptyContentIsAbsentOnlyForAnAssistantWithSomethingElse) {
  v1::ChatPrompt proto;
  proto.add_messages()->set_role("user");
  proto.add_messages()->set_role("assistant");
  v1::ChatMessage& thinking = *proto.add_messages();
  thinking.set_role("assistant");
  thinking.set_reasoning_content("hm");
  const ChatPrompt chat = grpc_convert::to_chat(proto, 20).value();
  EXPECT_TRUE(chat.messages[0].content.has_value());
  EXPECT_TRUE(chat.messages[1].content.has_value());
  EXPECT_FALSE(chat.messages[2].content.has_value());
}

}  // namespace
}  // namespace kvarn::test
