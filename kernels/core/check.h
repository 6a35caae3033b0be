// CHECK aborts on a bug, in every build; DCHECK only in debug builds (hot loops). Input from a
// client or a file never reaches either: that is a Status.
#pragma once

namespace kvarn {

[[noreturn]] void check_failed(const char* file, int line, const char* condition, const char* why);

}  // namespace kvarn

#define CHECK(condition, why)                                                     \
  do {                                                                            \
    if (!(condition)) ::kvarn::check_failed(__FILE__, __LINE__, #condition, why); \
  } while (0)

#ifdef NDEBUG
#define DCHECK(condition, why) \
  do {                         \
  } while (0)
#else
#define DCHECK(condition, why) CHECK(condition, why)
#endif
