#include "models/registry.h"

#include <array>

#include "models/qwen3.h"

namespace kvarn {
namespace {

struct Entry {
  std::string_view architecture;
  ModelFactory factory;
};
constexpr std::array kRegistry = {
    Entry{"Qwen3ForCausalLM", &Qwen3::create},
};

}  // namespace

ModelFactory find_model_factory(std::string_view architecture) {
  for (const Entry& entry : kRegistry) {
    if (entry.architecture == architecture) return entry.factory;
  }
  return nullptr;
}

std::string supported_architectures() {
  std::string names;
  for (const Entry& entry : kRegistry) {
    if (!names.empty()) names += ", ";
    names += entry.architecture;
  }
  return names;
}

}  // namespace kvarn
