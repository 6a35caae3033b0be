// JSON on the wire, outgoing: UTF-8, one line, no NaN or infinity, and U+0085, U+2028 and U+2029
// escaped, because some clients split lines there. Pure.
#pragma once

#include <string>
#include <string_view>

#include <nlohmann/json_fwd.hpp>

namespace kvarn {

// Text that is not valid UTF-8 is replaced by U+FFFD: a bug upstream must not cost the answer.
std::string dump_json(const nlohmann::ordered_json& value);
// "-9999.0" for minus infinity and for NaN.
double finite_logprob(float logprob);
// At most 64 characters of a client's value for an error message, control characters escaped,
// invalid UTF-8 replaced.
std::string quote_for_message(std::string_view text);

}  // namespace kvarn
