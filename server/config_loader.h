// Where settings come from: default < JSON file (--config) < KVARN_* variable < flag, for the
// structs that a command lists in a Settings. Each error names the setting, the place its bad value
// came from, and the fix.
#pragma once

#include <map>
#include <span>
#include <string>
#include <vector>

#include "kernels/core/status.h"
#include "server/cli_settings.h"

namespace kvarn {

struct CommandSpec {
  std::string name;      // "serve"
  std::string summary;   // what it does, one or two sentences
  std::string examples;  // command lines with a remark each, indented by two
};

using Environment = std::map<std::string, std::string>;
Environment process_environment();  // the variables that begin with KVARN_

// What was typed after `kvarn <command>`, and the environment it was typed in.
struct Invocation {
  std::vector<std::string> arguments;
  Environment environment;
};

enum class LoadOutcome { kRun, kHelp };

// Fills the settings. kHelp: --help was among the arguments; nothing else was looked at.
Result<LoadOutcome> load_settings(const CommandSpec& command, Settings& settings,
                                  const Invocation& invocation);

// Applies one JSON document (an object of setting names, with - or _). `origin` names the file.
// Settings of other commands are ignored, unknown ones are an error.
Status apply_json(Settings& settings, const std::string& json, const std::string& origin);

// An error of validate() that names --x, with where x's value came from where that was not a flag.
Status with_source(const Status& error, const Settings& settings);

// The page that `kvarn <command> --help` prints, at most `width` columns where words allow.
std::string format_help(const CommandSpec& command, const Settings& settings, size_t width = 100);

}  // namespace kvarn
