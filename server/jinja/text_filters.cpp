// Filters that make text.
#include <algorithm>
#include <array>

#include <fmt/format.h>

#include "server/jinja/error.h"
#include "server/jinja/filter_support.h"
#include "server/jinja/text.h"

namespace kvarn::jinja {
namespace {

Value filter_upper(Interpreter&, const Value& input, const Args& args) {
  bind_none("upper", args);
  return Value::string(to_upper(to_text(input)));
}
Value filter_lower(Interpreter&, const Value& input, const Args& args) {
  bind_none("lower", args);
  return Value::string(to_lower(to_text(input)));
}
Value filter_capitalize(Interpreter&, const Value& input, const Args& args) {
  bind_none("capitalize", args);
  return Value::string(to_capitalized(to_text(input)));
}

// Unlike str.title(): only behind white space, a dash or a bracket does a word begin.
Value filter_title(Interpreter&, const Value& input, const Args& args) {
  bind_none("title", args);
  std::string out, word;
  const auto finish_word = [&] {
    out += to_capitalized(word);
    word.clear();
  };
  for (const char32_t c : decode(to_text(input))) {
    const std::string one = encode(std::u32string_view(&c, 1));
    if (is_space(c) || std::u32string_view(U"-({[<").find(c) != std::u32string_view::npos) {
      finish_word();
      out += one;
    } else {
      word += one;
    }
  }
  finish_word();
  return Value::string(std::move(out));
}

Value filter_trim(Interpreter&, const Value& input, const Args& args) {
  const Bound bound = bind("trim", args, std::array<std::string_view, 1>{"chars"});
  const std::string text = to_text(input);
  const bool by_space = !bound[0] || bound[0]->is_none();
  return Value::string(std::string(by_space ? strip(text, Side::kBoth)
                                            : strip(text, to_text(*bound[0]), Side::kBoth)));
}

Value filter_replace(Interpreter& interpreter, const Value& input, const Args& args) {
  const Bound bound = bind("replace", args, std::array<std::string_view, 3>{"old", "new", "count"});
  if (!bound[0] || !bound[1]) throw TemplateError("replace() needs 'old' and 'new'");
  Args positional{{*bound[0], *bound[1]}, {}};
  for (Value& text : positional.positional) text = Value::string(to_text(text));
  if (bound[2] && !bound[2]->is_none()) positional.positional.push_back(*bound[2]);
  return call_method(interpreter, Value::string(to_text(input)), "replace", positional);
}

Value filter_indent(Interpreter& interpreter, const Value& input, const Args& args) {
  const Bound bound =
      bind("indent", args, std::array<std::string_view, 3>{"width", "first", "blank"});
  std::string indent(4, ' ');
  if (bound[0] && bound[0]->as_string()) {
    indent = *bound[0]->as_string();
  } else if (bound[0]) {
    const int64_t width = std::max<int64_t>(0, as_integer(*bound[0], "indent's width"));
    interpreter.reserve_string(static_cast<size_t>(width));
    indent.assign(static_cast<size_t>(width), ' ');
  }
  const bool first = flag(bound[1], false), blank = flag(bound[2], false);
  // As Jinja: one newline is added, so that a text that ends with one keeps an empty last line.
  const std::vector<std::string> lines = split_lines(to_text(input) + "\n", false);
  std::string out;
  for (size_t i = 0; i < lines.size(); ++i) {
    if (i > 0) out += '\n';
    const bool indented = i == 0 ? first : blank || !lines[i].empty();
    interpreter.reserve_string(out.size() + indent.size() + lines[i].size());
    if (indented) out += indent;
    out += lines[i];
  }
  return Value::string(std::move(out));
}

Value filter_escape(Interpreter&, const Value& input, const Args& args) {
  bind_none("escape", args);
  std::string out;
  for (const char c : to_text(input)) {
    switch (c) {
      case '&':
        out += "&amp;";
        break;
      case '<':
        out += "&lt;";
        break;
      case '>':
        out += "&gt;";
        break;
      case '\'':
        out += "&#39;";
        break;
      case '"':
        out += "&#34;";
        break;
      default:
        out += c;
    }
  }
  return Value::string(std::move(out));
}

Value filter_string(Interpreter&, const Value& input, const Args& args) {
  bind_none("string", args);
  return Value::string(to_text(input));
}
Value filter_safe(Interpreter&, const Value& input, const Args& args) {
  bind_none("safe", args);  // nothing is escaped anyway
  return Value::string(to_text(input));
}

Value filter_format(Interpreter& interpreter, const Value& input, const Args& args) {
  if (!args.positional.empty() && !args.keyword.empty()) {
    throw TemplateError("format() takes arguments with names or without, not both");
  }
  Dict named;
  for (const auto& [name, value] : args.keyword) named.set(name, value);
  std::string text = format_percent(to_text(input), args.positional,
                                    args.keyword.empty() ? nullptr : &named, !args.keyword.empty());
  interpreter.reserve_string(text.size());
  return Value::string(std::move(text));
}

Value filter_join(Interpreter& interpreter, const Value& input, const Args& args) {
  const Bound bound = bind("join", args, std::array<std::string_view, 2>{"d", "attribute"});
  const std::string between = bound[0] ? to_text(*bound[0]) : "";
  std::string out;
  bool is_first = true;
  for (const Value& item : iterate(input)) {
    const std::string text = to_text(
        bound[1] && !bound[1]->is_none() ? attribute_of(interpreter, item, *bound[1]) : item);
    interpreter.reserve_string(between.size() + text.size());
    if (out.size() + between.size() + text.size() > kMaxStringBytes) {
      interpreter.reserve_string(kMaxStringBytes + 1);
    }
    if (!is_first) out += between;
    is_first = false;
    out += text;
  }
  return Value::string(std::move(out));
}

Value filter_tojson(Interpreter& interpreter, const Value& input, const Args& args) {
  const Bound bound =
      bind("tojson", args,
           std::array<std::string_view, 4>{"ensure_ascii", "indent", "separators", "sort_keys"});
  JsonStyle style;
  style.ensure_ascii = flag(bound[0], false);
  style.sort_keys = flag(bound[3], false);
  if (bound[1] && !bound[1]->is_none()) {
    style.pretty = true;
    style.item_separator.pop_back();  // ", " to ","
    constexpr int64_t kMaxIndent = 64;
    if (const std::string* text = bound[1]->as_string()) {
      style.indent = *text;
    } else {
      style.indent.assign(static_cast<size_t>(std::clamp<int64_t>(as_integer(*bound[1], "indent"),
                                                                  0, kMaxIndent + 1)),
                          ' ');
    }
    if (style.indent.size() > kMaxIndent) {
      throw TemplateError(fmt::format("tojson's indent must be at most {}", kMaxIndent));
    }
  }
  if (bound[2] && !bound[2]->is_none()) {
    const std::vector<Value> separators = iterate(*bound[2]);
    if (separators.size() != 2 || !separators[0].as_string() || !separators[1].as_string()) {
      throw TemplateError("tojson's separators must be two strings");
    }
    style.item_separator = *separators[0].as_string();
    style.key_separator = *separators[1].as_string();
  }
  std::string text = to_json(input, style);
  interpreter.reserve_string(text.size());
  return Value::string(std::move(text));
}

constexpr Filter kFilters[] = {
    {"capitalize", filter_capitalize},
    {"e", filter_escape},
    {"escape", filter_escape},
    {"format", filter_format},
    {"indent", filter_indent},
    {"join", filter_join},
    {"lower", filter_lower},
    {"replace", filter_replace},
    {"safe", filter_safe},
    {"string", filter_string},
    {"title", filter_title},
    {"tojson", filter_tojson},
    {"trim", filter_trim},
    {"upper", filter_upper},
};

}  // namespace

std::span<const Filter> text_filters() { return kFilters; }

}  // namespace kvarn::jinja
