#include "server/cli_settings.h"

#include <algorithm>
#include <charconv>
#include <numeric>
#include <utility>

#include <fmt/format.h>

#include "engine/config.h"

namespace kvarn {
namespace {

template <typename T>
bool parse_number(std::string_view text, T& out) {
  const char* end = text.data() + text.size();
  const auto [rest, error] = std::from_chars(text.data(), end, out);
  return error == std::errc() && rest == end;
}

bool parse_bool(std::string_view text, bool& out) {
  for (const std::string_view yes : {"true", "1", "on", "yes"}) {
    if (text == yes) return out = true, true;
  }
  for (const std::string_view no : {"false", "0", "off", "no"}) {
    if (text == no) return out = false, true;
  }
  return false;
}

size_t edit_distance(std::string_view a, std::string_view b) {
  std::vector<size_t> row(b.size() + 1);
  std::iota(row.begin(), row.end(), size_t{0});
  for (size_t i = 0; i < a.size(); ++i) {
    size_t diagonal = row[0];
    row[0] = i + 1;
    for (size_t j = 0; j < b.size(); ++j) {
      const size_t substituted = diagonal + (a[i] == b[j] ? 0 : 1);
      diagonal = row[j + 1];
      row[j + 1] = std::min({row[j] + 1, row[j + 1] + 1, substituted});
    }
  }
  return row.back();
}

}  // namespace

Setting* Settings::find(std::string_view name) {
  const auto it = std::find_if(settings_.begin(), settings_.end(),
                               [&](const Setting& setting) { return setting.name == name; });
  return it == settings_.end() ? nullptr : &*it;
}

const Setting* Settings::find(std::string_view name) const {
  return const_cast<Settings*>(this)->find(name);
}

std::string Settings::changed() const {
  std::string out;
  for (const Setting& setting : settings_) {
    if (setting.source.empty()) continue;
    out += fmt::format("{}{}={}", out.empty() ? "" : " ", setting.name, value_text(setting.value));
  }
  return out;
}

void Settings::add_setting(std::string_view name, SettingValue value, std::string_view help,
                           std::string_view group) {
  CHECK(find(name) == nullptr, "two settings have one name");
  settings_.push_back(
      {std::string(name), std::string(help), std::string(group), value, value_text(value), {}});
}

std::string value_text(const SettingValue& value) {
  return std::visit(
      [](const auto* v) -> std::string {
        using T = std::remove_cvref_t<decltype(*v)>;
        if constexpr (std::is_same_v<T, bool>) {
          return *v ? "on" : "off";
        } else {
          return fmt::format("{}", *v);
        }
      },
      value);
}

const char* type_name(const SettingValue& value) {
  switch (value.index()) {
    case 0:
      return "true or false";
    case 1:
    case 2:
      return "an integer";
    case 3:
      return "a number";
    default:
      return "a string";
  }
}

Status set_from_text(Setting& setting, std::string_view text, const std::string& source) {
  const bool is_bytes = setting.name.ends_with("-bytes");
  const bool parsed = std::visit(
      [&](auto* v) {
        using T = std::remove_cvref_t<decltype(*v)>;
        if constexpr (std::is_same_v<T, bool>) {
          return parse_bool(text, *v);
        } else if constexpr (std::is_same_v<T, std::string>) {
          v->assign(text);
          return true;
        } else {
          if (parse_number(text, *v)) return true;
          if constexpr (std::is_same_v<T, int64_t>) {
            if (is_bytes) {
              const Result<uint64_t> bytes = parse_bytes(std::string(text));
              if (bytes.is_ok() && std::in_range<int64_t>(*bytes)) {
                *v = static_cast<int64_t>(*bytes);
                return true;
              }
            }
          }
          return false;
        }
      },
      setting.value);
  if (!parsed) {
    return Status::invalid_argument(
        fmt::format("--{} must be {}{}, got '{}' (from {})", setting.name, type_name(setting.value),
                    is_bytes ? " or a size such as 16MiB" : "", text.substr(0, 64), source));
  }
  setting.source = source;
  return Status::ok();
}

std::string environment_name(std::string_view setting_name) {
  std::string name = "KVARN_";
  for (const char c : setting_name) {
    name += c == '-' ? '_' : (c >= 'a' && c <= 'z' ? static_cast<char>(c - 'a' + 'A') : c);
  }
  return name;
}

std::string nearest_match(std::string_view text, std::span<const std::string> candidates) {
  std::string best;
  size_t best_distance = std::max<size_t>(2, text.size() / 3) + 1;  // a third of it may be wrong
  for (const std::string& candidate : candidates) {
    size_t distance = edit_distance(text, candidate);
    // A part of a name ("max-model", "prefix-caching") is nearer than its edit distance says.
    if (text.size() >= 4 && candidate.find(text) != std::string::npos) {
      distance = std::min<size_t>(distance, 2);
    }
    if (distance < best_distance) {
      best = candidate;
      best_distance = distance;
    }
  }
  return best;
}

}  // namespace kvarn
