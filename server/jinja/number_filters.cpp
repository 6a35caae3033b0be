// Filters that make numbers.
#include <array>
#include <cctype>
#include <cerrno>
#include <cmath>
#include <cstdlib>

#include <fmt/format.h>

#include "server/jinja/error.h"
#include "server/jinja/filter_support.h"
#include "server/jinja/text.h"

namespace kvarn::jinja {
namespace {

Value filter_abs(Interpreter& interpreter, const Value& input, const Args& args) {
  bind_none("abs", args);
  if (input.is_real()) return Value::real(std::abs(as_double(input, "abs()'s input")));
  const int64_t value = as_integer(input, "abs()'s input");
  return value < 0 ? arithmetic(interpreter, BinaryOp::kSub, Value::integer(0), input)
                   : Value::integer(value);
}

// A whole number in text, as int() reads it: white space around, a sign, underscores between
// digits.
std::optional<int64_t> parse_integer(std::string_view text, int64_t base) {
  text = strip(text, Side::kBoth);
  std::string digits;
  bool negative = false, after_digit = false;
  if (!text.empty() && (text.front() == '-' || text.front() == '+')) {
    negative = text.front() == '-';
    text.remove_prefix(1);
  }
  if ((base == 16 || base == 8 || base == 2) && text.size() > 2 && text.front() == '0') {
    const char mark = static_cast<char>(text[1] | 0x20);
    if (mark == (base == 16 ? 'x' : base == 8 ? 'o' : 'b')) text.remove_prefix(2);
  }
  for (const char c : text) {
    if (c == '_' && after_digit) {
      after_digit = false;
      continue;
    }
    if (std::isalnum(static_cast<unsigned char>(c)) == 0) return std::nullopt;
    digits += c;
    after_digit = true;
  }
  if (digits.empty() || !after_digit) return std::nullopt;
  errno = 0;
  char* end = nullptr;
  if (negative) digits.insert(digits.begin(), '-');
  const long long value = std::strtoll(digits.c_str(), &end, static_cast<int>(base));
  if (*end != '\0') return std::nullopt;
  if (errno == ERANGE) throw TemplateError("int() gives a number that does not fit into 64 bits");
  return value;
}

std::optional<double> parse_double(std::string_view text) {
  const std::string trimmed(strip(text, Side::kBoth));
  if (trimmed.empty()) return std::nullopt;
  const bool is_hex = trimmed.find_first_of("xX") != trimmed.npos;
  const bool is_nan_with_payload = trimmed.find('(') != trimmed.npos;
  if (is_hex || is_nan_with_payload) return std::nullopt;
  char* end = nullptr;
  const double value = std::strtod(trimmed.c_str(), &end);
  if (end != trimmed.c_str() + trimmed.size()) return std::nullopt;
  return value;
}

std::optional<int64_t> truncated(double value) {
  if (!std::isfinite(value)) return std::nullopt;
  if (std::abs(value) >= 0x1p63)
    throw TemplateError("int() gives a number that does not fit into 64 bits");
  return static_cast<int64_t>(value);
}

void refuse_undefined(const Value& value) {
  if (const auto* undefined = value.get_if<std::shared_ptr<const Undefined>>()) {
    throw TemplateError((*undefined)->what);
  }
}

Value filter_int(Interpreter&, const Value& input, const Args& args) {
  const Bound bound = bind("int", args, std::array<std::string_view, 2>{"default", "base"});
  refuse_undefined(input);
  const Value otherwise = bound[0].value_or(Value::integer(0));
  const int64_t base = integer(bound[1], "int()'s base", 10);
  if (base < 2 || base > 36) throw TemplateError("int()'s base must be from 2 to 36");
  if (input.is_integer()) return input;
  if (input.is_bool()) return Value::integer(as_integer(input, "int()'s input"));
  std::optional<int64_t> value;
  if (input.is_real()) {
    value = truncated(as_double(input, "int()'s input"));
  } else if (const std::string* text = input.as_string()) {
    value = parse_integer(*text, base);
    if (!value) {
      if (const std::optional<double> real = parse_double(*text)) value = truncated(*real);
    }
  }
  return value ? Value::integer(*value) : otherwise;
}

Value filter_float(Interpreter&, const Value& input, const Args& args) {
  const Bound bound = bind("float", args, std::array<std::string_view, 1>{"default"});
  refuse_undefined(input);
  if (input.is_number()) return Value::real(as_double(input, "float()'s input"));
  if (const std::string* text = input.as_string()) {
    if (const std::optional<double> value = parse_double(*text)) return Value::real(*value);
  }
  return bound[0].value_or(Value::real(0));
}

Value filter_round(Interpreter&, const Value& input, const Args& args) {
  const Bound bound = bind("round", args, std::array<std::string_view, 2>{"precision", "method"});
  const int64_t precision = integer(bound[0], "round()'s precision", 0);
  const std::string method = bound[1] ? to_text(*bound[1]) : "common";
  if (method != "common" && method != "ceil" && method != "floor") {
    throw TemplateError("round()'s method must be common, ceil or floor");
  }
  if (precision < -300 || precision > 300) {
    throw TemplateError("round()'s precision must be from -300 to 300");
  }
  const double value = as_double(input, "round()'s input");
  const double power = std::pow(10.0, static_cast<double>(precision));
  if (method != "common") {
    const double scaled = value * power;
    return Value::real((method == "ceil" ? std::ceil(scaled) : std::floor(scaled)) / power);
  }
  if (!input.is_real() && precision >= 0)
    return Value::integer(as_integer(input, "round()'s input"));
  if (precision < 0) {  // half to even, as Python
    const double rounded = std::nearbyint(value / std::pow(10.0, static_cast<double>(-precision))) *
                           std::pow(10.0, static_cast<double>(-precision));
    return input.is_real() ? Value::real(rounded) : Value::integer(static_cast<int64_t>(rounded));
  }
  if (!std::isfinite(value)) return input;
  // printf rounds the exact binary value, which is what Python's round() does.
  return Value::real(std::strtod(fmt::format("{:.{}f}", value, precision).c_str(), nullptr));
}

constexpr Filter kFilters[] = {
    {"abs", filter_abs},
    {"float", filter_float},
    {"int", filter_int},
    {"round", filter_round},
};

}  // namespace

std::span<const Filter> number_filters() { return kFilters; }

}  // namespace kvarn::jinja
