#include "kernels/core/log.h"
#include "server/server_config.h"

#include <algorithm>
#include <initializer_list>

#include <fmt/format.h>

#include "engine/config.h"

namespace kvarn {
namespace {

Status out_of_range(std::string_view flag, const auto& value, std::string_view range) {
  return Status::invalid_argument(fmt::format("--{} must be {}, got {}", flag, range, value));
}

Status one_of(std::string_view flag, const std::string& value,
              std::initializer_list<std::string_view> allowed) {
  for (const std::string_view name : allowed) {
    if (value == name) return Status::ok();
  }
  return Status::invalid_argument(
      fmt::format("--{} must be one of {}, got '{}'", flag, fmt::join(allowed, ", "), value));
}

Status check_tool_parser(const std::string& value) {
  if (value == "hermes" || value == "qwen3_coder") {
    return {StatusCode::kUnimplemented, "unsupported_flag",
            fmt::format("--tool-call-parser {} needs tool calls, which belong to stage 2 and are "
                        "not built yet; use auto or none",
                        value)};
  }
  return one_of("tool-call-parser", value, {"auto", "none"});
}

Status check_services(const std::string& list) {
  size_t begin = 0;
  while (begin <= list.size()) {
    const size_t end = std::min(list.find(',', begin), list.size());
    const std::string name = list.substr(begin, end - begin);
    if (name != "inference" && name != "control") {
      return Status::invalid_argument(fmt::format(
          "--grpc-services must list inference, control or both, comma-separated, got '{}'", list));
    }
    begin = end + 1;
  }
  return Status::ok();
}

}  // namespace

Status ServerConfig::validate(const EngineConfig& engine) const {
  const auto integer = [](std::string_view flag, int64_t value, int64_t low, int64_t high) {
    if (value >= low && value <= high) return Status::ok();
    return out_of_range(flag, value, fmt::format("{} to {}", low, high));
  };
  const auto seconds = [](std::string_view flag, double value, bool zero_is_off) {
    // Beyond a year it is a mistake, and sums of time points stay far from overflow.
    if ((value > 0 || (zero_is_off && value == 0)) && value <= 366.0 * 86400) return Status::ok();
    return out_of_range(flag, value,
                        zero_is_off ? "0 (off) or seconds up to a year" : "seconds, > 0");
  };
  if (host.empty()) return out_of_range("host", "''", "an IP address or a host name");
  KVARN_RETURN_IF_ERROR(integer("port", port, 0, 65535));
  KVARN_RETURN_IF_ERROR(integer("max-connections", max_connections, 1, 1 << 20));
  KVARN_RETURN_IF_ERROR(integer("max-header-bytes", max_header_bytes, 1024, 1 << 24));
  KVARN_RETURN_IF_ERROR(integer("max-body-bytes", max_body_bytes, 1024, int64_t{1} << 32));
  KVARN_RETURN_IF_ERROR(integer("max-json-depth", max_json_depth, 4, 1000));
  KVARN_RETURN_IF_ERROR(seconds("header-seconds", header_seconds, false));
  KVARN_RETURN_IF_ERROR(seconds("body-seconds", body_seconds, false));
  KVARN_RETURN_IF_ERROR(seconds("keep-alive-seconds", keep_alive_seconds, false));
  KVARN_RETURN_IF_ERROR(seconds("write-seconds", write_seconds, false));
  KVARN_RETURN_IF_ERROR(integer("outbox-bytes", outbox_bytes, 1024, int64_t{1} << 32));
  KVARN_RETURN_IF_ERROR(seconds("sse-ping-seconds", sse_ping_seconds, true));
  KVARN_RETURN_IF_ERROR(
      integer("max-sequences-per-request", max_sequences_per_request, 1, 1 << 20));
  if (engine.max_queued_requests < max_sequences_per_request) {
    return Status::invalid_argument(
        fmt::format("--max-queued-requests {} is smaller than --max-sequences-per-request {}: such "
                    "a request could never be accepted; raise the first or lower the second",
                    engine.max_queued_requests, max_sequences_per_request));
  }
  KVARN_RETURN_IF_ERROR(seconds("max-request-seconds", max_request_seconds, true));
  if (!(drain_seconds >= 0 && drain_seconds <= 366.0 * 86400)) {
    return out_of_range("drain-seconds", drain_seconds, "seconds, >= 0");
  }
  KVARN_RETURN_IF_ERROR(integer("default-max-tokens", default_max_tokens, 0, int64_t{1} << 31));
  KVARN_RETURN_IF_ERROR(one_of("reasoning-parser", reasoning_parser, {"auto", "qwen3", "none"}));
  KVARN_RETURN_IF_ERROR(check_tool_parser(tool_call_parser));
  KVARN_RETURN_IF_ERROR(
      one_of("reasoning-field", reasoning_field, {"both", "reasoning_content", "reasoning"}));
  KVARN_RETURN_IF_ERROR(one_of("metrics-compat", metrics_compat, {"vllm", "none"}));
  if (!parse_log_level(log_level)) {
    return one_of("log-level", log_level, {"debug", "info", "warning", "error", "off"});
  }
  KVARN_RETURN_IF_ERROR(integer("io-threads", io_threads, 1, 64));
  KVARN_RETURN_IF_ERROR(integer("output-threads", output_threads, 1, 64));
  KVARN_RETURN_IF_ERROR(integer("grpc-port", grpc_port, 0, 65535));
  if (grpc_port != 0 && grpc_port == port) {
    return out_of_range("grpc-port", grpc_port, "another port than --port");
  }
  KVARN_RETURN_IF_ERROR(check_services(grpc_services));
  KVARN_RETURN_IF_ERROR(
      integer("grpc-max-message-bytes", grpc_max_message_bytes, 0, (int64_t{1} << 31) - 1));
  if (grpc_tls_cert.empty() != grpc_tls_key.empty()) {
    return Status::invalid_argument(
        "--grpc-tls-cert and --grpc-tls-key belong together: give both or none");
  }
  if (!grpc_tls_client_ca.empty() && grpc_tls_cert.empty()) {
    return Status::invalid_argument(
        "--grpc-tls-client-ca needs --grpc-tls-cert and --grpc-tls-key");
  }
  return integer("grpc-keepalive-seconds", grpc_keepalive_seconds, 1, 86400);
}

Status unsupported_flag_error(const UnsupportedFlag& flag) {
  return {StatusCode::kUnimplemented, "unsupported_flag",
          fmt::format("--{} belongs to stage {} and is not built yet; until then {}", flag.name,
                      flag.stage, flag.remedy)};
}

}  // namespace kvarn
