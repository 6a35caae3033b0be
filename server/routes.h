// The HTTP surface as a table: every endpoint of docs/api.md section 2, with its stage. Pure.
#pragma once

#include <cstdint>
#include <span>
#include <string>
#include <string_view>

namespace kvarn {

enum class Handler : uint8_t {
  kChat,
  kCompletions,
  kModels,
  kModel,
  kHealth,
  kLive,
  kReady,
  kMetrics,
  kVersion,
  kTokenize,
  kDetokenize,
  kApplyTemplate,
  kLaterStage,  // answers 501
};

struct Endpoint {
  std::string_view method;   // GET (which answers HEAD too) or POST
  std::string_view pattern;  // label in metrics; "/{id}" at the end takes the rest of the path
  std::string_view stage;    // "1", "2", "L"
  bool open;                 // answers while the model loads and while the server drains
  Handler handler;

  bool takes_body() const { return method == "POST"; }
  std::string_view allow() const {  // value of the Allow header
    return takes_body() ? "POST, OPTIONS" : "GET, HEAD, OPTIONS";
  }
};

std::span<const Endpoint> endpoints();
// By exact path (no query, no decoding but of {id}); null: unknown path.
const Endpoint* find_endpoint(std::string_view path);
// The percent-decoded rest of a path that matched ".../{id}".
std::string path_id(const Endpoint& endpoint, std::string_view path);
// The path of a request target: origin form or absolute form, without the query.
std::string_view target_path(std::string_view target);

}  // namespace kvarn
