// Unicode normalisation form C, as Hugging Face's tokenizers compute it.
#pragma once

#include <string>
#include <string_view>

namespace kvarn {

// `text` is valid UTF-8. O(n log n) for any input: long runs of combining marks are sorted, not
// bubbled. The reference's tables are Unicode 9.0; characters assigned since are left as they are
// (they neither decompose, reorder nor compose), whatever version utf8proc knows.
std::string to_nfc(std::string_view text);

// A quick test: true if no character of `text` can be changed by to_nfc. False means "perhaps".
bool is_surely_nfc(std::string_view text);

}  // namespace kvarn
