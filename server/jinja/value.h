// A value of the template language, with Python's meaning of truth, equality, order and printing.
// Cheap to copy: strings and containers are shared and never change once made, except namespaces.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <string_view>
#include <utility>
#include <variant>
#include <vector>

namespace kvarn::jinja {

class Value;
struct Callable;   // interpreter.h
struct LoopState;  // interpreter.h

struct Undefined {
  std::string what;  // e.g. "'x' is undefined", for the error when it is used
};
struct None {};
// Containers nest at most this deep: printing, comparing and freeing them recurse.
inline constexpr int kMaxValueDepth = 200;
// No single string is longer; the steps a render may take bound their number.
inline constexpr size_t kMaxStringBytes = size_t{64} << 20;

struct List {
  std::vector<Value> items;
  bool is_tuple = false;  // prints as (1, 2)
  int depth = 1;
};
// In order of insertion; keys are strings, as in JSON.
struct Dict {
  std::vector<std::pair<std::string, Value>> items;
  int depth = 1;
  const Value* find(std::string_view key) const;
  void set(std::string key, Value value);
};
struct Namespace {
  Dict members;
};

class Value {
 public:
  using String = std::shared_ptr<const std::string>;
  using Variant = std::variant<std::shared_ptr<const Undefined>, None, bool, int64_t, uint64_t,
                               double, String, std::shared_ptr<const List>,
                               std::shared_ptr<const Dict>, std::shared_ptr<Namespace>,
                               std::shared_ptr<const Callable>, std::shared_ptr<LoopState>>;

  Value() : v_(None{}) {}
  static Value undefined(std::string what) {
    return Value(Variant(std::make_shared<const Undefined>(Undefined{std::move(what)})));
  }
  static Value boolean(bool b) { return Value(Variant(b)); }
  static Value integer(int64_t i) { return Value(Variant(i)); }
  // Above INT64_MAX, as JSON may bring it: printed and compared, but no arithmetic.
  static Value big(uint64_t u) {
    return u <= static_cast<uint64_t>(INT64_MAX) ? integer(static_cast<int64_t>(u))
                                                 : Value(Variant(u));
  }
  static Value real(double d) { return Value(Variant(d)); }
  static Value string(std::string s) {
    return Value(Variant(std::make_shared<const std::string>(std::move(s))));
  }
  // Throw TemplateError above kMaxValueDepth.
  static Value list(std::vector<Value> items, bool is_tuple = false);
  static Value dict(Dict dict);
  explicit Value(Variant v) : v_(std::move(v)) {}

  template <typename T>
  const T* get_if() const {
    return std::get_if<T>(&v_);
  }
  bool is_undefined() const { return get_if<std::shared_ptr<const Undefined>>() != nullptr; }
  bool is_none() const { return get_if<None>() != nullptr; }
  bool is_bool() const { return get_if<bool>() != nullptr; }
  bool is_integer() const { return get_if<int64_t>() || get_if<uint64_t>(); }  // not a bool
  bool is_real() const { return get_if<double>() != nullptr; }
  bool is_number() const { return is_bool() || is_integer() || is_real(); }
  const std::string* as_string() const;  // null if it is none of these
  const List* as_list() const;           // or tuple
  const Dict* as_dict() const;
  Namespace* as_namespace() const;
  const Callable* as_callable() const;
  LoopState* as_loop() const;
  const Variant& variant() const { return v_; }

 private:
  Variant v_;
};

const char* type_name(const Value& value);  // Python's: "str", "list", "NoneType"
bool truthy(const Value& value);
bool equals(const Value& a, const Value& b);
// -1, 0, 1; throws TemplateError where Python cannot order the two.
int compare(const Value& a, const Value& b);
std::string to_text(const Value& value);  // str(): what {{ }} prints
std::string to_repr(const Value& value);  // repr(): what stands inside a printed list
std::string float_text(double value);     // repr() of a float
// The number as a double or an int64; throws naming `what` if it is none.
double as_double(const Value& value, const char* what);
int64_t as_integer(const Value& value, const char* what);
// What `for` walks: items, characters or keys; throws if the value cannot be iterated.
std::vector<Value> iterate(const Value& value);
// Throws if the value is a list or dict, which Python does not take as a key or member of a set.
void require_hashable(const Value& value);
bool contains(const Value& container, const Value& item);  // item in container
int64_t length_of(const Value& value);

struct JsonStyle {
  std::string indent;  // one level; used if `pretty`
  bool pretty = false;
  std::string item_separator = ", ", key_separator = ": ";
  bool sort_keys = false;
  bool ensure_ascii = false;
};
// json.dumps(): order of members kept, no HTML escapes. Throws for what JSON has not.
std::string to_json(const Value& value, const JsonStyle& style);

}  // namespace kvarn::jinja
