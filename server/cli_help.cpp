// The page of --help, made from the settings: what the command does, examples first, then every
// flag with its default, grouped.
#include <algorithm>
#include <sstream>

#include <fmt/format.h>

#include "server/config_loader.h"

namespace kvarn {
namespace {

constexpr size_t kTextColumn = 34;  // where the explanation of a flag begins

// `text` in lines of at most `width` columns, continued at `indent`.
std::string wrap(const std::string& text, size_t indent, size_t width) {
  std::istringstream words(text);
  std::string out, word;
  size_t column = indent;
  bool first = true;
  while (words >> word) {
    if (!first && column + 1 + word.size() > width) {
      out += '\n';
      out.append(indent, ' ');
      column = indent;
      first = true;
    }
    if (!first) {
      out += ' ';
      ++column;
    }
    out += word;
    column += word.size();
    first = false;
  }
  return out;
}

std::string flag_text(const Setting& setting) {
  switch (setting.value.index()) {
    case 0:
      return fmt::format("--[no-]{}", setting.name);
    case 1:
    case 2:
      return fmt::format("--{} {}", setting.name, setting.name.ends_with("-bytes") ? "SIZE" : "N");
    case 3:
      return fmt::format("--{} X", setting.name);
    default:
      return fmt::format("--{} TEXT", setting.name);
  }
}

void append_flag(std::string& out, const std::string& flag, const std::string& text, size_t width) {
  std::string line = fmt::format("  {}", flag);
  if (line.size() + 1 >= kTextColumn) {
    out += line + '\n';
    line.clear();
  }
  line.resize(kTextColumn, ' ');
  out += line + wrap(text, kTextColumn, width) + "\n";
}

}  // namespace

std::string format_help(const CommandSpec& command, const Settings& settings, size_t width) {
  std::string out =
      fmt::format("Usage: kvarn {} [flags]\n\n{}\n", command.name, wrap(command.summary, 0, width));
  if (!command.examples.empty()) out += "\nExamples:\n" + command.examples;

  std::vector<std::string> groups;  // in order of appearance
  for (const Setting& setting : settings.all()) {
    if (std::find(groups.begin(), groups.end(), setting.group) == groups.end()) {
      groups.push_back(setting.group);
    }
  }
  for (const std::string& group : groups) {
    out += fmt::format("\n{}:\n", group);
    for (const Setting& setting : settings.all()) {
      if (setting.group != group) continue;
      const std::string shown =
          setting.default_text.empty() ? "" : fmt::format(" [{}]", setting.default_text);
      append_flag(out, flag_text(setting), setting.help + shown, width);
    }
  }
  out += "\nOther:\n";
  append_flag(out, "--config FILE", "settings as a JSON object, such as {\"max-num-seqs\": 64}",
              width);
  append_flag(out, "--help", "this page", width);
  out += fmt::format(
      "\n{}\n",
      wrap("Every flag is also a key of the --config file and a variable: --max-num-seqs is "
           "\"max-num-seqs\" and KVARN_MAX_NUM_SEQS. A flag wins over a variable, a variable "
           "over the file, the file over the default in [brackets].",
           0, width));
  return out;
}

}  // namespace kvarn
