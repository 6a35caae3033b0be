// tokenizer_tool TOKENIZER_JSON: answers requests for the tokenizer oracle, one JSON value a line.
//   "text"                         -> ids
//   {"hex": "c328"}                -> ids of these bytes, which need not be UTF-8
//   {"ids": [1], "skip": true}     -> text, U+FFFD where the bytes are not UTF-8
//   {"bench": "text"}              -> megabytes encoded per second
#include <chrono>
#include <cstdio>
#include <iostream>
#include <string>
#include <vector>

#include <nlohmann/json.hpp>

#include "engine/tokenizer/detokenizer.h"
#include "engine/tokenizer/tokenizer.h"

using nlohmann::json;

namespace {

std::string from_hex(const std::string& hex) {
  std::string bytes;
  for (size_t i = 0; i + 1 < hex.size(); i += 2) {
    bytes.push_back(static_cast<char>(std::stoi(hex.substr(i, 2), nullptr, 16)));
  }
  return bytes;
}

double megabytes_per_second(const kvarn::Tokenizer& tokenizer, const std::string& text) {
  const auto start = std::chrono::steady_clock::now();
  const size_t count = tokenizer.encode(text).size();
  const std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - start;
  return count == 0 ? 0 : static_cast<double>(text.size()) / 1e6 / seconds.count();
}

json answer(const kvarn::Tokenizer& tokenizer, const json& request) {
  if (request.is_string()) return tokenizer.encode(request.get_ref<const std::string&>());
  if (request.contains("hex")) return tokenizer.encode(from_hex(request["hex"]));
  if (request.contains("bench")) return megabytes_per_second(tokenizer, request["bench"]);
  const std::vector<int32_t> ids = request.at("ids");
  return kvarn::sanitize_utf8(tokenizer.decode(ids, request.value("skip", false)));
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 2) {
    std::fputs("usage: tokenizer_tool TOKENIZER_JSON < requests\n", stderr);
    return 2;
  }
  auto tokenizer = kvarn::Tokenizer::load(argv[1]);
  if (!tokenizer.is_ok()) {
    std::fprintf(stderr, "%s\n", tokenizer.status().message().c_str());
    return 1;
  }
  std::ios::sync_with_stdio(false);
  for (std::string line; std::getline(std::cin, line);) {
    std::cout << answer(**tokenizer, json::parse(line)).dump() << '\n';
  }
  return 0;
}
