// "%s" % values and "{}".format(values): the parts of Python's formatting that templates use.
#include <algorithm>
#include <array>
#include <cstdlib>

#include <fmt/format.h>

#include "server/jinja/error.h"
#include "server/jinja/interpreter.h"
#include "server/jinja/text.h"

namespace kvarn::jinja {
namespace {

constexpr int kMaxWidth = 1000;
constexpr int kMaxPrecision = 100;

struct Spec {
  bool left = false, zero = false, plus = false, space = false;
  int width = 0, precision = -1;
};

std::string with_sign(std::string digits, bool negative, const Spec& spec) {
  const std::string sign = negative ? "-" : spec.plus ? "+" : spec.space ? " " : "";
  const auto size = static_cast<int>(sign.size() + digits.size());
  if (spec.zero && !spec.left && size < spec.width) {
    digits.insert(0, static_cast<size_t>(spec.width - size), '0');
  }
  return sign + digits;
}

std::string converted(char type, const Value& value, const Spec& spec) {
  switch (type) {
    case 's':
    case 'r': {
      std::u32string chars = decode(type == 's' ? to_text(value) : to_repr(value));
      if (spec.precision >= 0 && chars.size() > static_cast<size_t>(spec.precision)) {
        chars.resize(static_cast<size_t>(spec.precision));
      }
      return encode(chars);
    }
    case 'd':
    case 'i':
    case 'u':
    case 'x':
    case 'X': {
      const bool hex = type == 'x' || type == 'X';
      const int64_t number =
          value.is_real() && !hex
              ? static_cast<int64_t>(std::clamp(as_double(value, "%d"), -9e18, 9e18))
              : as_integer(value, hex ? "%x's value" : "%d's value");
      const uint64_t size =
          number < 0 ? uint64_t{0} - static_cast<uint64_t>(number) : static_cast<uint64_t>(number);
      return with_sign(type == 'x'   ? fmt::format("{:x}", size)
                       : type == 'X' ? fmt::format("{:X}", size)
                                     : fmt::format("{}", size),
                       number < 0, spec);
    }
    case 'f':
    case 'F':
    case 'e':
    case 'g': {
      const double number = as_double(value, "%f's value");
      const int precision = spec.precision < 0 ? 6 : spec.precision;
      const double size = number < 0 ? -number : number;
      return with_sign(type == 'e'   ? fmt::format("{:.{}e}", size, precision)
                       : type == 'g' ? fmt::format("{:.{}g}", size, precision)
                                     : fmt::format("{:.{}f}", size, precision),
                       number < 0, spec);
    }
    default:
      throw TemplateError(fmt::format("format '%{}' is not supported", type));
  }
}

int read_number(const std::string& text, size_t& i, int limit) {
  int number = 0;
  while (i < text.size() && text[i] >= '0' && text[i] <= '9') {
    number = number * 10 + (text[i++] - '0');
    if (number > limit) throw TemplateError(fmt::format("a width or precision above {}", limit));
  }
  return number;
}

}  // namespace

std::string format_percent(const std::string& format, const std::vector<Value>& values,
                           const Dict* named, bool takes_fewer) {
  std::string out;
  size_t next = 0;
  for (size_t i = 0; i < format.size();) {
    if (format[i] != '%') {
      out += format[i++];
      continue;
    }
    if (++i == format.size()) throw TemplateError("incomplete format: '%' at the end");
    if (format[i] == '%') {
      out += '%';
      ++i;
      continue;
    }
    const Value* value = nullptr;
    if (format[i] == '(') {
      const size_t close = format.find(')', i);
      if (close == format.npos) throw TemplateError("incomplete format: '%(' is not closed");
      const std::string key = format.substr(i + 1, close - i - 1);
      value = named ? named->find(key) : nullptr;
      if (!value) throw TemplateError(fmt::format("format has no value for '{}'", key));
      i = close + 1;
    }
    Spec spec;
    for (; i < format.size(); ++i) {
      if (format[i] == '-')
        spec.left = true;
      else if (format[i] == '0')
        spec.zero = true;
      else if (format[i] == '+')
        spec.plus = true;
      else if (format[i] == ' ')
        spec.space = true;
      else
        break;
    }
    spec.width = read_number(format, i, kMaxWidth);
    if (i < format.size() && format[i] == '.') {
      ++i;
      spec.precision = read_number(format, i, kMaxPrecision);
    }
    if (i == format.size()) throw TemplateError("incomplete format at the end");
    if (!value) {
      if (next == values.size()) throw TemplateError("not enough values for the format");
      value = &values[next++];
    }
    const std::string text = converted(format[i++], *value, spec);
    const int64_t missing = spec.width - count_chars(text);
    const std::string padding(static_cast<size_t>(std::max<int64_t>(0, missing)), ' ');
    out += spec.left ? text + padding : padding + text;
    if (out.size() > kMaxStringBytes) throw TemplateError("the formatted text is too long");
  }
  if (!takes_fewer && next != values.size())
    throw TemplateError("more values than the format takes");
  return out;
}

std::string format_braces(Interpreter& interpreter, const std::string& format, const Args& args) {
  std::string out;
  size_t next = 0;
  for (size_t i = 0; i < format.size();) {
    const char c = format[i++];
    if (c != '{' && c != '}') {
      out += c;
      continue;
    }
    if (i < format.size() && format[i] == c) {
      out += c;
      ++i;
      continue;
    }
    const size_t close = format.find('}', i);
    if (c == '}' || close == format.npos) {
      throw TemplateError("format(): a single brace must be doubled");
    }
    const std::string field = format.substr(i, close - i);
    i = close + 1;
    if (field.find_first_of(":!.[{") != field.npos) {
      throw TemplateError(fmt::format(
          "format(): '{{{}}}' is not supported; supported: {{}}, {{0}}, {{name}}", field));
    }
    const Value* value = nullptr;
    if (field.empty() || field.find_first_not_of("0123456789") == field.npos) {
      const size_t index = field.empty()       ? next++
                           : field.size() <= 4 ? static_cast<size_t>(std::stoul(field))
                                               : args.positional.size();
      if (index < args.positional.size()) value = &args.positional[index];
    } else {
      for (const auto& [name, argument] : args.keyword) {
        if (name == field) value = &argument;
      }
    }
    if (!value) throw TemplateError(fmt::format("format() has no value for '{{{}}}'", field));
    const std::string text = to_text(*value);
    interpreter.charge(text.size());
    out += text;
    if (out.size() > kMaxStringBytes) throw TemplateError("the formatted text is too long");
  }
  return out;
}

}  // namespace kvarn::jinja
