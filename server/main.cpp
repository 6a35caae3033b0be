// The `kvarn` binary: command line in, exit code out. The commands are in server/commands/.
#include <cstdio>
#include <exception>
#include <string>
#include <vector>

#include "server/commands/commands.h"
#include "server/config_loader.h"

int main(int argc, char** argv) {
  try {
    const std::vector<std::string> arguments(argv + (argc > 0 ? 1 : 0), argv + argc);
    return kvarn::commands::run_main(arguments, kvarn::process_environment());
  } catch (const std::exception& error) {  // out of memory at start-up; a bug elsewhere
    std::fprintf(stderr, "kvarn: %s\n", error.what());
    return kvarn::commands::kExitFailed;
  }
}
