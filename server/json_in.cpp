#include "server/json_in.h"

#include <cmath>
#include <limits>

#include <fmt/format.h>
#include <nlohmann/json.hpp>

#include "engine/tokenizer/detokenizer.h"
#include "server/param_error.h"

namespace kvarn {
namespace {

using nlohmann::ordered_json;

// An object keeps its members in a list, so looking them up costs the square of their number.
constexpr size_t kMaxMembers = 4096;
constexpr size_t kMaxContainers = 1 << 18;  // each costs an allocation or two

Status json_error(const char* reason, std::string message) {
  return {StatusCode::kInvalidArgument, reason, std::move(message)};
}

// First pass: checks syntax and counts, builds nothing.
class Guard : public nlohmann::json_sax<ordered_json> {
 public:
  explicit Guard(int max_depth) : max_depth_(static_cast<size_t>(max_depth)) {}
  Status status;

  bool null() override { return true; }
  bool boolean(bool) override { return true; }
  bool number_integer(number_integer_t) override { return true; }
  bool number_unsigned(number_unsigned_t) override { return true; }
  bool number_float(number_float_t, const string_t&) override { return true; }
  bool string(string_t&) override { return true; }
  bool binary(binary_t&) override { return true; }
  bool start_object(size_t) override { return open(); }
  bool start_array(size_t) override { return open(); }
  bool end_object() override { return close(); }
  bool end_array() override { return close(); }
  bool key(string_t&) override {
    if (++members_.back() <= kMaxMembers) return true;
    return refuse("invalid_value",
                  fmt::format("an object in the body has more than {} members", kMaxMembers));
  }
  bool parse_error(size_t position, const std::string&,
                   const nlohmann::detail::exception& error) override {
    if (error.id == 406) {
      return refuse("invalid_json",
                    fmt::format("a number at byte {} does not fit a double", position));
    }
    return refuse("invalid_json", fmt::format("not valid JSON at byte {}", position));
  }

 private:
  bool open() {
    members_.push_back(0);
    if (members_.size() > max_depth_) {
      return refuse(
          "json_too_deep",
          fmt::format("the body nests deeper than {} levels (--max-json-depth)", max_depth_));
    }
    if (++containers_ <= kMaxContainers) return true;
    return refuse("invalid_value",
                  fmt::format("the body has more than {} objects and arrays", kMaxContainers));
  }
  bool close() {
    members_.pop_back();
    return true;
  }
  bool refuse(const char* reason, std::string message) {
    status = json_error(reason, std::move(message));
    return false;
  }

  const size_t max_depth_;
  std::vector<size_t> members_;  // of the open containers
  size_t containers_ = 0;
};

}  // namespace

Result<ordered_json> parse_json(std::string_view text, int max_depth) {
  if (!is_valid_utf8(text)) return json_error("invalid_utf8", "the body is not valid UTF-8");
  if (text.find_first_not_of(" \t\r\n") == std::string_view::npos) {
    return json_error("invalid_json", "the body is empty");
  }
  Guard guard(max_depth);
  if (!ordered_json::sax_parse(text, &guard)) return guard.status;
  ordered_json value = ordered_json::parse(text, nullptr, /*allow_exceptions=*/false);
  if (value.is_discarded()) return json_error("invalid_json", "not valid JSON");
  return value;
}

Result<ordered_json> parse_body(std::string_view body, int max_depth) {
  KVARN_ASSIGN_OR_RETURN(ordered_json value, parse_json(body, max_depth));
  if (!value.is_object()) {
    return json_error("body_not_object",
                      fmt::format("the body must be a JSON object, got {}", json_type(value)));
  }
  return value;
}

const char* json_type(const ordered_json& value) { return value.type_name(); }

std::optional<int64_t> as_integer(const ordered_json& value) {
  if (value.is_number_unsigned()) {
    const auto number = value.get<uint64_t>();
    if (number > static_cast<uint64_t>(std::numeric_limits<int64_t>::max())) return std::nullopt;
    return static_cast<int64_t>(number);
  }
  if (value.is_number_integer()) return value.get<int64_t>();
  if (!value.is_number_float()) return std::nullopt;
  const double number = value.get<double>();
  // Doubles at and beyond 2^63 do not fit; below it every whole one does.
  if (number != std::floor(number) || number < -0x1p63 || number >= 0x1p63) return std::nullopt;
  return static_cast<int64_t>(number);
}

void FieldReader::fail(Status status) {
  if (status_.is_ok()) status_ = std::move(status);
}

void FieldReader::wrong_type(const char* name, const char* wanted, const ordered_json& got) {
  fail(type_error(path(name), wanted, json_type(got)));
}

const ordered_json* FieldReader::find(const char* name) {
  if (!ok()) return nullptr;
  const auto member = object_.find(name);
  return member == object_.end() || member->is_null() ? nullptr : &*member;
}

std::optional<bool> FieldReader::boolean(const char* name) {
  const ordered_json* value = find(name);
  if (value == nullptr) return std::nullopt;
  if (value->is_boolean()) return value->get<bool>();
  wrong_type(name, "a boolean", *value);
  return std::nullopt;
}

std::optional<double> FieldReader::number(const char* name) {
  const ordered_json* value = find(name);
  if (value == nullptr) return std::nullopt;
  if (value->is_number()) return value->get<double>();
  wrong_type(name, "a number", *value);
  return std::nullopt;
}

std::optional<int64_t> FieldReader::integer(const char* name) {
  const ordered_json* value = find(name);
  if (value == nullptr) return std::nullopt;
  if (const std::optional<int64_t> number = as_integer(*value)) return number;
  if (value->is_number() && std::abs(value->get<double>()) >= 0x1p63) {
    fail(range_error(path(name), "a 64-bit integer", shown_value(value->get<double>())));
  } else {
    wrong_type(name, "an integer", *value);
  }
  return std::nullopt;
}

std::optional<std::string> FieldReader::string(const char* name) {
  const ordered_json* value = find(name);
  if (value == nullptr) return std::nullopt;
  if (value->is_string()) return value->get<std::string>();
  wrong_type(name, "a string", *value);
  return std::nullopt;
}

const ordered_json* FieldReader::array(const char* name) {
  const ordered_json* value = find(name);
  if (value == nullptr || value->is_array()) return value;
  wrong_type(name, "an array", *value);
  return nullptr;
}

const ordered_json* FieldReader::object(const char* name) {
  const ordered_json* value = find(name);
  if (value == nullptr || value->is_object()) return value;
  wrong_type(name, "an object", *value);
  return nullptr;
}

std::vector<int64_t> FieldReader::integers(const char* name) {
  std::vector<int64_t> out;
  const ordered_json* values = array(name);
  if (values == nullptr) return out;
  for (size_t i = 0; i < values->size(); ++i) {
    const std::optional<int64_t> number = as_integer((*values)[i]);
    if (!number.has_value()) {
      fail(type_error(fmt::format("{}[{}]", path(name), i), "an integer", json_type((*values)[i])));
      return {};
    }
    out.push_back(*number);
  }
  return out;
}

}  // namespace kvarn
