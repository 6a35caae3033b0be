#include "models/weights.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cmath>
#include <cstring>

#include "kernels/random_fill.h"
#include "models/model.h"
#include "tests/support/device_like_backend.h"
#include "tests/support/tiny_model.h"

namespace kvarn {
namespace {

using test::RawTensor;
using ::testing::AllOf;
using ::testing::HasSubstr;

std::unique_ptr<Backend> backend() { return make_cpu_backend({.threads = 2}); }

std::vector<bf16> normal_values(int64_t count, uint64_t seed, int threads) {
  std::vector<bf16> values(static_cast<size_t>(count));
  make_cpu_backend({.threads = threads})
      ->fill_normal(Tensor::of(values.data(), {count}), 0.02f, seed);
  return values;
}

TEST(FillNormalTest, HasTheAskedMeanAndDeviation) {
  const std::vector<bf16> values = normal_values(1 << 20, /*seed=*/3, /*threads=*/2);
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
  const std::vector<bf16> one = normal_values(300001, 5, 1), three = normal_values(300001, 5, 3),
                          other = normal_values(300001, 6, 1);
  EXPECT_EQ(std::memcmp(one.data(), three.data(), one.size() * sizeof(bf16)), 0);
  EXPECT_NE(std::memcmp(one.data(), other.data(), one.size() * sizeof(bf16)), 0);
}

TEST(FillNormalTest, TheIndexOfEveryElementIsTheOneOfTheFill) {
  const std::vector<bf16> values = normal_values(1001, 9, 2), quantiles = normal_quantiles(0.02f);
  for (int64_t i = 0; i < 1001; ++i) {
    EXPECT_EQ(to_float(values[static_cast<size_t>(i)]), to_float(quantiles[quantile_index(9, i)]));
  }
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

// The same names in a file of another dtype; every value is one of bf16.
class DeviceWeightsTest : public ::testing::TestWithParam<DType> {
 protected:
  DeviceWeightsTest() {
    options_.dtype = GetParam();
    test::write_tiny_model(dir_.path(), options_);
    const ModelConfig config =
        parse_model_config(test::tiny_config_json(options_), "config.json").value();
    for (const RawTensor& t : test::tiny_tensors(config, 1, DType::kBF16)) expected_.push_back(t);
  }
  const std::string& expected(const std::string& name) const {
    for (const RawTensor& t : expected_) {
      if (t.name == name) return t.bytes;
    }
    throw std::runtime_error(name);
  }
  test::TinyModelOptions options_;
  test::TempDir dir_;
  std::vector<RawTensor> expected_;
  test::DeviceLikeBackend backend_;
};

TEST_P(DeviceWeightsTest, StackedMatricesAreOneMatrixInBf16) {
  const auto store = WeightStore::from_directory(dir_.path(), backend_).value();
  const std::string prefix = "model.layers.1.self_attn.";
  const std::vector<std::string> names = {prefix + "q_proj.weight", prefix + "k_proj.weight",
                                          prefix + "v_proj.weight"};
  const LinearWeight weight = store->get_stacked(names, {512, 256, 256}, 64).value();
  ASSERT_EQ(weight.num_parts, 3);
  EXPECT_EQ(weight.out_features(), 1024);
  const auto* at = static_cast<const std::byte*>(weight.parts[0].raw());
  for (size_t i = 0; i < 3; ++i) {
    const Tensor& part = weight.parts[i];
    EXPECT_EQ(part.raw(), at);
    EXPECT_EQ(part.dtype(), DType::kBF16);
    ASSERT_EQ(part.bytes(), expected(names[i]).size());
    std::vector<bf16> values(static_cast<size_t>(part.size()));
    std::memcpy(values.data(), expected(names[i]).data(), part.bytes());
    for (size_t k = 0; k < values.size(); ++k) {
      // fp16 holds values below 2^-14 to 2^-25 only (tiny_model.cpp), the others hold all.
      const float slack = GetParam() == DType::kF16 ? 0x1p-24f : 0.f;
      ASSERT_NEAR(to_float(part.data<bf16>()[k]), to_float(values[k]), slack) << names[i];
    }
    at += part.bytes();
  }
  EXPECT_EQ(store->bytes(), 1024u * 64 * 2);
}

TEST_P(DeviceWeightsTest, VectorsKeepTheirValuesInBf16OrF32) {
  const auto store = WeightStore::from_directory(dir_.path(), backend_).value();
  const Tensor gains = store->get("model.norm.weight", {64}).value();
  EXPECT_EQ(gains.dtype(), GetParam() == DType::kBF16 ? DType::kBF16 : DType::kF32);
  const std::string& bytes = expected("model.norm.weight");
  for (int i = 0; i < 64; ++i) {
    bf16 value;
    std::memcpy(&value, bytes.data() + 2 * i, 2);
    const float stored =
        gains.dtype() == DType::kBF16 ? to_float(gains.data<bf16>()[i]) : gains.data<float>()[i];
    EXPECT_EQ(stored, to_float(value));
  }
}

TEST_P(DeviceWeightsTest, NothingPointsIntoTheFile) {
  auto model =
      load_model({.path = dir_.path(), .format = LoadFormat::kAuto, .shape = {}}, backend_).value();
  const size_t used = backend_.device_memory()->total_bytes - backend_.device_memory()->free_bytes;
  EXPECT_EQ(used, model->weight_bytes());
  model.reset();
  EXPECT_EQ(backend_.device_memory()->free_bytes, backend_.device_memory()->total_bytes);
}

INSTANTIATE_TEST_SUITE_P(Dtypes, DeviceWeightsTest,
                         ::testing::Values(DType::kBF16, DType::kF16, DType::kF32),
                         [](const auto& dtype) { return dtype_name(dtype.param); });

TEST(DeviceLoadTest, RandomWeightsAreThoseOfTheCpuAndStacked) {
  test::DeviceLikeBackend device;
  const auto cpu = backend();
  const auto there = WeightStore::random(7, device), here = WeightStore::random(7, *cpu);
  const LinearWeight a = there->get_stacked({"gate", "up"}, {96, 96}, 64).value();
  const LinearWeight b = here->get_stacked({"gate", "up"}, {96, 96}, 64).value();
  EXPECT_EQ(a.parts[1].raw(), static_cast<std::byte*>(a.parts[0].raw()) + a.parts[0].bytes());
  for (size_t i = 0; i < 2; ++i) {
    EXPECT_EQ(std::memcmp(a.parts[i].raw(), b.parts[i].raw(), a.parts[i].bytes()), 0);
  }
}

TEST(DeviceLoadTest, AHeadSizeWithoutKernelsIsRefusedBeforeWeightsAreRead) {
  test::TinyModelOptions options;
  options.head_dim = 64;
  const test::TempDir dir;
  test::write_file(dir.path() / "config.json", test::tiny_config_json(options));  // no weights
  test::DeviceLikeBackend device;
  const auto model =
      load_model({.path = dir.path(), .format = LoadFormat::kAuto, .shape = {}}, device);
  ASSERT_FALSE(model.is_ok());
  EXPECT_THAT(model.status().message(),
              AllOf(HasSubstr("head_dim 64"), HasSubstr("need 128"), HasSubstr("--device cpu")));
}

TEST(DeviceLoadTest, WeightsThatCannotFitAreRefusedWithBothNumbers) {
  test::DeviceLikeBackend device;  // of 1 GiB
  const auto model =
      load_model({.path = {}, .format = LoadFormat::kDummy, .shape = "qwen3-0.6b"}, device);
  ASSERT_FALSE(model.is_ok());
  EXPECT_EQ(model.status().code(), StatusCode::kResourceExhausted);
  EXPECT_THAT(model.status().message(), AllOf(HasSubstr("1.11 GiB"), HasSubstr("1.00 GiB free")));
  EXPECT_EQ(device.counts->allocations, 0);
}

TEST(DeviceLoadTest, WeightsThatTurnOutNotToFitAreAnErrorNotAnException) {
  test::TinyModelOptions options;
  const ModelConfig config =
      parse_model_config(test::tiny_config_json(options), "config.json").value();
  const test::TempDir dir;
  test::write_tiny_model(dir.path(), options);
  // Room for the parameters, not for the rotary tables beside them.
  test::DeviceLikeBackend device({.total_bytes = static_cast<size_t>(config.num_parameters()) * 2});
  const auto model =
      load_model({.path = dir.path(), .format = LoadFormat::kAuto, .shape = {}}, device);
  ASSERT_FALSE(model.is_ok());
  EXPECT_EQ(model.status().code(), StatusCode::kResourceExhausted);
  EXPECT_THAT(model.status().message(), HasSubstr("left of the GPU's"));
}

}  // namespace
}  // namespace kvarn
