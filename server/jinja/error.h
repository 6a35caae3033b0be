// Why a template cannot be compiled or rendered. Thrown inside server/jinja only; ChatTemplate
// turns it into a Status.
#pragma once

#include <stdexcept>
#include <string>

namespace kvarn::jinja {

class TemplateError : public std::runtime_error {
 public:
  explicit TemplateError(const std::string& message, int line = 0)
      : std::runtime_error(message), line_(line) {}
  int line() const { return line_; }  // 0: not known where it was thrown; the interpreter adds it

 private:
  int line_;
};

}  // namespace kvarn::jinja
