// template_tool: renders for the template oracle. Each line of the input is {"template": source,
// "variables": {...}}; each line of the output {"text": "..."} or {"error": "..."}.
#include <iostream>
#include <map>
#include <memory>
#include <string>

#include <nlohmann/json.hpp>

#include "server/chat_template.h"

using nlohmann::ordered_json;

int main() {
  std::ios::sync_with_stdio(false);
  std::map<std::string, std::unique_ptr<kvarn::ChatTemplate>> compiled;
  for (std::string line; std::getline(std::cin, line);) {
    const ordered_json request = ordered_json::parse(line);
    const std::string source = request.at("template");
    ordered_json answer;
    auto& chat_template = compiled[source];
    if (!chat_template) {
      auto result = kvarn::ChatTemplate::compile(source);
      if (result.is_ok()) {
        chat_template = std::move(result).value();
      } else {
        answer["error"] = result.status().message();
      }
    }
    if (chat_template) {
      auto text = chat_template->render(request.at("variables"));
      if (text.is_ok()) {
        answer["text"] = *text;
      } else {
        answer["error"] = text.status().message();
      }
    }
    std::cout << answer.dump() << '\n';
  }
  return 0;
}
