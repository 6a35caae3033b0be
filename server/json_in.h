// JSON from clients: parsed within bounds, read field by field with errors that name the path.
// Pure.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include <nlohmann/json_fwd.hpp>

#include "kernels/core/status.h"

namespace kvarn {

// The body as an object. Of a member that occurs twice the last value counts. Errors: invalid_utf8,
// invalid_json (with the byte offset), json_too_deep, body_not_object, and invalid_value for more
// values than any request needs: what parsing costs is bounded by the body's size.
Result<nlohmann::ordered_json> parse_body(std::string_view body, int max_depth);
// The same bounds for JSON that is not a body (a field of a gRPC message): any type.
Result<nlohmann::ordered_json> parse_json(std::string_view text, int max_depth);

// "string", "number", "boolean", "null", "array", "object".
const char* json_type(const nlohmann::ordered_json& value);
std::optional<int64_t> as_integer(const nlohmann::ordered_json& value);  // 3.0 is 3; else nothing

// Reads members of one object. null means absent. The first error stays; after it every read gives
// nothing, so a parser reads on and asks status() once. No coercion.
class FieldReader {
 public:
  // `prefix` comes before each name in error paths ("messages[2]."). Both are borrowed.
  FieldReader(const nlohmann::ordered_json& object, std::string prefix)
      : object_(object), prefix_(std::move(prefix)) {}

  const nlohmann::ordered_json* find(const char* name);  // null pointer: absent
  std::optional<bool> boolean(const char* name);
  std::optional<double> number(const char* name);
  std::optional<int64_t> integer(const char* name);
  std::optional<std::string> string(const char* name);
  const nlohmann::ordered_json* array(const char* name);
  const nlohmann::ordered_json* object(const char* name);
  std::vector<int64_t> integers(const char* name);

  std::string path(std::string_view name) const { return prefix_ + std::string(name); }
  void fail(Status status);
  const Status& status() const { return status_; }
  bool ok() const { return status_.is_ok(); }

 private:
  void wrong_type(const char* name, const char* wanted, const nlohmann::ordered_json& got);

  const nlohmann::ordered_json& object_;
  std::string prefix_;
  Status status_;
};

}  // namespace kvarn
