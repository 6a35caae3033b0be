// The tests: value is name(argument).
#include <algorithm>
#include <cmath>

#include <fmt/format.h>

#include "server/jinja/error.h"
#include "server/jinja/interpreter.h"
#include "server/jinja/text.h"

namespace kvarn::jinja {
namespace {

// The same object: containers by identity, other values by type and value.
bool is_same(const Value& a, const Value& b) {
  if (a.variant().index() != b.variant().index()) return false;
  if (const List* list = a.as_list()) return list == b.as_list();
  if (const Dict* dict = a.as_dict()) return dict == b.as_dict();
  return equals(a, b);
}

bool divides(const Value& value, const Value& divisor) {
  const int64_t by = as_integer(divisor, "the divisor");
  if (by == 0) throw TemplateError("division by zero");
  if (by == -1) return true;
  return as_integer(value, "the value") % by == 0;
}

// value % 2 as Python has it, so that -1 is odd and 2.5 neither odd nor even.
double remainder_by_2(const Value& value) {
  if (!value.is_real()) return static_cast<double>(as_integer(value, "the value") & 1);
  const double remainder = std::fmod(as_double(value, "the value"), 2.0);
  return remainder < 0 ? remainder + 2 : remainder;
}

bool has_case(const Value& value, bool (*wanted)(char32_t), bool (*other)(char32_t)) {
  bool any = false;
  for (const char32_t c : decode(to_text(value))) {
    if (other(c)) return false;
    any |= wanted(c);
  }
  return any;
}

struct Test {
  std::string_view name;
  bool (*holds)(const Value& value, const Value& argument);
  bool takes_argument;
};

bool ordered(const Value& a, const Value& b, int wanted, bool or_equal) {
  const int order = compare(a, b);
  return order != 2 && (order == wanted || (or_equal && order == 0));
}
bool test_defined(const Value& v, const Value&) { return !v.is_undefined(); }
bool test_eq(const Value& a, const Value& b) { return equals(a, b); }
bool test_ne(const Value& a, const Value& b) { return !equals(a, b); }
bool test_lt(const Value& a, const Value& b) { return ordered(a, b, -1, false); }
bool test_le(const Value& a, const Value& b) { return ordered(a, b, -1, true); }
bool test_gt(const Value& a, const Value& b) { return ordered(a, b, 1, false); }
bool test_ge(const Value& a, const Value& b) { return ordered(a, b, 1, true); }
bool test_iterable(const Value& v, const Value&) {
  return v.is_undefined() || v.as_string() || v.as_list() || v.as_dict();
}

constexpr Test kTests[] = {
    {"!=", test_ne, true},
    {"<", test_lt, true},
    {"<=", test_le, true},
    {"==", test_eq, true},
    {">", test_gt, true},
    {">=", test_ge, true},
    {"boolean", [](const Value& v, const Value&) { return v.is_bool(); }, false},
    {"callable", [](const Value& v, const Value&) { return v.as_callable() != nullptr; }, false},
    {"defined", test_defined, false},
    {"divisibleby", divides, true},
    {"eq", test_eq, true},
    {"equalto", test_eq, true},
    {"even", [](const Value& v, const Value&) { return remainder_by_2(v) == 0; }, false},
    {"false", [](const Value& v, const Value&) { return v.is_bool() && !truthy(v); }, false},
    {"filter",
     [](const Value& v, const Value&) { return v.as_string() && is_filter(*v.as_string()); },
     false},
    {"float", [](const Value& v, const Value&) { return v.is_real(); }, false},
    {"ge", test_ge, true},
    {"greaterthan", test_gt, true},
    {"gt", test_gt, true},
    {"in", [](const Value& v, const Value& container) { return contains(container, v); }, true},
    {"integer", [](const Value& v, const Value&) { return v.is_integer(); }, false},
    {"iterable", test_iterable, false},
    {"le", test_le, true},
    {"lessthan", test_lt, true},
    {"lower", [](const Value& v, const Value&) { return has_case(v, is_lower, is_upper); }, false},
    {"lt", test_lt, true},
    {"mapping", [](const Value& v, const Value&) { return v.as_dict() != nullptr; }, false},
    {"ne", test_ne, true},
    {"none", [](const Value& v, const Value&) { return v.is_none(); }, false},
    {"number", [](const Value& v, const Value&) { return v.is_number(); }, false},
    {"odd", [](const Value& v, const Value&) { return remainder_by_2(v) == 1; }, false},
    {"sameas", is_same, true},
    {"sequence", test_iterable, false},
    {"string", [](const Value& v, const Value&) { return v.as_string() != nullptr; }, false},
    {"test", [](const Value& v, const Value&) { return v.as_string() && is_test(*v.as_string()); },
     false},
    {"true", [](const Value& v, const Value&) { return v.is_bool() && truthy(v); }, false},
    {"undefined", [](const Value& v, const Value&) { return v.is_undefined(); }, false},
    {"upper", [](const Value& v, const Value&) { return has_case(v, is_upper, is_lower); }, false},
};

const Test* find_test(std::string_view name) {
  const auto* it = std::find_if(std::begin(kTests), std::end(kTests),
                                [name](const Test& test) { return test.name == name; });
  return it == std::end(kTests) ? nullptr : it;
}

}  // namespace

bool is_test(std::string_view name) { return find_test(name) != nullptr; }

bool apply_test(Interpreter& interpreter, std::string_view name, const Value& input,
                const Args& args) {
  const Test* test = find_test(name);
  if (!test) throw TemplateError(fmt::format("test '{}' is not supported", name));
  const size_t wanted = test->takes_argument ? 1 : 0;
  if (args.positional.size() != wanted || !args.keyword.empty()) {
    throw TemplateError(
        fmt::format("test '{}' takes {} argument", name, wanted == 1 ? "one" : "no"));
  }
  if (wanted == 1 && args.positional[0].as_list()) {
    interpreter.charge(args.positional[0].as_list()->items.size() * sizeof(Value));
  }
  return test->holds(input, wanted == 1 ? args.positional[0] : Value());
}

}  // namespace kvarn::jinja
