#include "server/commands/commands.h"

#include <algorithm>
#include <array>
#include <cstdio>

#include <fmt/format.h>

namespace kvarn::commands {
namespace {

constexpr std::array kCommands = {
    Command{"serve", "serve a model over HTTP (OpenAI's API) and gRPC", run_serve},
    Command{"chat", "talk to a model in the terminal, in-process or at a server", run_chat},
    Command{"bench", "measure prefill, decode and serving speed", run_bench},
    Command{"eval", "measure what a KV cache format costs in quality", run_eval},
    Command{"inspect", "print a model's config and tensors, and what fits a KV memory size",
            run_inspect},
    Command{"pull", "download a model (not in this version)", run_pull},
    Command{"version", "print version and build facts", run_version},
};

std::string main_help() {
  std::string out =
      "kvarn serves Qwen3 models over HTTP and gRPC, with a KV cache compressed to 4-bit keys and "
      "2-bit values.\n\nUsage: kvarn COMMAND [flags]\n\nCommands:\n";
  for (const Command& command : kCommands) {
    out += fmt::format("  {:<9} {}\n", command.name, command.summary);
  }
  out +=
      "\nExamples:\n"
      "  kvarn serve --model DIR                 HTTP on 127.0.0.1:8000, gRPC on :8001\n"
      "  kvarn chat --model DIR                  chat in this terminal\n"
      "  kvarn inspect --shape qwen3-8b --kv-memory 8GiB\n"
      "\n`kvarn COMMAND --help` lists the flags of a command.\n";
  return out;
}

}  // namespace

std::span<const Command> all_commands() { return kCommands; }

int run_main(std::span<const std::string> arguments, const Environment& environment) {
  if (arguments.empty()) {
    std::fputs(main_help().c_str(), stderr);
    return kExitUsage;
  }
  const std::string& name = arguments.front();
  if (name == "--help" || name == "-h" || name == "help") {
    std::fputs(main_help().c_str(), stdout);
    return kExitOk;
  }
  if (name == "--version" || name == "-V") return run_version({{}, environment});
  const auto* command =
      std::find_if(kCommands.begin(), kCommands.end(),
                   [&](const Command& candidate) { return candidate.name == name; });
  if (command == kCommands.end()) {
    std::vector<std::string> names;
    for (const Command& candidate : kCommands) names.emplace_back(candidate.name);
    const std::string nearest = nearest_match(name, names);
    const std::string hint = name.starts_with("-")
                                 ? "; the command comes first: kvarn serve " + name
                             : nearest.empty() ? ""
                                               : "; did you mean kvarn " + nearest + "?";
    std::fputs(fmt::format("kvarn: unknown command '{}'{} (kvarn --help lists them)\n", name, hint)
                   .c_str(),
               stderr);
    return kExitUsage;
  }
  return command->run({{arguments.begin() + 1, arguments.end()}, environment});
}

std::optional<int> prepare(const CommandSpec& command, Settings& settings,
                           const Invocation& invocation) {
  const Result<LoadOutcome> outcome = load_settings(command, settings, invocation);
  if (!outcome.is_ok()) return fail(command.name, outcome.status(), kExitUsage);
  if (*outcome == LoadOutcome::kHelp) {
    std::fputs(format_help(command, settings).c_str(), stdout);
    return kExitOk;
  }
  return std::nullopt;
}

int fail(std::string_view command, const Status& error, int exit_code) {
  std::fflush(stdout);
  std::fputs(fmt::format("kvarn {}: {}\n", command, error.message()).c_str(), stderr);
  return exit_code;
}

int fail(std::string_view command, const Status& error) {
  switch (error.code()) {
    case StatusCode::kInvalidArgument:
    case StatusCode::kNotFound:
    case StatusCode::kFailedPrecondition:
    case StatusCode::kResourceExhausted:
    case StatusCode::kUnimplemented:
    case StatusCode::kUnavailable:
      return fail(command, error, kExitUsage);
    default:
      return fail(command, error, kExitFailed);
  }
}

}  // namespace kvarn::commands
