// Text that people read: aligned tables, sizes with units, and the progress of long work (one line
// that is rewritten on a terminal, a plain line now and then elsewhere).
#pragma once

#include <chrono>
#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

namespace kvarn::commands {

// First column left-aligned, the others right-aligned, two spaces between.
class Table {
 public:
  explicit Table(std::vector<std::string> header) : rows_{std::move(header)} {}
  void add(std::vector<std::string> row) { rows_.push_back(std::move(row)); }
  std::string text(std::string_view indent = "  ") const;

 private:
  std::vector<std::vector<std::string>> rows_;
};

std::string bytes_text(uint64_t bytes);    // "8.0 GiB", "13.5 KiB", "512 B"
std::string context_text(int64_t tokens);  // "4K", "1000"

// Shows "what: done/total (12 %), 34 s" on stderr.
class Progress {
 public:
  Progress(std::string what, int64_t total);
  ~Progress();  // clears the terminal's line
  void update(int64_t done);

 private:
  std::string what_;
  int64_t total_;
  bool terminal_;
  std::chrono::steady_clock::time_point started_, shown_;
};

}  // namespace kvarn::commands
