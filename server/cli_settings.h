// Type-erased view of config structs: what their visit() lists, as named settings that can be set
// from text. The command line, the JSON file, the environment and --help are all made from it.
// Borrows the structs. Not thread-safe (start-up only).
#pragma once

#include <cstdint>
#include <span>
#include <string>
#include <string_view>
#include <type_traits>
#include <variant>
#include <vector>

#include "kernels/core/check.h"
#include "kernels/core/status.h"

namespace kvarn {

using SettingValue = std::variant<bool*, int*, int64_t*, double*, std::string*>;

struct Setting {
  std::string name;   // "max-num-seqs", without dashes in front
  std::string help;   // one clause, lower case
  std::string group;  // heading in --help
  SettingValue value;
  std::string default_text;
  std::string source;  // where the value came from: "the flag --port"; empty: it is the default
};

class Settings {
 public:
  // Every field of `config`, which must outlive this.
  template <typename Config>
  void add(Config& config, std::string_view group) {
    Config::visit(config, [&](std::string_view name, auto& value, std::string_view help) {
      add_setting(name, &value, help, group);
    });
  }

  Setting* find(std::string_view name);
  const Setting* find(std::string_view name) const;
  std::span<Setting> all() { return settings_; }
  std::span<const Setting> all() const { return settings_; }
  // "key=value" of every setting that is not at its default, for the start-up log.
  std::string changed() const;

 private:
  void add_setting(std::string_view name, SettingValue value, std::string_view help,
                   std::string_view group);
  std::vector<Setting> settings_;
};

// Parses `text` into the setting: decimal integers and numbers; true/false, on/off, yes/no, 1/0;
// integers whose name ends in -bytes also as 16MiB. `source` goes into the error and is remembered.
Status set_from_text(Setting& setting, std::string_view text, const std::string& source);
std::string value_text(const SettingValue& value);
const char* type_name(const SettingValue& value);  // "an integer", for messages

// KVARN_MAX_NUM_SEQS of max-num-seqs.
std::string environment_name(std::string_view setting_name);

// The candidate that is nearest to `text` by edit distance, or empty if none is near enough to be
// meant.
std::string nearest_match(std::string_view text, std::span<const std::string> candidates);

}  // namespace kvarn
