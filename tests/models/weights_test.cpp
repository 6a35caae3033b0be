#include "models/weights.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cmath>
#include <cstring>

#include "models/model.h"
#include "tests/support/tiny_model.h"

namespace kvarn {
namespace {

using test::RawTensor;
using ::testing::AllOf;
using ::testing::HasSubstr;

std::unique_ptr<Backend> backend() { return make_cpu_backend({.threads = 2}); }

TEST(FillNormalTest, HasTheAskedMeanAndDeviation) {
  std::vector<bf16> values(1 << 20);
  fill_normal_bf16(values.data(), static_cast<int64_t>(values.size()), 0.02f, /*seed=*/3, 2);
  double sum = 0, squares = 0;
  int beyond_two = 0;
  for (const bf16 value : values) {
    const double x = to_float(value) / 0.02;
    sum += x;
    squares += x * x;
    beyond_two += std::abs(x) > 2;
  }
  const auto count = static_cast<double>(values.size());
  // Standard errors are 1e-3 (mean), 7e-4 (deviation), 2e-4 (share); bf16 rounds by up to 2^-9.
  EXPECT_NEAR(sum / count, 0.0, 5e-3);
  EXPECT_NEAR(std::sqrt(squares / count), 1.0, 5e-3);
  EXPECT_NEAR(beyond_two / count, 0.0455, 2e-3);
}

TEST(FillNormalTest, ValuesDependOnSeedAndIndexNotOnThreads) {
  std::vector<bf16> one(300001), three(300001), other(300001);
  fill_normal_bf16(one.data(), 300001, 0.02f, 5, 1);
  fill_normal_bf16(three.data(), 300001, 0.02f, 5, 3);
  fill_normal_bf16(other.data(), 300001, 0.02f, 6, 1);
  EXPECT_EQ(std::memcmp(one.data(), three.data(), one.size() * sizeof(bf16)), 0);
  EXPECT_NE(std::memcmp(one.data(), other.data(), one.size() * sizeof(bf16)), 0);
}

class LoadModelTest : public ::testing::Test {
 protected:
  LoadModelTest() {
    test::write_file(dir_.path() / "config.json", test::tiny_config_json(options_));
    config_ = parse_model_config(test::tiny_config_json(options_), "config.json").value();
    tensors_ = test::tiny_tensors(config_, 1, DType::kBF16);
  }
  RawTensor& tensor(const std::string& name) {
    for (RawTensor& t : tensors_) {
      if (t.name == name) return t;
    }
    throw std::runtime_error(name);
  }
  std::string load_error() {
    test::write_file(dir_.path() / "model.safetensors", test::safetensors_bytes(tensors_));
    const Result<std::unique_ptr<Model>> model =
        load_model({.path = dir_.path(), .format = LoadFormat::kAuto, .shape = {}}, *backend_);
    return model.is_ok() ? "no error" : model.status().message();
  }

  test::TempDir dir_;
  test::TinyModelOptions options_;
  ModelConfig config_;
  std::vector<RawTensor> tensors_;
  std::unique_ptr<Backend> backend_ = backend();
};

TEST_F(LoadModelTest, AGoodDirectoryLoadsWithoutCopyingAWeight) {
  EXPECT_EQ(load_error(), "no error");
  const auto store = WeightStore::from_directory(dir_.path(), *backend_).value();
  const Safetensors files = Safetensors::open_directory(dir_.path()).value();
  const Tensor weight = store->get("model.norm.weight", {64}).value();
  // The store maps the file itself: equal bytes at a page-aligned distance from its own mapping.
  EXPECT_EQ(std::memcmp(weight.raw(), files.find("model.norm.weight")->data, weight.bytes()), 0);
  const auto in_page = [](const void* p) { return reinterpret_cast<uintptr_t>(p) % 4096; };
  EXPECT_EQ(in_page(weight.raw()), in_page(files.find("model.norm.weight")->data));
}

TEST_F(LoadModelTest, WeightBytesAreTheParametersAndTheRopeTables) {
  test::write_file(dir_.path() / "model.safetensors", test::safetensors_bytes(tensors_));
  const auto model =
      load_model(
          {.path = dir_.path(), .format = LoadFormat::kAuto, .shape = {}, .max_model_len = 100},
          *backend_)
          .value();
  const size_t rope = 2 * 100 * 64 * sizeof(float);
  EXPECT_EQ(model->weight_bytes(), static_cast<size_t>(config_.num_parameters()) * 2 + rope);
}

TEST_F(LoadModelTest, EveryMissingTensorIsNamed) {
  const std::vector<RawTensor> whole = tensors_;
  for (size_t i = 0; i < whole.size(); ++i) {
    tensors_ = whole;
    tensors_.erase(tensors_.begin() + static_cast<std::ptrdiff_t>(i));
    EXPECT_THAT(load_error(), AllOf(HasSubstr("model.safetensors: tensor " + whole[i].name),
                                    HasSubstr("missing"), HasSubstr("download")));
  }
}

TEST_F(LoadModelTest, ARenamedTensorIsNamed) {
  tensor("model.layers.1.mlp.up_proj.weight").name = "model.layers.1.mlp.w3.weight";
  EXPECT_THAT(load_error(),
              AllOf(HasSubstr("model.layers.1.mlp.up_proj.weight"), HasSubstr("missing")));
}

TEST_F(LoadModelTest, AnUnknownTensorIsNamedWithItsShape) {
  tensors_.push_back(
      {"model.layers.0.self_attn.q_proj.bias", "BF16", {512}, std::string(1024, '\0')});
  EXPECT_THAT(load_error(), AllOf(HasSubstr("model.layers.0.self_attn.q_proj.bias [512]"),
                                  HasSubstr("not part of this architecture")));
}

TEST_F(LoadModelTest, ALayerTooManyIsFound) {
  tensors_.push_back(
      {"model.layers.2.input_layernorm.weight", "BF16", {64}, std::string(128, '\0')});
  EXPECT_THAT(load_error(), HasSubstr("model.layers.2.input_layernorm.weight"));
}

TEST_F(LoadModelTest, ATiedModelMayCarryItsHeadAgain) {
  tensors_.push_back({"lm_head.weight", "BF16", {512, 64}, std::string(512 * 64 * 2, '\0')});
  EXPECT_EQ(load_error(), "no error");
}

TEST_F(LoadModelTest, AWrongShapeIsNamedWithBoth) {
  RawTensor& t = tensor("model.layers.0.self_attn.k_proj.weight");
  t.shape = {128, 128};
  EXPECT_THAT(load_error(),
              AllOf(HasSubstr("model.layers.0.self_attn.k_proj.weight"), HasSubstr("[128, 128]"),
                    HasSubstr("[256, 64]"), HasSubstr("same model")));
}

TEST_F(LoadModelTest, AWrongDtypeIsNamedWithWhatIsRead) {
  RawTensor& t = tensor("model.layers.0.mlp.down_proj.weight");
  t.dtype = "I16";
  EXPECT_THAT(load_error(), AllOf(HasSubstr("model.layers.0.mlp.down_proj.weight"),
                                  HasSubstr("dtype I16"), HasSubstr("BF16, F16 and F32")));
}

TEST_F(LoadModelTest, MisalignedTensorsAreCopiedAndStillRight) {
  // A header of odd length puts every tensor at an odd address.
  const std::string file = test::safetensors_bytes(tensors_);
  uint64_t length = 0;
  std::memcpy(&length, file.data(), sizeof(length));
  const std::string header = file.substr(8, length);
  test::write_file(dir_.path() / "model.safetensors",
                   test::safetensors_bytes(header + " ", file.substr(8 + length)));
  const auto store = WeightStore::from_directory(dir_.path(), *backend_).value();
  const Tensor weight = store->get("model.norm.weight", {64}).value();
  EXPECT_EQ(reinterpret_cast<uintptr_t>(weight.raw()) % 2, 0u);
  EXPECT_EQ(std::memcmp(weight.raw(), tensor("model.norm.weight").bytes.data(), weight.bytes()), 0);
  EXPECT_EQ(store->bytes(), weight.bytes());
}

TEST_F(LoadModelTest, ALongerContextThanTheModelsIsRefused) {
  const auto model = load_model(
      {.path = dir_.path(), .format = LoadFormat::kAuto, .shape = {}, .max_model_len = 5000},
      *backend_);
  ASSERT_FALSE(model.is_ok());
  EXPECT_THAT(model.status().message(),
              AllOf(HasSubstr("--max-model-len 5000"), HasSubstr("4096"), HasSubstr("lower it")));
}

TEST_F(LoadModelTest, AShapeWithoutDummyWeightsIsRefused) {
  const auto model =
      load_model({.path = {}, .format = LoadFormat::kAuto, .shape = "qwen3-0.6b"}, *backend_);
  ASSERT_FALSE(model.is_ok());
  EXPECT_THAT(model.status().message(), HasSubstr("--load-format dummy"));
}

TEST_F(LoadModelTest, NoModelAtAllSaysHowToNameOne) {
  const auto model = load_model({}, *backend_);
  ASSERT_FALSE(model.is_ok());
  EXPECT_THAT(model.status().message(), HasSubstr("--model DIRECTORY"));
}

}  // namespace
}  // namespace kvarn
