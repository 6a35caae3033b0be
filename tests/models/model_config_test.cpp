#include "models/model_config.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <nlohmann/json.hpp>
#include <random>

#include "models/model.h"
#include "tests/support/tiny_model.h"

namespace kvarn {
namespace {

using nlohmann::json;
using ::testing::HasSubstr;

json good() { return json::parse(test::tiny_config_json({})); }

Result<ModelConfig> parse(const json& config) {
  return parse_model_config(config.dump(), "dir/config.json");
}

std::string error_of(const json& config) {
  const Result<ModelConfig> result = parse(config);
  return result.is_ok() ? "no error" : result.status().message();
}

TEST(ModelConfigTest, ReadsTheShapeOfAQwen3Config) {
  const Result<ModelConfig> config = parse(good());
  ASSERT_TRUE(config.is_ok()) << config.status().message();
  EXPECT_EQ(config->vocab_size, 512);
  EXPECT_EQ(config->hidden_size, 64);
  EXPECT_EQ(config->num_layers, 2);
  EXPECT_EQ(config->num_q_heads, 4);
  EXPECT_EQ(config->num_kv_heads, 2);
  EXPECT_EQ(config->head_dim, 128);
  EXPECT_EQ(config->rope_theta, 1e6);
  EXPECT_TRUE(config->tied_embeddings);
  EXPECT_FALSE(config->yarn.has_value());
  EXPECT_THAT(config->eos_token_ids, ::testing::ElementsAre(1));
}

TEST(ModelConfigTest, ReadsTheShippedDemoModelsConfig) {
  const Result<ModelConfig> config = parse_model_config(
      test::read_file(KVARN_SOURCE_DIR "/assets/demo-model/config.json"), "config.json");
  ASSERT_TRUE(config.is_ok()) << config.status().message();
  EXPECT_EQ(config->head_dim, 128);
}

TEST(ModelConfigTest, ReadsRopeParametersOfNewerFiles) {
  json config = good();
  config.erase("rope_theta");
  config.erase("rope_scaling");
  config["rope_parameters"] = {{"rope_type", "default"}, {"rope_theta", 5e5}};
  const Result<ModelConfig> result = parse(config);
  ASSERT_TRUE(result.is_ok()) << result.status().message();
  EXPECT_EQ(result->rope_theta, 5e5);
}

TEST(ModelConfigTest, YarnReachesFactorTimesTheOriginalContext) {
  json config = good();
  config["rope_scaling"] = {
      {"rope_type", "yarn"}, {"factor", 4.0}, {"original_max_position_embeddings", 2048}};
  const Result<ModelConfig> result = parse(config);
  ASSERT_TRUE(result.is_ok()) << result.status().message();
  ASSERT_TRUE(result->yarn.has_value());
  EXPECT_EQ(result->yarn->factor, 4.0);
  EXPECT_EQ(result->yarn->original_max_position_embeddings, 2048);
  EXPECT_EQ(result->max_position_embeddings, 8192);
}

TEST(ModelConfigTest, YarnsOriginalContextDefaultsToMaxPositionEmbeddings) {
  json config = good();
  config["rope_scaling"] = {{"type", "yarn"}, {"factor", 2.0}};
  const Result<ModelConfig> result = parse(config);
  ASSERT_TRUE(result.is_ok()) << result.status().message();
  EXPECT_EQ(result->yarn->original_max_position_embeddings, 4096);
  EXPECT_EQ(result->max_position_embeddings, 8192);
}

TEST(ModelConfigTest, EveryMissingKeyIsNamed) {
  for (const char* key : {"architectures", "vocab_size", "hidden_size", "intermediate_size",
                          "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
                          "head_dim", "max_position_embeddings", "rms_norm_eps", "rope_theta"}) {
    json config = good();
    config.erase(key);
    EXPECT_THAT(error_of(config), HasSubstr(std::string("dir/config.json: \"") + key + "\""));
  }
}

TEST(ModelConfigTest, ValuesOutOfRangeAreNamedWithWhatIsAllowed) {
  for (const char* key :
       {"vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers",
        "num_attention_heads", "num_key_value_heads", "head_dim", "max_position_embeddings"}) {
    for (const json& bad :
         {json(0), json(-3), json("many"), json(1.5), json(1e30), json::array()}) {
      json config = good();
      config[key] = bad;
      EXPECT_THAT(error_of(config),
                  HasSubstr(std::string("\"") + key + "\" must be an integer from 1 to"))
          << bad;
    }
  }
  for (const char* key : {"rms_norm_eps", "rope_theta"}) {
    json config = good();
    config[key] = -1;
    EXPECT_THAT(error_of(config),
                HasSubstr(std::string("\"") + key + "\" must be a number above 0"));
  }
}

TEST(ModelConfigTest, AnUnknownArchitectureIsNamedWithTheKnownOnes) {
  json config = good();
  config["architectures"] = {"LlamaForCausalLM"};
  EXPECT_THAT(error_of(config), HasSubstr("LlamaForCausalLM"));
  EXPECT_THAT(error_of(config), HasSubstr("Qwen3ForCausalLM"));
}

TEST(ModelConfigTest, WhatWouldChangeTheResultIsRefused) {
  const std::vector<std::pair<json, std::string>> cases = {
      {{{"rope_scaling", {{"rope_type", "llama3"}, {"factor", 8}}}}, "rope_scaling.rope_type"},
      {{{"rope_scaling", {{"type", "dynamic"}, {"factor", 8}}}}, "rope_scaling.type"},
      {{{"rope_scaling", {{"rope_type", "yarn"}}}}, "rope_scaling.factor"},
      {{{"rope_scaling", {{"rope_type", "yarn"}, {"factor", 0.5}}}}, "rope_scaling.factor"},
      {{{"rope_scaling", {{"rope_type", "yarn"}, {"factor", 1e300}}}}, "rope_scaling.factor"},
      {{{"rope_scaling", {{"rope_type", "yarn"}, {"factor", 4}, {"mscale", 1}}}}, "mscale"},
      {{{"rope_scaling", {{"rope_type", "yarn"}, {"factor", 4}, {"truncate", false}}}}, "truncate"},
      {{{"rope_scaling", "yarn"}}, "rope_scaling"},
      {{{"attention_bias", true}}, "attention_bias"},
      {{{"use_sliding_window", true}}, "use_sliding_window"},
      {{{"layer_types", {"full_attention", "sliding_attention"}}}, "layer_types"},
      {{{"hidden_act", "gelu"}}, "hidden_act"},
      {{{"quantization_config", {{"quant_method", "fp8"}}}}, "quantization_config"},
      {{{"torch_dtype", "int8"}}, "torch_dtype"},
      {{{"tie_word_embeddings", "yes"}}, "tie_word_embeddings"},
      {{{"num_attention_heads", 5}}, "num_attention_heads"},
      {{{"head_dim", 100}}, "head_dim"},
      {{{"head_dim", 512}}, "head_dim"},
      {{{"eos_token_id", 512}}, "eos_token_id"},
      {{{"eos_token_id", {1, -1}}}, "eos_token_id"},
  };
  for (const auto& [patch, culprit] : cases) {
    json config = good();
    config.update(patch);
    EXPECT_THAT(error_of(config), HasSubstr("dir/config.json: \"")) << patch;
    EXPECT_THAT(error_of(config), HasSubstr(culprit)) << patch;
  }
}

TEST(ModelConfigTest, TextThatIsNoJsonObjectIsRefused) {
  for (const char* text : {"", "{", "[]", "null", "\xff\xfe", "{\"a\":}"}) {
    const Result<ModelConfig> result = parse_model_config(text, "c.json");
    ASSERT_FALSE(result.is_ok());
    EXPECT_THAT(result.status().message(), HasSubstr("c.json: not a JSON object"));
  }
}

TEST(ModelConfigTest, MutatedConfigsNeverCrash) {
  const std::string text = test::tiny_config_json({});
  std::mt19937_64 random(7);
  int accepted = 0;
  for (int round = 0; round < 20000; ++round) {
    std::string mutated = text;
    const int edits = 1 + static_cast<int>(random() % 4);
    for (int i = 0; i < edits; ++i) {
      const size_t at = random() % mutated.size();
      switch (random() % 3) {
        case 0:
          mutated[at] = static_cast<char>(random());
          break;
        case 1:
          mutated.erase(at, 1 + random() % 8);
          break;
        default:
          mutated.insert(at, 1, "0123456789-.eE\"{}[],"[random() % 20]);
      }
      if (mutated.empty()) mutated.push_back('x');
    }
    const Result<ModelConfig> result = parse_model_config(mutated, "fuzz");
    if (result.is_ok()) {
      ++accepted;
      EXPECT_GT(result->num_parameters(), 0);
      EXPECT_EQ(result->num_q_heads % result->num_kv_heads, 0);
    } else {
      EXPECT_THAT(result.status().message(), HasSubstr("fuzz"));
    }
  }
  EXPECT_GT(accepted, 100);  // else the mutations only ever hit the syntax
}

TEST(PublicShapeTest, ParameterCountsAreThoseOfThePublicModels) {
  const std::vector<std::pair<std::string, double>> billions = {
      {"qwen3-0.6b", 0.596}, {"qwen3-1.7b", 1.721}, {"qwen3-4b", 4.022},
      {"qwen3-8b", 8.191},   {"qwen3-14b", 14.768}, {"qwen3-32b", 32.762}};
  for (const auto& [name, count] : billions) {
    const Result<ModelConfig> config = public_shape(name);
    ASSERT_TRUE(config.is_ok()) << name;
    EXPECT_NEAR(static_cast<double>(config->num_parameters()) * 1e-9, count, 5e-4) << name;
    EXPECT_EQ(config->max_position_embeddings, 40960);
  }
}

TEST(PublicShapeTest, AnUnknownShapeListsTheKnownOnes) {
  const Result<ModelConfig> config = public_shape("qwen3-7b");
  ASSERT_FALSE(config.is_ok());
  EXPECT_THAT(config.status().message(), HasSubstr("qwen3-7b"));
  EXPECT_THAT(config.status().message(), HasSubstr("qwen3-0.6b, qwen3-1.7b"));
}

TEST(ReadModelConfigTest, AMissingFileIsNamedWithWhatADirectoryHolds) {
  const test::TempDir dir;
  const Result<ModelConfig> config =
      read_model_config({.path = dir.path() / "none", .format = {}, .shape = {}});
  ASSERT_FALSE(config.is_ok());
  EXPECT_THAT(config.status().message(), HasSubstr("none/config.json"));
  EXPECT_THAT(config.status().message(), HasSubstr("--model takes a directory"));
}

}  // namespace
}  // namespace kvarn
