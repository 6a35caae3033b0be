// One line per event, `event key=value ...`, on stderr. Never prompt or output text, nothing above
// debug per token. Thread-safe. The sink (spdlog) stays inside log.cpp.
#pragma once

#include <optional>
#include <string_view>

namespace kvarn {

enum class LogLevel { kDebug, kInfo, kWarning, kError, kOff };

// "debug", "info", "warning", "error", "off"; none for any other word.
std::optional<LogLevel> parse_log_level(std::string_view word);

void set_log_level(LogLevel level);
bool log_enabled(LogLevel level);
void log_line(LogLevel level, std::string_view line);

inline void log_debug(std::string_view line) { log_line(LogLevel::kDebug, line); }
inline void log_info(std::string_view line) { log_line(LogLevel::kInfo, line); }
inline void log_warning(std::string_view line) { log_line(LogLevel::kWarning, line); }
inline void log_error(std::string_view line) { log_line(LogLevel::kError, line); }

}  // namespace kvarn
