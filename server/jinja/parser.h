// Template source -> syntax tree. What is not in the subset is refused by name and line.
#pragma once

#include <string_view>

#include "server/jinja/ast.h"

namespace kvarn::jinja {

// Throws TemplateError with a line.
Block parse(std::string_view source);

}  // namespace kvarn::jinja
