// Architecture name of config.json -> factory of its model.
#pragma once

#include <memory>
#include <string>
#include <string_view>

#include "kernels/core/status.h"

namespace kvarn {

class Backend;
class Model;
class WeightStore;
struct ModelConfig;

// `max_positions`: positions that the rotary tables must cover. The backend must outlive the model.
using ModelFactory = Result<std::unique_ptr<Model>> (*)(const ModelConfig& config,
                                                        std::unique_ptr<WeightStore> weights,
                                                        int max_positions, Backend& backend);

ModelFactory find_model_factory(std::string_view architecture);  // nullptr: unknown
std::string supported_architectures();                           // for messages

}  // namespace kvarn
