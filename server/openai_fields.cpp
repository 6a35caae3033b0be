// The members of a request that are known but not served yet, each with what to do instead.
#include <array>

#include <nlohmann/json.hpp>

#include "server/openai_api.h"

namespace kvarn {
namespace {

using nlohmann::ordered_json;

bool never(const ordered_json&, const ordered_json&) { return false; }
bool if_false(const ordered_json& value, const ordered_json&) {
  return value.is_boolean() && !value.get<bool>();
}
bool if_only_text(const ordered_json& value, const ordered_json&) {
  return value == ordered_json::array({"text"});
}
bool if_medium(const ordered_json& value, const ordered_json&) { return value == "medium"; }
bool if_equal_to_n(const ordered_json& value, const ordered_json& body) {
  const auto n = body.find("n");
  return value == (n == body.end() || n->is_null() ? ordered_json(1) : *n);
}

constexpr const char* kStructured = "structured output belongs to a later stage; leave it out";
constexpr const char* kGuided =
    "use 'structured_outputs' once this server offers it (a later stage); leave it out";

constexpr std::array kFields = {
    UnsupportedField{"structured_outputs", kStructured, true, true, never},
    UnsupportedField{"return_timings", "it belongs to a later stage; leave it out", true, true,
                     if_false},
    UnsupportedField{"functions", "use 'tools' once this server offers them (a later stage)", true,
                     false, never},
    UnsupportedField{"function_call", "use 'tool_choice' once this server offers tools", true,
                     false, never},
    UnsupportedField{"audio", "this server speaks text only", true, false, never},
    UnsupportedField{"modalities", "this server speaks text only; leave it out", true, false,
                     if_only_text},
    UnsupportedField{"prediction", "leave it out", true, false, never},
    UnsupportedField{"web_search_options", "this server has no tools of its own", true, false,
                     never},
    UnsupportedField{"moderation", "moderate before you send", true, false, never},
    UnsupportedField{"verbosity", "say in the prompt how long the answer should be", true, false,
                     if_medium},
    UnsupportedField{"suffix", "put the whole context into 'prompt'", false, true, never},
    UnsupportedField{"best_of", "use 'n' and choose among the answers", true, true, if_equal_to_n},
    UnsupportedField{"use_beam_search", "use sampling, or temperature 0", true, true, if_false},
    UnsupportedField{"prompt_logprobs", "use 'logprobs' for the output", true, true, never},
    UnsupportedField{"logprob_token_ids", "use 'top_logprobs'", true, true, never},
    UnsupportedField{"bad_words", "use 'logit_bias'", true, true, never},
    UnsupportedField{"allowed_token_ids", "use 'logit_bias'", true, true, never},
    UnsupportedField{"truncate_prompt_tokens", "shorten the prompt before you send it", true, true,
                     never},
    UnsupportedField{"chat_template", "the model's own template is used", true, false, never},
    UnsupportedField{"documents", "put documents into messages", true, false, never},
    UnsupportedField{"guided_json", kGuided, true, true, never},
    UnsupportedField{"guided_regex", kGuided, true, true, never},
    UnsupportedField{"guided_choice", kGuided, true, true, never},
    UnsupportedField{"guided_grammar", kGuided, true, true, never},
    UnsupportedField{"guided_decoding_backend", kGuided, true, true, never},
    UnsupportedField{"guided_whitespace_pattern", kGuided, true, true, never},
    UnsupportedField{"return_tokens_as_token_ids", "use 'return_token_ids'", true, true, if_false},
};

}  // namespace

std::span<const UnsupportedField> unsupported_fields() { return kFields; }

}  // namespace kvarn
