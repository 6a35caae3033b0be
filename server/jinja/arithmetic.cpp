// The operators + - * / // % ** with Python's meaning.
#include <cmath>
#include <limits>

#include <fmt/format.h>

#include "server/jinja/error.h"
#include "server/jinja/interpreter.h"

namespace kvarn::jinja {
namespace {

const char* symbol(BinaryOp op) {
  switch (op) {
    case BinaryOp::kAdd:
      return "+";
    case BinaryOp::kSub:
      return "-";
    case BinaryOp::kMul:
      return "*";
    case BinaryOp::kDiv:
      return "/";
    case BinaryOp::kFloorDiv:
      return "//";
    case BinaryOp::kMod:
      return "%";
    case BinaryOp::kPow:
      return "**";
  }
  return "?";
}

[[noreturn]] void overflow(BinaryOp op) {
  throw TemplateError(fmt::format("the result of '{}' does not fit into 64 bits", symbol(op)));
}

int64_t floor_div(int64_t a, int64_t b) {
  const int64_t q = a / b;
  return (a % b != 0 && (a < 0) != (b < 0)) ? q - 1 : q;
}

Value integer_power(int64_t base, int64_t exponent) {
  if (exponent < 0) {
    if (base == 0) throw TemplateError("0 cannot be raised to a negative power");
    return Value::real(std::pow(static_cast<double>(base), static_cast<double>(exponent)));
  }
  int64_t result = 1;
  // Only -1, 0 and 1 allow many rounds; the exponent's bits bound them by squaring.
  while (exponent > 0) {
    if ((exponent & 1) && __builtin_mul_overflow(result, base, &result)) overflow(BinaryOp::kPow);
    exponent >>= 1;
    if (exponent > 0 && __builtin_mul_overflow(base, base, &base)) overflow(BinaryOp::kPow);
  }
  return Value::integer(result);
}

Value integers(BinaryOp op, int64_t a, int64_t b) {
  int64_t result = 0;
  switch (op) {
    case BinaryOp::kAdd:
      if (__builtin_add_overflow(a, b, &result)) overflow(op);
      return Value::integer(result);
    case BinaryOp::kSub:
      if (__builtin_sub_overflow(a, b, &result)) overflow(op);
      return Value::integer(result);
    case BinaryOp::kMul:
      if (__builtin_mul_overflow(a, b, &result)) overflow(op);
      return Value::integer(result);
    case BinaryOp::kPow:
      return integer_power(a, b);
    default:
      break;
  }
  if (b == 0) throw TemplateError("division by zero");
  if (op == BinaryOp::kDiv) return Value::real(static_cast<double>(a) / static_cast<double>(b));
  if (a == std::numeric_limits<int64_t>::min() && b == -1) {
    if (op == BinaryOp::kMod) return Value::integer(0);
    overflow(op);
  }
  const int64_t q = floor_div(a, b);
  return Value::integer(op == BinaryOp::kFloorDiv ? q : a - q * b);
}

Value reals(BinaryOp op, double a, double b) {
  switch (op) {
    case BinaryOp::kAdd:
      return Value::real(a + b);
    case BinaryOp::kSub:
      return Value::real(a - b);
    case BinaryOp::kMul:
      return Value::real(a * b);
    case BinaryOp::kPow:
      if (a == 0 && b < 0) throw TemplateError("0 cannot be raised to a negative power");
      if (a < 0 && b != std::floor(b)) {
        throw TemplateError("a negative number cannot be raised to a fraction");
      }
      return Value::real(std::pow(a, b));
    default:
      break;
  }
  if (b == 0) throw TemplateError("division by zero");
  if (op == BinaryOp::kDiv) return Value::real(a / b);
  double mod = std::fmod(a, b);
  if (mod != 0 && (mod < 0) != (b < 0)) mod += b;
  if (mod == 0) mod = std::copysign(0.0, b);
  if (op == BinaryOp::kMod) return Value::real(mod);
  const double quotient = (a - mod) / b;
  double floored = std::floor(quotient);
  if (quotient - floored > 0.5) floored += 1;
  return Value::real(floored);
}

Value repeat(Interpreter& interpreter, const Value& sequence, const Value& times) {
  const int64_t count = std::max<int64_t>(0, as_integer(times, "a repeat count"));
  if (const std::string* text = sequence.as_string()) {
    if (!text->empty() && static_cast<uint64_t>(count) > kMaxStringBytes / text->size()) {
      interpreter.reserve_string(kMaxStringBytes + 1);
    }
    interpreter.reserve_string(text->size() * static_cast<size_t>(count));
    std::string out;
    for (int64_t i = 0; i < count; ++i) out += *text;
    return Value::string(std::move(out));
  }
  const List& list = *sequence.as_list();
  std::vector<Value> items;
  for (int64_t i = 0; i < count && !list.items.empty(); ++i) {
    interpreter.charge(list.items.size() * sizeof(Value));
    items.insert(items.end(), list.items.begin(), list.items.end());
  }
  return Value::list(std::move(items), list.is_tuple);
}

std::optional<Value> add_sequences(Interpreter& interpreter, const Value& a, const Value& b) {
  const std::string *s = a.as_string(), *t = b.as_string();
  if (s && t) {
    interpreter.reserve_string(s->size() + t->size());
    return Value::string(*s + *t);
  }
  const List *l = a.as_list(), *m = b.as_list();
  if (!l || !m || l->is_tuple != m->is_tuple) return std::nullopt;
  interpreter.charge((l->items.size() + m->items.size()) * sizeof(Value));
  std::vector<Value> items = l->items;
  items.insert(items.end(), m->items.begin(), m->items.end());
  return Value::list(std::move(items), l->is_tuple);
}

}  // namespace

Value arithmetic(Interpreter& interpreter, BinaryOp op, const Value& a, const Value& b) {
  for (const Value* value : {&a, &b}) {
    if (const auto* undefined = value->get_if<std::shared_ptr<const Undefined>>()) {
      throw TemplateError((*undefined)->what);
    }
  }
  if (op == BinaryOp::kAdd) {
    if (std::optional<Value> sum = add_sequences(interpreter, a, b)) return *std::move(sum);
  }
  if (op == BinaryOp::kMul) {
    const auto is_sequence = [](const Value& v) { return v.as_string() || v.as_list(); };
    const auto is_count = [](const Value& v) { return v.is_integer() || v.is_bool(); };
    if (is_sequence(a) && is_count(b)) return repeat(interpreter, a, b);
    if (is_count(a) && is_sequence(b)) return repeat(interpreter, b, a);
  }
  if (op == BinaryOp::kMod && a.as_string()) {
    const List* list = b.as_list();
    const bool is_tuple = list && list->is_tuple;
    // Python counts the values of a tuple, and of what cannot be a mapping.
    const bool takes_fewer = b.as_dict() || (list && !is_tuple);
    Value text = Value::string(format_percent(
        *a.as_string(), is_tuple ? list->items : std::vector<Value>{b}, b.as_dict(), takes_fewer));
    interpreter.reserve_string(text.as_string()->size());
    return text;
  }
  if (!a.is_number() || !b.is_number()) {
    throw TemplateError(fmt::format("unsupported operands for '{}': '{}' and '{}'", symbol(op),
                                    type_name(a), type_name(b)));
  }
  if (a.is_real() || b.is_real()) {
    return reals(op, as_double(a, "operand"), as_double(b, "operand"));
  }
  if (a.get_if<uint64_t>() || b.get_if<uint64_t>()) overflow(op);
  return integers(op, as_integer(a, "operand"), as_integer(b, "operand"));
}

}  // namespace kvarn::jinja
