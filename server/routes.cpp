#include "server/routes.h"

#include <array>

namespace kvarn {
namespace {

constexpr std::string_view kIdSuffix = "/{id}";

constexpr std::array kEndpoints = {
    Endpoint{"POST", "/v1/chat/completions", "1", false, Handler::kChat},
    Endpoint{"POST", "/v1/completions", "1", false, Handler::kCompletions},
    Endpoint{"GET", "/v1/models", "1", false, Handler::kModels},
    Endpoint{"GET", "/v1/models/{id}", "1", false, Handler::kModel},
    Endpoint{"GET", "/health", "1", true, Handler::kHealth},
    Endpoint{"GET", "/health/live", "1", true, Handler::kLive},
    Endpoint{"GET", "/health/ready", "1", true, Handler::kReady},
    Endpoint{"GET", "/metrics", "1", true, Handler::kMetrics},
    Endpoint{"GET", "/version", "1", false, Handler::kVersion},
    Endpoint{"POST", "/tokenize", "1", false, Handler::kTokenize},
    Endpoint{"POST", "/detokenize", "1", false, Handler::kDetokenize},
    Endpoint{"POST", "/apply-template", "1", false, Handler::kApplyTemplate},
    Endpoint{"GET", "/health/decode", "2", false, Handler::kLaterStage},
    Endpoint{"POST", "/v1/responses", "2", false, Handler::kLaterStage},
    Endpoint{"POST", "/v1/messages", "2", false, Handler::kLaterStage},
    Endpoint{"POST", "/v1/messages/count_tokens", "2", false, Handler::kLaterStage},
    Endpoint{"POST", "/abort_requests", "2", false, Handler::kLaterStage},
    Endpoint{"GET", "/debug/requests", "2", false, Handler::kLaterStage},
    Endpoint{"POST", "/reset_prefix_cache", "2", false, Handler::kLaterStage},
    Endpoint{"GET", "/openapi.json", "2", true, Handler::kLaterStage},
    Endpoint{"GET", "/", "L", true, Handler::kLaterStage},
    Endpoint{"POST", "/v1/embeddings", "L", false, Handler::kLaterStage},
    Endpoint{"POST", "/v1/rerank", "L", false, Handler::kLaterStage},
    Endpoint{"POST", "/v1/load_lora_adapter", "L", false, Handler::kLaterStage},
    Endpoint{"POST", "/v1/unload_lora_adapter", "L", false, Handler::kLaterStage},
};

int hex_digit(char c) {
  if (c >= '0' && c <= '9') return c - '0';
  if (c >= 'a' && c <= 'f') return c - 'a' + 10;
  if (c >= 'A' && c <= 'F') return c - 'A' + 10;
  return -1;
}

}  // namespace

std::span<const Endpoint> endpoints() { return kEndpoints; }

const Endpoint* find_endpoint(std::string_view path) {
  for (const Endpoint& endpoint : kEndpoints) {
    if (endpoint.pattern.ends_with(kIdSuffix)) {
      const std::string_view prefix =
          endpoint.pattern.substr(0, endpoint.pattern.size() - kIdSuffix.size() + 1);
      if (path.size() > prefix.size() && path.starts_with(prefix)) return &endpoint;
    } else if (path == endpoint.pattern) {
      return &endpoint;
    }
  }
  return nullptr;
}

std::string path_id(const Endpoint& endpoint, std::string_view path) {
  path.remove_prefix(endpoint.pattern.size() - kIdSuffix.size() + 1);
  std::string out;
  for (size_t i = 0; i < path.size(); ++i) {
    if (path[i] == '%' && path.size() - i > 2) {
      const int high = hex_digit(path[i + 1]), low = hex_digit(path[i + 2]);
      if (high >= 0 && low >= 0) {
        out += static_cast<char>(high * 16 + low);
        i += 2;
        continue;
      }
    }
    out += path[i];
  }
  return out;
}

std::string_view target_path(std::string_view target) {
  if (const size_t scheme = target.find("://");
      scheme != std::string_view::npos && !target.starts_with("/")) {
    const size_t path = target.find('/', scheme + 3);
    target = path == std::string_view::npos ? std::string_view("/") : target.substr(path);
  }
  return target.substr(0, target.find_first_of("?#"));
}

}  // namespace kvarn
