// The texts beside a model's weights. Errors name the file and what is wrong with it.
#pragma once

#include <filesystem>
#include <memory>

#include "kernels/core/status.h"
#include "server/chat_template.h"

namespace kvarn {

// chat_template.jinja, else `chat_template` of tokenizer_config.json (a string, or a list of named
// ones, of which "default" counts). Null where the directory has none: then there are no chats.
Result<std::unique_ptr<ChatTemplate>> load_chat_template(const std::filesystem::path& model_dir);

}  // namespace kvarn
