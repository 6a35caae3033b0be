// The commands of the `kvarn` binary. Each takes what was typed after its name and returns the exit
// code: 0 done, 1 failed while running, 2 wrong flags or files (one line on stderr says which and
// how to fix it). What a command is asked to print goes to stdout; progress and logs to stderr.
#pragma once

#include <optional>
#include <span>
#include <string_view>

#include "server/config_loader.h"

namespace kvarn::commands {

constexpr int kExitOk = 0;
constexpr int kExitFailed = 1;
constexpr int kExitUsage = 2;

struct Command {
  std::string_view name;
  std::string_view summary;  // one line of `kvarn --help`
  int (*run)(const Invocation& invocation);
};
std::span<const Command> all_commands();

int run_serve(const Invocation& invocation);
int run_chat(const Invocation& invocation);
int run_bench(const Invocation& invocation);
int run_eval(const Invocation& invocation);
int run_inspect(const Invocation& invocation);
int run_pull(const Invocation& invocation);
int run_version(const Invocation& invocation);

// `kvarn ARGUMENTS...`: picks the command.
int run_main(std::span<const std::string> arguments, const Environment& environment);

// Loads the settings; where that ends the command (--help, a bad flag) returns its exit code.
std::optional<int> prepare(const CommandSpec& command, Settings& settings,
                           const Invocation& invocation);
// Prints "kvarn NAME: MESSAGE" on stderr and returns `exit_code`.
int fail(std::string_view command, const Status& error, int exit_code);
// As fail(), with the exit code that the error's kind asks for: 2 for what the user can mend by
// other flags or files, else 1.
int fail(std::string_view command, const Status& error);

}  // namespace kvarn::commands
