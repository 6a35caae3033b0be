#include "server/param_error.h"

#include <fmt/format.h>

#include "server/json_out.h"

namespace kvarn {
namespace {

Status invalid(const char* reason, std::string message, std::string_view path) {
  return {StatusCode::kInvalidArgument, reason, std::move(message), std::string(path)};
}

}  // namespace

Status type_error(std::string_view path, std::string_view type, std::string_view got) {
  return invalid("invalid_type", fmt::format("'{}' must be {}, got {}", path, type, got), path);
}

Status range_error(std::string_view path, std::string_view range, std::string_view got) {
  return invalid("invalid_value", fmt::format("'{}' must be {}, got {}", path, range, got), path);
}

Status missing_error(std::string_view path) {
  return invalid("missing_required_parameter", fmt::format("'{}' is required", path), path);
}

Status needs_error(std::string_view path, std::string_view other) {
  return invalid("invalid_value", fmt::format("'{}' needs '{}'", path, other), path);
}

Status conflict_error(std::string_view path, std::string_view other) {
  return invalid("invalid_value", fmt::format("'{}' conflicts with '{}'", path, other), path);
}

Status unsupported_error(std::string_view path, std::string_view value, std::string_view remedy) {
  return invalid("unsupported_parameter",
                 fmt::format("'{}' is not supported: {}; {}", path, value, remedy), path);
}

std::string shown_value(double value) { return fmt::format("{:.6g}", value); }
std::string shown_value(int64_t value) { return fmt::format("{}", value); }
std::string shown_value(std::string_view text) {
  return fmt::format("'{}'", quote_for_message(text));
}

}  // namespace kvarn
