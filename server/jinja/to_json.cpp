// json.dumps() of a value.
#include <algorithm>
#include <cmath>

#include <fmt/format.h>

#include "engine/tokenizer/utf8.h"
#include "server/jinja/error.h"
#include "server/jinja/value.h"

namespace kvarn::jinja {
namespace {

class JsonWriter {
 public:
  explicit JsonWriter(const JsonStyle& style) : style_(style) {}

  void write(const Value& value, int depth) {
    if (value.is_none()) {
      out_ += "null";
    } else if (const bool* b = value.get_if<bool>()) {
      out_ += *b ? "true" : "false";
    } else if (const std::string* s = value.as_string()) {
      write_string(*s);
    } else if (const double* d = value.get_if<double>(); d && !std::isfinite(*d)) {
      out_ += std::isnan(*d) ? "NaN" : *d < 0 ? "-Infinity" : "Infinity";
    } else if (value.is_integer() || value.is_real()) {
      out_ += to_text(value);
    } else if (const List* list = value.as_list()) {
      write_group('[', ']', list->items.size(), depth,
                  [&](size_t i) { write(list->items[i], depth + 1); });
    } else if (const Dict* dict = value.as_dict()) {
      write_dict(*dict, depth);
    } else {
      throw TemplateError(
          fmt::format("Object of type {} is not JSON serializable", type_name(value)));
    }
  }
  std::string take() { return std::move(out_); }

 private:
  template <typename WriteItem>
  void write_group(char open, char close, size_t count, int depth, WriteItem write_item) {
    out_ += open;
    for (size_t i = 0; i < count; ++i) {
      if (i > 0) out_ += style_.item_separator;
      new_line(depth + 1);
      write_item(i);
    }
    if (count > 0) new_line(depth);
    out_ += close;
  }

  void write_dict(const Dict& dict, int depth) {
    std::vector<const std::pair<std::string, Value>*> members;
    for (const auto& member : dict.items) members.push_back(&member);
    if (style_.sort_keys) {
      std::stable_sort(members.begin(), members.end(),
                       [](const auto* a, const auto* b) { return a->first < b->first; });
    }
    write_group('{', '}', members.size(), depth, [&](size_t i) {
      write_string(members[i]->first);
      out_ += style_.key_separator;
      write(members[i]->second, depth + 1);
    });
  }

  void new_line(int depth) {
    if (!style_.pretty) return;
    out_ += '\n';
    for (int i = 0; i < depth; ++i) out_ += style_.indent;
  }

  void write_string(std::string_view text) {
    out_ += '"';
    while (!text.empty()) {
      const Utf8Step step = utf8_step(text);
      const char32_t c = step.code_point;
      if (c == '"' || c == '\\') {
        out_ += '\\';
        out_ += text.front();
      } else if (c >= 0x20 && (c < 0x7F || !style_.ensure_ascii)) {
        out_ += text.substr(0, step.length);
      } else {
        write_escape(c);
      }
      text.remove_prefix(step.length);
    }
    out_ += '"';
  }

  void write_escape(char32_t c) {
    constexpr std::string_view kShort = "\b\f\n\r\t", kLetters = "bfnrt";
    const size_t index = c < 0x20 ? kShort.find(static_cast<char>(c)) : kShort.npos;
    if (index != kShort.npos) {
      out_ += '\\';
      out_ += kLetters[index];
    } else if (c < 0x10000) {
      out_ += fmt::format("\\u{:04x}", static_cast<uint32_t>(c));
    } else {
      const auto rest = static_cast<uint32_t>(c) - 0x10000;
      out_ += fmt::format("\\u{:04x}\\u{:04x}", 0xD800 + (rest >> 10), 0xDC00 + (rest & 0x3FF));
    }
  }

  const JsonStyle& style_;
  std::string out_;
};

}  // namespace

std::string to_json(const Value& value, const JsonStyle& style) {
  JsonWriter writer(style);
  writer.write(value, 0);
  return writer.take();
}

}  // namespace kvarn::jinja
