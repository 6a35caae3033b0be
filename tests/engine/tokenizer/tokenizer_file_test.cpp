// What a broken or foreign tokenizer.json is answered with: the file, the place, what is supported.
#include "engine/tokenizer/tokenizer_file.h"

#include <functional>
#include <random>

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "engine/tokenizer/tokenizer.h"
#include "tests/engine/tokenizer/small_tokenizer.h"

namespace kvarn {
namespace {

using nlohmann::json;
using testing::HasSubstr;

std::string error_of(const std::string& text) {
  const ScratchFile scratch(text);
  const auto tokenizer = Tokenizer::load(scratch.path());
  if (tokenizer.is_ok()) return "no error";
  EXPECT_THAT(tokenizer.status().message(), HasSubstr(scratch.path().string()));
  return tokenizer.status().message();
}

std::string error_after(const std::function<void(json&)>& change) {
  json file = small_tokenizer();
  change(file);
  return error_of(file.dump());
}

TEST(TokenizerFileTest, TheUnchangedFileLoads) {
  EXPECT_EQ(error_after([](json&) {}), "no error");
}

TEST(TokenizerFileTest, NamesTheMissingFile) {
  const auto tokenizer = Tokenizer::load("/nonexistent/tokenizer.json");
  ASSERT_FALSE(tokenizer.is_ok());
  EXPECT_THAT(tokenizer.status().message(), HasSubstr("/nonexistent/tokenizer.json"));
}

TEST(TokenizerFileTest, NamesTheCutFile) {
  const std::string whole = small_tokenizer().dump();
  EXPECT_THAT(error_of(whole.substr(0, whole.size() / 2)), HasSubstr("no valid JSON"));
  EXPECT_THAT(error_of(""), HasSubstr("no valid JSON"));
  EXPECT_THAT(error_of("[]"), HasSubstr("must be an object"));
}

struct Change {
  const char* name;
  std::function<void(json&)> apply;
  const char* expected;
};

TEST(TokenizerFileTest, NamesThePlaceAndWhatIsSupported) {
  const std::vector<Change> changes = {
      {"another model", [](json& f) { f["model"]["type"] = "Unigram"; },
       "model.type: \"Unigram\" is not supported; supported: \"BPE\""},
      {"byte fallback", [](json& f) { f["model"]["byte_fallback"] = true; }, "model.byte_fallback"},
      {"dropout", [](json& f) { f["model"]["dropout"] = 0.1; }, "model.dropout"},
      {"prefix", [](json& f) { f["model"]["continuing_subword_prefix"] = "##"; },
       "model.continuing_subword_prefix"},
      {"no model", [](json& f) { f.erase("model"); }, "model: must be an object"},
      {"no vocab", [](json& f) { f["model"].erase("vocab"); }, "model.vocab: is missing"},
      {"vocab list", [](json& f) { f["model"]["vocab"] = json::array(); },
       "model.vocab: must be an object"},
      {"text id", [](json& f) { f["model"]["vocab"]["he"] = "x"; }, "model.vocab['he']"},
      {"negative id", [](json& f) { f["model"]["vocab"]["he"] = -1; }, "model.vocab['he']"},
      {"huge id", [](json& f) { f["model"]["vocab"]["he"] = 1e15; }, "model.vocab['he']"},
      {"one id twice", [](json& f) { f["model"]["vocab"]["he"] = 3; }, "used by two tokens"},
      {"missing byte", [](json& f) { f["model"]["vocab"].erase("Ġ"); }, "byte 0x20"},
      {"merge of unknown",
       [](json& f) {
         f["model"]["merges"][1] = {"q", "zz"};
       },
       "model.merges[1]: token 'zz'"},
      {"merge to unknown",
       [](json& f) {
         f["model"]["merges"][1] = {"q", "z"};
       },
       "model.merges[1]: token 'qz'"},
      {"merge of three", [](json& f) { f["model"]["merges"][0] = "a b c"; }, "model.merges[0]"},
      {"merge number", [](json& f) { f["model"]["merges"][0] = 5; }, "model.merges[0]"},
      {"no merges", [](json& f) { f["model"].erase("merges"); }, "model.merges: is missing"},
      {"ignore_merges", [](json& f) { f["model"]["ignore_merges"] = 1; }, "model.ignore_merges"},
      {"NFKC", [](json& f) { f["normalizer"]["type"] = "NFKC"; },
       "normalizer: {\"type\":\"NFKC\"} is not supported"},
      {"sequence",
       [](json& f) {
         f["normalizer"] = {{"type", "Sequence"},
                            {"normalizers", json::array({json{{"type", "Lowercase"}}})}};
       },
       "normalizer.normalizers[0]"},
      {"Metaspace",
       [](json& f) {
         f["pre_tokenizer"] = {{"type", "Metaspace"}};
       },
       "pre_tokenizer"},
      {"none", [](json& f) { f["pre_tokenizer"] = nullptr; }, "pre_tokenizer"},
      {"Digits", [](json& f) { f["pre_tokenizer"]["pretokenizers"][0]["type"] = "Digits"; },
       "pre_tokenizer.pretokenizers[0]"},
      {"Removed", [](json& f) { f["pre_tokenizer"]["pretokenizers"][0]["behavior"] = "Removed"; },
       "pretokenizers[0].behavior"},
      {"invert", [](json& f) { f["pre_tokenizer"]["pretokenizers"][0]["invert"] = true; },
       "pretokenizers[0].invert"},
      {"String",
       [](json& f) {
         f["pre_tokenizer"]["pretokenizers"][0]["pattern"] = {{"String", " "}};
       },
       "pretokenizers[0].pattern"},
      {"bad regex",
       [](json& f) { f["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"] = "(a"; },
       "no valid regular expression"},
      {"foreign regex",
       [](json& f) { f["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"] = "\\h+"; },
       "'\\h' at offset 0"},
      {"prefix space",
       [](json& f) { f["pre_tokenizer"]["pretokenizers"][1]["add_prefix_space"] = true; },
       "pretokenizers[1].add_prefix_space"},
      {"two regexes", [](json& f) { f["pre_tokenizer"]["pretokenizers"][1]["use_regex"] = true; },
       "pretokenizers[1].use_regex"},
      {"decoder", [](json& f) { f["decoder"]["type"] = "WordPiece"; }, "decoder"},
      {"no decoder", [](json& f) { f.erase("decoder"); }, "decoder"},
      {"added object", [](json& f) { f["added_tokens"] = json::object(); }, "added_tokens"},
      {"added number", [](json& f) { f["added_tokens"][0] = 7; }, "added_tokens[0]"},
      {"no content", [](json& f) { f["added_tokens"][0].erase("content"); },
       "added_tokens[0].content"},
      {"empty content", [](json& f) { f["added_tokens"][0]["content"] = ""; },
       "added_tokens[0].content"},
      {"added id", [](json& f) { f["added_tokens"][0]["id"] = 259; }, "added_tokens[0].id"},
      {"added twice", [](json& f) { f["added_tokens"][1]["content"] = "<|end|>"; },
       "added_tokens[1].content"},
      {"single_word", [](json& f) { f["added_tokens"][1]["single_word"] = true; },
       "added_tokens[1].single_word: true is not supported"},
      {"special text", [](json& f) { f["added_tokens"][1]["special"] = "yes"; },
       "added_tokens[1].special"},
  };
  for (const Change& change : changes) {
    EXPECT_THAT(error_after(change.apply), HasSubstr(change.expected)) << change.name;
  }
}

TEST(TokenizerFileTest, MutatedFilesNeverCrash) {
  const std::string whole = small_tokenizer().dump();
  std::mt19937 rng(1);
  int loaded = 0;
  for (int round = 0; round < 1500; ++round) {
    std::string text = whole;
    for (size_t i = 0; i < 1 + rng() % 3; ++i) {
      const size_t at = rng() % text.size();
      switch (rng() % 4) {
        case 0:
          text[at] = static_cast<char>(rng() % 256);
          break;
        case 1:
          text.erase(at, 1 + rng() % 8);
          break;
        case 2:
          text.insert(at, 1, "{}[],:\"0-e\\"[rng() % 11]);
          break;
        default:
          text.insert(at, text.substr(rng() % text.size(), rng() % 20));
      }
    }
    const ScratchFile scratch(text);
    const auto tokenizer = Tokenizer::load(scratch.path());
    if (!tokenizer.is_ok()) {
      ASSERT_FALSE(tokenizer.status().message().empty());
      continue;
    }
    ++loaded;
    (*tokenizer)->decode((*tokenizer)->encode("hello t<think> é\n\xFF 12"), true);
  }
  EXPECT_GT(loaded, 10);  // some changes hit a name that does not matter
}

}  // namespace
}  // namespace kvarn
