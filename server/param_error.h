// The wording of a client's parameter errors (docs/api.md 3.1, letters T R M C U): one place, so
// both doors say the same. `path` is also Status::param. Pure.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>

#include "kernels/core/status.h"

namespace kvarn {

Status type_error(std::string_view path, std::string_view type, std::string_view got);
// `got` is a value or a count, already printable (shown_value).
Status range_error(std::string_view path, std::string_view range, std::string_view got);
Status missing_error(std::string_view path);
Status needs_error(std::string_view path, std::string_view other);
Status conflict_error(std::string_view path, std::string_view other);
Status unsupported_error(std::string_view path, std::string_view value, std::string_view remedy);

// How a client's value is shown: six digits are enough, and a float that came through gRPC then
// reads like the double that came through HTTP.
std::string shown_value(double value);
std::string shown_value(int64_t value);
std::string shown_value(std::string_view text);  // quoted, cut to 64 characters

}  // namespace kvarn
