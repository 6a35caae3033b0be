// ServerConfig: the only list of settings of the wire (docs/api.md, "Limits" and "gRPC"). Flags,
// the JSON file, environment variables, --help and the start-up dump are all made from visit().
// Order: default < file < KVARN_* variable < flag. const after validate().
#pragma once

#include <array>
#include <cstdint>
#include <string>
#include <string_view>

#include "kernels/core/status.h"

namespace kvarn {

struct EngineConfig;

struct ServerConfig {
  std::string host = "127.0.0.1";
  int port = 8000;
  int max_connections = 4096;
  int64_t max_header_bytes = 32 * 1024;
  int64_t max_body_bytes = 16 * 1024 * 1024;
  int max_json_depth = 100;
  double header_seconds = 10;
  double body_seconds = 30;
  double keep_alive_seconds = 75;
  double write_seconds = 30;
  int64_t outbox_bytes = 1024 * 1024;
  double sse_ping_seconds = 15;
  int max_sequences_per_request = 512;
  double max_request_seconds = 3600;
  double drain_seconds = 30;
  int64_t default_max_tokens = 0;
  bool generation_config = true;
  std::string reasoning_parser = "auto";
  std::string tool_call_parser = "auto";
  std::string reasoning_field = "both";
  std::string metrics_compat = "vllm";
  std::string log_level = "info";
  int io_threads = 2;
  int output_threads = 2;
  int grpc_port = 8001;
  std::string grpc_services = "inference,control";
  int64_t grpc_max_message_bytes = 0;
  std::string grpc_tls_cert;
  std::string grpc_tls_key;
  std::string grpc_tls_client_ca;
  int grpc_keepalive_seconds = 60;
  bool grpc_reflection = true;

  static void visit(auto& self, auto&& field) {
    field("host", self.host, "address to listen on, for HTTP and gRPC");
    field("port", self.port, "port of the HTTP server; 0: any free one");
    field("max-connections", self.max_connections, "open HTTP connections; more are answered 503");
    field("max-header-bytes", self.max_header_bytes, "longest header block of a request; else 431");
    field("max-body-bytes", self.max_body_bytes, "longest body of a request; else 413");
    field("max-json-depth", self.max_json_depth, "deepest nesting of a JSON body; else 400");
    field("header-seconds", self.header_seconds,
          "time for a request's headers to arrive; else 408");
    field("body-seconds", self.body_seconds, "longest gap between two reads of a body; else 408");
    field("keep-alive-seconds", self.keep_alive_seconds, "an idle connection is closed after this");
    field("write-seconds", self.write_seconds,
          "a peer that accepts no byte for so long is a slow reader and is dropped");
    field("outbox-bytes", self.outbox_bytes,
          "text waiting for one slow reader; more ends its request");
    field("sse-ping-seconds", self.sse_ping_seconds,
          "a stream without output sends a comment this often; 0: never");
    field("max-sequences-per-request", self.max_sequences_per_request,
          "prompts x n of one completions request");
    field("max-request-seconds", self.max_request_seconds,
          "a request is answered 504 after this; 0: no limit");
    field("drain-seconds", self.drain_seconds,
          "after SIGTERM accepted requests may run on for so long");
    field("default-max-tokens", self.default_max_tokens,
          "output limit of a chat that names none; 0: the rest of the context");
    field("generation-config", self.generation_config,
          "take sampling defaults from the model's generation_config.json");
    field("reasoning-parser", self.reasoning_parser,
          "auto, qwen3 or none: how <think> is split off; auto looks at the chat template");
    field("tool-call-parser", self.tool_call_parser,
          "auto or none; hermes and qwen3_coder come with tool calls, a later stage");
    field("reasoning-field", self.reasoning_field,
          "member that carries reasoning: both, reasoning_content or reasoning");
    field("metrics-compat", self.metrics_compat,
          "vllm: standard series keep the names that dashboards know; none: all under kvarn:");
    field("log-level", self.log_level, "debug, info, warning, error or off; lines go to stderr");
    field("io-threads", self.io_threads, "threads that serve HTTP connections");
    field("output-threads", self.output_threads, "threads that turn tokens into text");
    field("grpc-port", self.grpc_port, "port of the gRPC server; 0: off");
    field("grpc-services", self.grpc_services, "mounted services: inference, control");
    field("grpc-max-message-bytes", self.grpc_max_message_bytes,
          "longest gRPC message; 0: as --max-body-bytes");
    field("grpc-tls-cert", self.grpc_tls_cert, "PEM file with the gRPC server's certificate chain");
    field("grpc-tls-key", self.grpc_tls_key, "PEM file with its private key");
    field("grpc-tls-client-ca", self.grpc_tls_client_ca,
          "PEM file; clients must present a certificate signed by it");
    field("grpc-keepalive-seconds", self.grpc_keepalive_seconds,
          "idle gRPC connections are pinged this often");
    field("grpc-reflection", self.grpc_reflection, "serve the gRPC reflection service");
  }

  // Names the flag, the value and the allowed range. Cross-checks with the engine's settings too.
  Status validate(const EngineConfig& engine) const;
};

// A flag that docs/api.md names for a stage that is not built. Giving it refuses to start: an
// --api-key that guards nothing would be worse than none.
struct UnsupportedFlag {
  std::string_view name;    // without dashes
  std::string_view stage;   // "2" or "L"
  std::string_view remedy;  // what to do until then
};
inline constexpr std::array kUnsupportedFlags = {
    UnsupportedFlag{"api-key", "2", "put an authenticating proxy in front"},
    UnsupportedFlag{"api-key-file", "2", "put an authenticating proxy in front"},
    UnsupportedFlag{"admin-api-key", "2", "put an authenticating proxy in front"},
    UnsupportedFlag{"protect-metrics", "2", "put an authenticating proxy in front"},
    UnsupportedFlag{"cors-origins", "2", "let a proxy add the CORS headers"},
    UnsupportedFlag{"tls-cert", "2", "end TLS in a proxy (gRPC has --grpc-tls-cert)"},
    UnsupportedFlag{"tls-key", "2", "end TLS in a proxy (gRPC has --grpc-tls-key)"},
    UnsupportedFlag{"max-queued-tokens", "2", "use --max-queued-requests"},
    UnsupportedFlag{"max-schema-bytes", "2", "structured output is not served yet"},
    UnsupportedFlag{"schema-compile-ms", "2", "structured output is not served yet"},
};
// The error for one of the flags above: kUnimplemented, naming the flag, its stage and the remedy.
Status unsupported_flag_error(const UnsupportedFlag& flag);

}  // namespace kvarn
