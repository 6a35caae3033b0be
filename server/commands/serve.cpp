// `kvarn serve`: settings -> run_server(). Everything that runs is in server/app.
#include "engine/config.h"
#include "kernels/core/log.h"
#include "server/app.h"
#include "server/commands/commands.h"
#include "server/engine_factory.h"
#include "server/server_config.h"

namespace kvarn::commands {
namespace {

const CommandSpec kServe = {
    "serve",
    "Serves a model over HTTP (OpenAI's API) and gRPC (kvarn.v1). Prints the memory plan, the two "
    "addresses and `ready`. SIGTERM or Ctrl-C finishes what was accepted, then ends; a second one "
    "ends at once.",
    "  kvarn serve --model DIR\n"
    "  kvarn serve --model DIR --port 9000 --grpc-port 0        another port, no gRPC\n"
    "  kvarn serve --model DIR --kv-memory 8GiB                 exactly so much for the KV cache\n"
    "  kvarn serve --model DIR --kv-cache-dtype fp16            uncompressed KV, for comparison\n"
    "  curl 127.0.0.1:8000/v1/chat/completions -H 'Content-Type: application/json' \\\n"
    "    -d '{\"messages\": [{\"role\": \"user\", \"content\": \"Hello!\"}]}'\n"};

}  // namespace

int run_serve(const Invocation& invocation) {
  EngineConfig engine;
  ServerConfig server;
  Settings settings;
  settings.add(engine, "Engine");
  settings.add(server, "Server");
  for (Setting& setting : settings.all()) {
    if (setting.name.starts_with("grpc-")) setting.group = "gRPC";
  }
  if (const auto exit_code = prepare(kServe, settings, invocation)) return *exit_code;
  if (const Status status = engine.validate(); !status.is_ok()) {
    return fail(kServe.name, with_source(status, settings), kExitUsage);
  }
  if (const Status status = server.validate(engine); !status.is_ok()) {
    return fail(kServe.name, with_source(status, settings), kExitUsage);
  }
  set_log_level(*parse_log_level(server.log_level));
  // The cheap checks come before any port is opened, so that a typing error is answered as one.
  if (const Status status = check_model(engine); !status.is_ok()) {
    return fail(kServe.name, with_source(status, settings), kExitUsage);
  }
  if (const std::string changed = settings.changed(); !changed.empty()) {
    log_info("settings " + changed);
  }
  return run_server(engine, server);
}

}  // namespace kvarn::commands
