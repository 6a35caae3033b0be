// Every endpoint but the generating ones: one request in, one answer out. Thread-safe; the text
// endpoints tokenise on the caller's thread.
#pragma once

#include <string_view>

#include "server/http_answer.h"
#include "server/routes.h"
#include "server/server_state.h"

namespace kvarn {

HttpAnswer answer_simple(ServerState& state, const Endpoint& endpoint, std::string_view path,
                         std::string_view body, const std::string& request_id);

}  // namespace kvarn
