// Status -> HTTP. The gRPC column of docs/api.md section 6 is the Status; the HTTP column follows
// from (code, reason) by one switch. Pure.
#pragma once

#include <string>

#include "kernels/core/status.h"

namespace kvarn {

int http_status(const Status& status);
// `error.type`: invalid_request_error, rate_limit_error or server_error.
const char* error_type(int http_status);
// {"error":{"message","type","param","code"}}, one line.
std::string error_body(const Status& status);
// What a client is told of a failure that is not its fault: the class and the request id, never the
// engine's own words. Other statuses pass unchanged.
Status public_error(const Status& status, const std::string& request_id);
// Answers that carry Retry-After: overload, loading, draining, too many connections.
bool wants_retry_after(const Status& status);
// Answers whose retry is pointless: x-should-retry: false.
bool retry_is_pointless(const Status& status);

}  // namespace kvarn
