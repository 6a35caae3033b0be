// `kvarn pull`: named so that its absence is clear.
#include "server/commands/commands.h"

namespace kvarn::commands {

int run_pull(const Invocation&) {
  return fail("pull",
              Status::unimplemented("downloading models is not in this version; download the "
                                    "model's files yourself and give their directory with --model"),
              kExitUsage);
}

}  // namespace kvarn::commands
