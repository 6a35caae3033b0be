// The server process: opens the HTTP port, loads the model on another thread (the port answers 503
// model_loading meanwhile), starts gRPC, and waits for a signal. SIGTERM and SIGINT drain.
#pragma once

#include "engine/config.h"
#include "server/server_config.h"

namespace kvarn {

// Both configs are validated. Returns the exit code: 0 after a drain that cut nothing off; 1 if
// something was cut off, the model did not load, a port was taken or the engine failed.
int run_server(const EngineConfig& engine_config, const ServerConfig& server_config);

}  // namespace kvarn
