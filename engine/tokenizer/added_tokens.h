// Finds added tokens (<|im_start|>, <think>, ...) inside text: leftmost, then longest, as Hugging
// Face does. Immutable after add().
#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <unordered_map>
#include <vector>

namespace kvarn {

struct AddedToken {
  int32_t id = -1;
  std::string content;
  bool special = false;
  bool lstrip = false, rstrip = false;  // white space before, after it is part of the match
  bool normalized = false;              // searched in the normalised text, not in the original
};

class AddedTokenMatcher {
 public:
  struct Segment {
    size_t begin, end;  // bytes
    int32_t id;         // -1: text between added tokens
  };

  AddedTokenMatcher() : nodes_(1) {}
  void add(const AddedToken& token, std::string_view content);
  bool empty() const { return nodes_.size() == 1; }
  // Segments cover `text` in order; none is empty.
  std::vector<Segment> split(std::string_view text) const;

 private:
  struct Node {
    std::unordered_map<char, uint32_t> children;
    int32_t id = -1;  // of the token that ends here
    bool lstrip = false, rstrip = false;
  };
  // The longest token at `begin`: its node, and in `end` where it ends; null if there is none.
  const Node* longest_at(std::string_view text, size_t begin, size_t& end) const;

  std::vector<Node> nodes_;  // a trie of bytes; [0] is the root
  bool is_first_byte_[256] = {};
};

}  // namespace kvarn
