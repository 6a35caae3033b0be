// Settings: order of the sources, the words of each error, and what no input may do.
#include "server/config_loader.h"

#include <fmt/format.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cstdio>
#include <filesystem>
#include <fstream>
#include <random>

#include "engine/config.h"
#include "server/server_config.h"

namespace kvarn {
namespace {

using ::testing::AllOf;
using ::testing::HasSubstr;
using ::testing::Not;

const CommandSpec kCommand = {"serve", "Serves.", "  kvarn serve --model DIR\n"};

class ConfigLoaderTest : public ::testing::Test {
 protected:
  ConfigLoaderTest() {
    settings_.add(engine_, "Engine");
    settings_.add(server_, "Server");
  }
  ~ConfigLoaderTest() override { std::filesystem::remove(file_); }

  Result<LoadOutcome> load(std::vector<std::string> arguments, Environment environment = {}) {
    return load_settings(kCommand, settings_, {std::move(arguments), std::move(environment)});
  }
  std::string error(std::vector<std::string> arguments, Environment environment = {}) {
    const auto outcome = load(std::move(arguments), std::move(environment));
    return outcome.is_ok() ? "no error" : outcome.status().message();
  }
  std::string write_file(const std::string& json) {
    file_ = std::filesystem::path(::testing::TempDir()) /
            fmt::format("settings-{}.json", std::random_device{}());
    std::ofstream(file_) << json;
    return file_.string();
  }

  EngineConfig engine_;
  ServerConfig server_;
  Settings settings_;
  std::filesystem::path file_;
};

TEST_F(ConfigLoaderTest, WithoutSourcesEverySettingKeepsItsDefault) {
  ASSERT_TRUE(load({}).is_ok());
  EXPECT_EQ(engine_.max_num_seqs, 256);
  EXPECT_EQ(server_.port, 8000);
  EXPECT_EQ(settings_.changed(), "");
}

TEST_F(ConfigLoaderTest, AFlagWinsOverAVariableAndAVariableOverTheFile) {
  const std::string file = write_file(R"({"port": 1, "max_num_seqs": 2, "threads": 3})");
  ASSERT_TRUE(
      load({"--config", file, "--port", "11"}, {{"KVARN_PORT", "21"}, {"KVARN_MAX_NUM_SEQS", "22"}})
          .is_ok());
  EXPECT_EQ(server_.port, 11);
  EXPECT_EQ(engine_.max_num_seqs, 22);
  EXPECT_EQ(engine_.threads, 3);
}

TEST_F(ConfigLoaderTest, TheVariableKvarnConfigNamesTheFileWhereNoFlagDoes) {
  const std::string file = write_file(R"({"threads": 3})");
  ASSERT_TRUE(load({}, {{"KVARN_CONFIG", file}}).is_ok());
  EXPECT_EQ(engine_.threads, 3);
}

TEST_F(ConfigLoaderTest, EveryTypeIsReadFromEverySource) {
  const std::string file = write_file(
      R"({"drain-seconds": 1.5, "enable-prefix-caching": false, "host": "::1", "port": 9})");
  ASSERT_TRUE(
      load({fmt::format("--config={}", file), "--no-grpc-reflection", "--max-body-bytes", "2MiB"},
           {{"KVARN_GENERATION_CONFIG", "off"}, {"KVARN_GPU_MEMORY_UTILIZATION", "0.5"}})
          .is_ok());
  EXPECT_EQ(server_.drain_seconds, 1.5);
  EXPECT_FALSE(engine_.enable_prefix_caching);
  EXPECT_EQ(server_.host, "::1");
  EXPECT_FALSE(server_.grpc_reflection);
  EXPECT_EQ(server_.max_body_bytes, 2 * 1024 * 1024);
  EXPECT_FALSE(server_.generation_config);
  EXPECT_EQ(engine_.gpu_memory_utilization, 0.5);
}

TEST_F(ConfigLoaderTest, ASwitchHasAPositiveAndANegativeFlagAndTheLastOneCounts) {
  ASSERT_TRUE(load({"--no-enable-prefix-caching", "--enable-prefix-caching"}).is_ok());
  EXPECT_TRUE(engine_.enable_prefix_caching);
  ASSERT_TRUE(load({"--enable-prefix-caching", "--no-enable-prefix-caching"}).is_ok());
  EXPECT_FALSE(engine_.enable_prefix_caching);
}

TEST_F(ConfigLoaderTest, AMisspeltFlagNamesTheNearestOne) {
  EXPECT_THAT(error({"--max-num-seq", "4"}),
              AllOf(HasSubstr("unknown flag --max-num-seq; did"), HasSubstr("--max-num-seqs?")));
  EXPECT_THAT(error({"--max_model_len=5"}), HasSubstr("did you mean --max-model-len?"));
  EXPECT_THAT(error({"--no-prefix-caching"}), HasSubstr("--no-enable-prefix-caching"));
  EXPECT_THAT(error({"--zzzzzzzzzz"}), AllOf(HasSubstr("--zzzzzzzzzz"), Not(HasSubstr("mean"))));
}

TEST_F(ConfigLoaderTest, AnErrorNamesTheSourceOfTheBadValue) {
  EXPECT_THAT(error({"--port", "http"}),
              HasSubstr("--port must be an integer, got 'http' (from the flag --port)"));
  EXPECT_THAT(error({}, {{"KVARN_PORT", ""}}), HasSubstr("(from the variable KVARN_PORT)"));
  const std::string file = write_file(R"({"port": "80"})");
  EXPECT_THAT(error({"--config", file}),
              AllOf(HasSubstr(file), HasSubstr("\"port\""), HasSubstr("an integer, got string")));
}

TEST_F(ConfigLoaderTest, ARangeErrorOfTheConfigIsTracedToTheVariable) {
  ASSERT_TRUE(load({}, {{"KVARN_MAX_NUM_SEQS", "0"}}).is_ok());
  EXPECT_THAT(with_source(engine_.validate(), settings_).message(),
              AllOf(HasSubstr("--max-num-seqs"), HasSubstr("comes from the variable")));
}

TEST_F(ConfigLoaderTest, AnIntegerTakesNoFractionAndNoOverflow) {
  for (const char* text : {"1.5", "1e3", " 1", "1 ", "0x10", "99999999999999999999", "nan"}) {
    EXPECT_THAT(error({"--threads", text}), HasSubstr("must be an integer")) << text;
  }
}

TEST_F(ConfigLoaderTest, AFlagWithoutItsValueSaysSo) {
  EXPECT_THAT(error({"--port"}), HasSubstr("--port"));
  EXPECT_THAT(error({"--port="}), HasSubstr("--port"));
  EXPECT_THAT(error({"--port", "--host", "::1"}), HasSubstr("--port needs a value"));
}

TEST_F(ConfigLoaderTest, AStrayArgumentIsRefusedWithTheFix) {
  EXPECT_THAT(error({"some/model"}), HasSubstr("--model some/model"));
}

TEST_F(ConfigLoaderTest, AFlagOfALaterStageRefusesToStartFromEverySource) {
  for (const UnsupportedFlag& flag : kUnsupportedFlags) {
    const std::string name(flag.name);
    EXPECT_THAT(error({fmt::format("--{}", name), "x"}), HasSubstr(name));
    EXPECT_THAT(error({}, {{environment_name(name), "x"}}), HasSubstr(name));
    Settings& settings = settings_;
    const Status status =
        apply_json(settings, fmt::format(R"({{"{}": "x"}})", name), "settings.json");
    EXPECT_THAT(status.message(), AllOf(HasSubstr(name), HasSubstr("settings.json")));
  }
}

TEST_F(ConfigLoaderTest, AFileIsRefusedWithItsNameAndTheFix) {
  EXPECT_THAT(error({"--config", "/does/not/exist.json"}), HasSubstr("/does/not/exist.json"));
  EXPECT_THAT(apply_json(settings_, "{\"port\": 1,", "f.json").message(),
              AllOf(HasSubstr("f.json"), HasSubstr("byte")));
  EXPECT_THAT(apply_json(settings_, "[1]", "f.json").message(), HasSubstr("got array"));
  EXPECT_THAT(apply_json(settings_, R"({"prot": 1})", "f.json").message(),
              HasSubstr("did you mean \"port\"?"));
  EXPECT_THAT(apply_json(settings_, R"({"port": 1.5})", "f.json").message(),
              HasSubstr("--port must be an integer"));
  EXPECT_THAT(apply_json(settings_, R"({"grpc-reflection": 1})", "f.json").message(),
              HasSubstr("true or false"));
}

TEST_F(ConfigLoaderTest, OneFileServesCommandsWithFewerSettings) {
  EngineConfig engine;
  Settings few;
  few.add(engine, "Engine");
  EXPECT_TRUE(apply_json(few, R"({"port": 1, "threads": 2})", "f.json").is_ok());
  EXPECT_EQ(engine.threads, 2);
}

TEST_F(ConfigLoaderTest, HelpListsEverySettingWithItsDefault) {
  const auto outcome = load({"--port", "80", "--help"});
  ASSERT_TRUE(outcome.is_ok());
  EXPECT_EQ(*outcome, LoadOutcome::kHelp);
  const std::string help = format_help(kCommand, settings_);
  for (const Setting& setting : settings_.all()) {
    EXPECT_THAT(help, HasSubstr(setting.name));
    EXPECT_THAT(help, HasSubstr(setting.default_text));
  }
  for (size_t begin = 0; begin < help.size();) {
    const size_t end = help.find('\n', begin);
    EXPECT_LE(end - begin, 100u) << help.substr(begin, end - begin);
    begin = end + 1;
  }
}

TEST_F(ConfigLoaderTest, NoMutatedFileCrashesOrIsTakenSilently) {
  const std::string valid =
      R"({"port": 8000, "host": "127.0.0.1", "drain-seconds": 1.5, "grpc-reflection": true, )"
      R"("max-body-bytes": "16MiB", "threads": 0})";
  std::mt19937 random(7);
  int refused = 0;
  for (int i = 0; i < 20000; ++i) {
    std::string text = valid;
    const int edits = 1 + static_cast<int>(random() % 4);
    for (int e = 0; e < edits; ++e) {
      const size_t at = random() % text.size();
      switch (random() % 3) {
        case 0:
          text[at] = static_cast<char>(random());
          break;
        case 1:
          text.erase(at, 1 + random() % 8);
          break;
        default:
          text.insert(at, 1, "{}[]\",:0-e\\"[random() % 11]);
      }
      if (text.empty()) text.push_back('{');
    }
    const Status status = apply_json(settings_, text, "f.json");
    if (status.is_ok()) continue;
    ++refused;
    EXPECT_EQ(status.code() == StatusCode::kInvalidArgument ||
                  status.code() == StatusCode::kUnimplemented,
              true)
        << text;
    EXPECT_FALSE(status.message().empty());
  }
  EXPECT_GT(refused, 10000);
}

}  // namespace
}  // namespace kvarn
