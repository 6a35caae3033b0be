// Only this file includes CLI11.
#include "server/config_loader.h"

#include <unistd.h>

#include <algorithm>
#include <cctype>
#include <deque>
#include <fstream>
#include <sstream>

#include <fmt/format.h>
#include <CLI/CLI.hpp>
#include <nlohmann/json.hpp>

#include "engine/config.h"
#include "server/server_config.h"

namespace kvarn {
namespace {

const UnsupportedFlag* find_unsupported(std::string_view name) {
  if (name.starts_with("no-")) name.remove_prefix(3);
  const auto* it = std::find_if(kUnsupportedFlags.begin(), kUnsupportedFlags.end(),
                                [&](const UnsupportedFlag& flag) { return flag.name == name; });
  return it == kUnsupportedFlags.end() ? nullptr : it;
}

// Settings that some command has: one file and one environment serve all commands.
bool is_setting_of_any_command(std::string_view name) {
  EngineConfig engine;
  ServerConfig server;
  Settings all;
  all.add(engine, "");
  all.add(server, "");
  return name == "config" || all.find(name) != nullptr;
}

std::string did_you_mean(const Settings& settings, std::string_view name) {
  const bool negated = name.starts_with("no-");
  std::vector<std::string> names = {"config", "help"};
  if (negated) names.clear();
  for (const Setting& setting : settings.all()) {
    if (!negated || std::holds_alternative<bool*>(setting.value)) names.push_back(setting.name);
  }
  const std::string nearest = nearest_match(negated ? name.substr(3) : name, names);
  return negated && !nearest.empty() ? fmt::format("no-{}", nearest) : nearest;
}

Status unknown_argument(const CommandSpec& command, const Settings& settings,
                        std::string_view argument) {
  if (!argument.starts_with("-")) {
    return Status::invalid_argument(fmt::format(
        "unexpected argument '{}': settings are flags, such as --model {}; see kvarn {} --help",
        argument, argument, command.name));
  }
  std::string_view name = argument.substr(0, argument.find('='));
  name.remove_prefix(std::min(name.find_first_not_of('-'), name.size()));
  if (const UnsupportedFlag* flag = find_unsupported(name)) return unsupported_flag_error(*flag);
  std::string underscored(name);
  std::replace(underscored.begin(), underscored.end(), '_', '-');
  const std::string nearest = did_you_mean(settings, underscored);
  if (nearest.empty() && is_setting_of_any_command(name)) {
    return Status::invalid_argument(fmt::format(
        "--{} is not a flag of kvarn {}; see kvarn {} --help", name, command.name, command.name));
  }
  return Status::invalid_argument(fmt::format(
      "unknown flag --{}{} (kvarn {} --help lists all)", name,
      nearest.empty() ? "" : fmt::format("; did you mean --{}?", nearest), command.name));
}

// What the command line gave, as text by setting name.
struct ParsedFlags {
  std::map<std::string, std::string> values;
};

Result<ParsedFlags> parse_flags(const CommandSpec& command, const Settings& settings,
                                std::span<const std::string> arguments) {
  CLI::App app;
  app.set_help_flag();
  app.allow_extras();
  std::deque<std::string> texts;
  std::deque<bool> switches;
  struct Bound {
    std::string name;
    CLI::Option* option;
    std::string* text;
    bool* on;
  };
  std::vector<Bound> bound;
  const auto add_text = [&](const std::string& name) {
    std::string& text = texts.emplace_back();
    bound.push_back(
        {name, app.add_option("--" + name, text)->expected(1)->take_last(), &text, nullptr});
  };
  add_text("config");
  for (const Setting& setting : settings.all()) {
    if (std::holds_alternative<bool*>(setting.value)) {
      bool& on = switches.emplace_back(false);
      bound.push_back({setting.name, app.add_flag(fmt::format("--{0},!--no-{0}", setting.name), on),
                       nullptr, &on});
    } else {
      add_text(setting.name);
    }
  }
  try {
    std::vector<std::string> reversed(arguments.rbegin(), arguments.rend());  // as CLI11 wants it
    app.parse(std::move(reversed));
  } catch (const CLI::ParseError& error) {
    return Status::invalid_argument(
        fmt::format("{}; see kvarn {} --help", error.what(), command.name));
  }
  for (const Bound& item : bound) {
    if (item.text == nullptr || !item.text->starts_with("--")) continue;
    return Status::invalid_argument(fmt::format("--{} needs a value, got the flag {}", item.name,
                                                std::string_view(*item.text).substr(0, 64)));
  }
  const std::vector<std::string> extras = app.remaining();
  if (!extras.empty()) return unknown_argument(command, settings, extras.front());

  ParsedFlags flags;
  for (const Bound& item : bound) {
    if (item.option->count() == 0) continue;
    flags.values[item.name] = item.on == nullptr ? *item.text : (*item.on ? "true" : "false");
  }
  return flags;
}

Status apply_file(Settings& settings, const std::string& path, const std::string& named_by) {
  std::ifstream file(path, std::ios::binary);
  std::ostringstream text;
  if (!file || !(text << file.rdbuf())) {
    return Status::invalid_argument(
        fmt::format("cannot read the settings file '{}' named by {}", path, named_by));
  }
  return apply_json(settings, text.str(), path);
}

Status apply_environment(Settings& settings, const Environment& environment) {
  for (Setting& setting : settings.all()) {
    const std::string name = environment_name(setting.name);
    const auto it = environment.find(name);
    if (it == environment.end()) continue;
    KVARN_RETURN_IF_ERROR(set_from_text(setting, it->second, "the variable " + name));
  }
  for (const UnsupportedFlag& flag : kUnsupportedFlags) {
    if (environment.contains(environment_name(flag.name))) return unsupported_flag_error(flag);
  }
  return Status::ok();
}

}  // namespace

Environment process_environment() {
  Environment environment;
  for (char** entry = environ; entry != nullptr && *entry != nullptr; ++entry) {
    const std::string_view text = *entry;
    const size_t equals = text.find('=');
    if (!text.starts_with("KVARN_") || equals == std::string_view::npos) continue;
    environment.emplace(text.substr(0, equals), text.substr(equals + 1));
  }
  return environment;
}

Result<LoadOutcome> load_settings(const CommandSpec& command, Settings& settings,
                                  const Invocation& invocation) {
  for (const std::string& argument : invocation.arguments) {
    if (argument == "--help" || argument == "-h") return LoadOutcome::kHelp;
  }
  KVARN_ASSIGN_OR_RETURN(const ParsedFlags flags,
                         parse_flags(command, settings, invocation.arguments));

  if (const auto it = flags.values.find("config"); it != flags.values.end()) {
    KVARN_RETURN_IF_ERROR(apply_file(settings, it->second, "--config"));
  } else if (const auto env = invocation.environment.find("KVARN_CONFIG");
             env != invocation.environment.end()) {
    KVARN_RETURN_IF_ERROR(apply_file(settings, env->second, "the variable KVARN_CONFIG"));
  }
  KVARN_RETURN_IF_ERROR(apply_environment(settings, invocation.environment));
  for (const auto& [name, text] : flags.values) {
    if (Setting* setting = settings.find(name)) {
      KVARN_RETURN_IF_ERROR(set_from_text(*setting, text, "the flag --" + name));
    }
  }
  return LoadOutcome::kRun;
}

Status apply_json(Settings& settings, const std::string& json, const std::string& origin) {
  using Json = nlohmann::json;
  Json document;
  try {
    document = Json::parse(json, nullptr, /*allow_exceptions=*/true, /*ignore_comments=*/true);
  } catch (const Json::parse_error& error) {
    return Status::invalid_argument(
        fmt::format("{} is not JSON (error at byte {}); it must be an object of settings, such as "
                    "{{\"port\": 9000}}",
                    origin, error.byte));
  }
  if (!document.is_object()) {
    return Status::invalid_argument(
        fmt::format("{} must be a JSON object of settings, such as {{\"port\": 9000}}, got {}",
                    origin, document.type_name()));
  }
  for (const auto& [key, value] : document.items()) {
    std::string name = key;
    std::replace(name.begin(), name.end(), '_', '-');
    Setting* setting = settings.find(name);
    if (setting == nullptr) {
      if (const UnsupportedFlag* flag = find_unsupported(name)) {
        const Status error = unsupported_flag_error(*flag);
        return {error.code(), error.reason(), fmt::format("{} (from {})", error.message(), origin)};
      }
      if (is_setting_of_any_command(name)) continue;
      const std::string nearest = did_you_mean(settings, name);
      return Status::invalid_argument(
          fmt::format("{}: unknown setting \"{}\"{}", origin, std::string_view(key).substr(0, 64),
                      nearest.empty() ? "" : fmt::format("; did you mean \"{}\"?", nearest)));
    }
    const bool wants_string = std::holds_alternative<std::string*>(setting->value);
    const bool is_bytes = setting->name.ends_with("-bytes");
    const bool wants_bool = std::holds_alternative<bool*>(setting->value);
    const bool fits = wants_bool     ? value.is_boolean()
                      : wants_string ? value.is_string()
                                     : value.is_number() || (is_bytes && value.is_string());
    if (!fits) {
      return Status::invalid_argument(fmt::format("{}: \"{}\" must be {}, got {}", origin, name,
                                                  type_name(setting->value), value.type_name()));
    }
    const std::string text = value.is_string() ? value.get<std::string>() : value.dump();
    KVARN_RETURN_IF_ERROR(set_from_text(*setting, text, origin));
  }
  return Status::ok();
}

Status with_source(const Status& error, const Settings& settings) {
  const std::string& message = error.message();
  for (size_t at = message.find("--"); at != std::string::npos; at = message.find("--", at + 2)) {
    size_t end = at + 2;
    while (end < message.size() &&
           (std::isalnum(static_cast<unsigned char>(message[end])) != 0 || message[end] == '-')) {
      ++end;
    }
    const Setting* setting = settings.find(std::string_view(message).substr(at + 2, end - at - 2));
    if (setting == nullptr || setting->source.empty()) continue;
    if (setting->source.starts_with("the flag")) return error;
    return {error.code(), error.reason(),
            fmt::format("{} (--{} comes from {})", message, setting->name, setting->source),
            error.param()};
  }
  return error;
}

}  // namespace kvarn
