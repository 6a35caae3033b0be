#include "models/safetensors.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cstring>
#include <random>

#include "tests/support/tiny_model.h"

namespace kvarn {
namespace {

using test::RawTensor;
using ::testing::AllOf;
using ::testing::HasSubstr;
namespace fs = std::filesystem;

// Two small tensors: a = 6 bf16 (12 bytes), b = 2 f32 (8 bytes).
std::vector<RawTensor> two_tensors() {
  return {{"a", "BF16", {2, 3}, std::string(12, '\1')}, {"b", "F32", {2}, std::string(8, '\2')}};
}

class SafetensorsTest : public ::testing::Test {
 protected:
  fs::path path(const std::string& name = "model.safetensors") const { return dir_.path() / name; }
  std::string error_of_file(const std::string& bytes) const {
    test::write_file(path(), bytes);
    const Result<Safetensors> result = Safetensors::open_file(path());
    return result.is_ok() ? "no error" : result.status().message();
  }
  std::string error_of_header(const std::string& header) const {
    return error_of_file(test::safetensors_bytes(header, std::string(20, '\0')));
  }
  std::string error_of_directory() const {
    const Result<Safetensors> result = Safetensors::open_directory(dir_.path());
    return result.is_ok() ? "no error" : result.status().message();
  }
  void write_index(const std::string& map) const {
    test::write_file(path("model.safetensors.index.json"), R"({"weight_map":)" + map + "}");
  }
  test::TempDir dir_;
};

TEST_F(SafetensorsTest, TensorsAreReadInPlace) {
  test::write_file(path(), test::safetensors_bytes(two_tensors()));
  const Result<Safetensors> set = Safetensors::open_file(path());
  ASSERT_TRUE(set.is_ok()) << set.status().message();
  const SafetensorsEntry* b = set->find("b");
  ASSERT_NE(b, nullptr);
  EXPECT_EQ(b->dtype, "F32");
  EXPECT_EQ(b->shape, std::vector<int64_t>{2});
  ASSERT_EQ(b->bytes, 8u);
  EXPECT_EQ(std::memcmp(b->data, std::string(8, '\2').data(), 8), 0);
  EXPECT_EQ(*b->file, path().string());
  EXPECT_EQ(set->find("c"), nullptr);
  EXPECT_EQ(set->mapped_bytes(), fs::file_size(path()));
}

TEST_F(SafetensorsTest, EveryTruncationIsAnError) {
  const std::string whole = test::safetensors_bytes(two_tensors());
  for (size_t size = 0; size < whole.size(); ++size) {
    EXPECT_THAT(error_of_file(whole.substr(0, size)),
                AllOf(HasSubstr("model.safetensors"), HasSubstr("download the file again")))
        << size;
  }
  EXPECT_THAT(error_of_file(whole.substr(0, whole.size() - 1)),
              AllOf(HasSubstr("tensor b"), HasSubstr("truncated")));
}

TEST_F(SafetensorsTest, TrailingBytesAreAnError) {
  EXPECT_THAT(error_of_file(test::safetensors_bytes(two_tensors()) + "x"),
              HasSubstr("1 bytes after the last tensor"));
}

TEST_F(SafetensorsTest, AbsurdHeaderLengthsAreErrors) {
  std::string file = test::safetensors_bytes(two_tensors());
  for (const uint64_t length : {uint64_t{200'000'000}, ~uint64_t{0}, uint64_t{1} << 63}) {
    std::memcpy(file.data(), &length, sizeof(length));
    EXPECT_THAT(error_of_file(file), HasSubstr("not a safetensors file"));
  }
}

TEST_F(SafetensorsTest, HeadersThatAreNoJsonObjectAreErrors) {
  for (const char* header : {"", "[]", "{", "{\"a\"", "nul", "\xff\xff{}"}) {
    EXPECT_THAT(error_of_header(header), HasSubstr("not a JSON object"));
  }
  std::string deep = "{\"__metadata__\":";
  for (int i = 0; i < 100000; ++i) deep += "[";
  EXPECT_THAT(error_of_header(deep), HasSubstr("not a JSON object"));
}

TEST_F(SafetensorsTest, EachBadEntryNamesTheTensorAndTheFault) {
  const std::vector<std::pair<std::string, std::string>> cases = {
      {R"({"t":{}})", "lacks dtype, shape or data_offsets"},
      {R"({"t":7})", "lacks dtype"},
      {R"({"t":{"dtype":"BF17","shape":[10],"data_offsets":[0,20]}})", "unknown dtype \"BF17\""},
      {R"({"t":{"dtype":16,"shape":[10],"data_offsets":[0,20]}})", "unknown dtype 16"},
      {R"({"t":{"dtype":"BF16","shape":10,"data_offsets":[0,20]}})", "shape must be"},
      {R"({"t":{"dtype":"BF16","shape":[-10],"data_offsets":[0,20]}})", "shape must hold sizes"},
      {R"({"t":{"dtype":"BF16","shape":[2.5],"data_offsets":[0,20]}})", "shape must hold sizes"},
      {R"({"t":{"dtype":"BF16","shape":[10],"data_offsets":[0]}})", "data_offsets must be"},
      {R"({"t":{"dtype":"BF16","shape":[10],"data_offsets":[20,0]}})", "data_offsets must be"},
      {R"({"t":{"dtype":"BF16","shape":[10],"data_offsets":[-20,0]}})", "data_offsets must be"},
      {R"({"t":{"dtype":"BF16","shape":[11],"data_offsets":[0,22]}})", "truncated"},
      {R"({"t":{"dtype":"BF16","shape":[10],"data_offsets":[0,18446744073709551615]}})",
       "truncated"},
      {R"({"t":{"dtype":"BF16","shape":[9],"data_offsets":[0,20]}})", "needs 18 bytes"},
      {R"({"t":{"dtype":"F4","shape":[3],"data_offsets":[0,2]}})", "needs too many bytes"},
      {R"({"t":{"dtype":"BF16","shape":[4294967296,4294967296,2],"data_offsets":[0,20]}})",
       "needs too many bytes"},
  };
  for (const auto& [header, fault] : cases) {
    EXPECT_THAT(error_of_header(header),
                AllOf(HasSubstr("model.safetensors: tensor t: "), HasSubstr(fault)))
        << header;
  }
}

TEST_F(SafetensorsTest, OverlappingAndLooseTensorsAreErrors) {
  EXPECT_THAT(error_of_header(R"({"s":{"dtype":"U8","shape":[12],"data_offsets":[0,12]},
                                  "t":{"dtype":"U8","shape":[10],"data_offsets":[10,20]}})"),
              HasSubstr("tensors s and t overlap"));
  EXPECT_THAT(error_of_header(R"({"s":{"dtype":"U8","shape":[8],"data_offsets":[0,8]},
                                  "t":{"dtype":"U8","shape":[10],"data_offsets":[10,20]}})"),
              HasSubstr("2 unused bytes before tensor t"));
  EXPECT_THAT(error_of_header(R"({"s":{"dtype":"U8","shape":[20],"data_offsets":[0,20]},
                                  "t":{"dtype":"U8","shape":[20],"data_offsets":[0,20]}})"),
              HasSubstr("tensors s and t overlap"));
}

TEST_F(SafetensorsTest, ATensorNamedTwiceIsAnError) {
  EXPECT_THAT(error_of_header(R"({"t":{"dtype":"U8","shape":[20],"data_offsets":[0,20]},
                                  "t":{"dtype":"U8","shape":[20],"data_offsets":[0,20]}})"),
              HasSubstr("tensor t is in the header twice"));
}

TEST_F(SafetensorsTest, HostileNamesStayOnOneShortLine) {
  const std::string name = "x\\n\\u0007" + std::string(5000, 'y');
  const std::string error = error_of_header("{\"" + name + "\":{}}");
  EXPECT_LT(error.size(), 600u);
  EXPECT_EQ(error.find('\n'), std::string::npos);
}

TEST_F(SafetensorsTest, AnIndexJoinsItsFiles) {
  test::write_file(path("one.safetensors"), test::safetensors_bytes({two_tensors()[0]}));
  test::write_file(path("two.safetensors"), test::safetensors_bytes({two_tensors()[1]}));
  write_index(R"({"a":"one.safetensors","b":"two.safetensors"})");
  const Result<Safetensors> set = Safetensors::open_directory(dir_.path());
  ASSERT_TRUE(set.is_ok()) << set.status().message();
  EXPECT_EQ(set->entries().size(), 2u);
  EXPECT_EQ(*set->find("b")->file, path("two.safetensors").string());
}

TEST_F(SafetensorsTest, AnIndexMayNotPointOutsideItsDirectory) {
  for (const char* file :
       {"../secret", "/etc/passwd", "sub/x.safetensors", "..", ".", "", "a\\\\b"}) {
    write_index(std::string(R"({"a":")") + file + "\"}");
    EXPECT_THAT(error_of_directory(),
                AllOf(HasSubstr("model.safetensors.index.json"), HasSubstr("tensor a points to"),
                      HasSubstr("must lie beside the index")))
        << file;
  }
}

TEST_F(SafetensorsTest, AnIndexThatDisagreesWithItsFilesNamesTensorAndFile) {
  test::write_file(path("one.safetensors"), test::safetensors_bytes(two_tensors()));
  write_index(R"({"a":"one.safetensors"})");
  EXPECT_THAT(error_of_directory(), AllOf(HasSubstr("tensor b of"), HasSubstr("not in the index")));
  write_index(R"({"a":"one.safetensors","b":"one.safetensors","c":"one.safetensors"})");
  EXPECT_THAT(error_of_directory(), AllOf(HasSubstr("tensor c"), HasSubstr("is in no file")));
  write_index(R"({"a":"one.safetensors","b":"two.safetensors"})");
  EXPECT_THAT(error_of_directory(), AllOf(HasSubstr("two.safetensors"), HasSubstr("missing")));
  test::write_file(path("two.safetensors"), test::safetensors_bytes({two_tensors()[1]}));
  EXPECT_THAT(error_of_directory(),
              AllOf(HasSubstr("tensor b is in both"), HasSubstr("one.safetensors"),
                    HasSubstr("two.safetensors")));
  test::write_file(path("one.safetensors"), test::safetensors_bytes({two_tensors()[1]}));
  test::write_file(path("two.safetensors"), test::safetensors_bytes({two_tensors()[0]}));
  EXPECT_THAT(error_of_directory(),
              AllOf(HasSubstr("tensor a should be in"), HasSubstr("one.safetensors but is in")));
}

TEST_F(SafetensorsTest, BrokenIndexesAreErrors) {
  for (const char* map : {"7", "{}", R"({"a":1})", R"({"a":"x","a":"y"})", "{"}) {
    write_index(map);
    EXPECT_THAT(error_of_directory(), HasSubstr("model.safetensors.index.json")) << map;
  }
}

TEST_F(SafetensorsTest, ADirectoryWithoutWeightsSaysWhatItNeeds) {
  EXPECT_THAT(error_of_directory(), HasSubstr("holds no *.safetensors"));
  test::write_file(path("x.safetensors"), test::safetensors_bytes(two_tensors()));
  EXPECT_EQ(error_of_directory(), "no error");  // the only file: no doubt which one
  test::write_file(path("y.safetensors"), test::safetensors_bytes(two_tensors()));
  EXPECT_THAT(error_of_directory(),
              AllOf(HasSubstr("2 *.safetensors files"), HasSubstr("download the index")));
  const Result<Safetensors> none = Safetensors::open_directory(dir_.path() / "none");
  ASSERT_FALSE(none.is_ok());
  EXPECT_THAT(none.status().message(), HasSubstr("no such directory"));
}

TEST_F(SafetensorsTest, AnythingButARegularFileIsRefused) {
  fs::create_directory(path());
  const Result<Safetensors> result = Safetensors::open_file(path());
  ASSERT_FALSE(result.is_ok());
  EXPECT_THAT(result.status().message(), HasSubstr("not a regular file"));
}

// Whatever the bytes say, an accepted file's tensors lie inside the mapping (ASan watches the
// reads) and a refused one names itself.
TEST_F(SafetensorsTest, MutatedFilesAreReadSafelyOrRefused) {
  const std::string whole = test::safetensors_bytes(two_tensors());
  std::mt19937_64 random(11);
  int accepted = 0;
  unsigned sum = 0;
  for (int round = 0; round < 5000; ++round) {
    std::string mutated = whole;
    const int edits = 1 + static_cast<int>(random() % 3);
    for (int i = 0; i < edits; ++i) {
      const size_t at = random() % mutated.size();
      switch (random() % 4) {
        case 0:
          mutated[at] = static_cast<char>(random());
          break;
        case 1:
          mutated[at] = "0123456789[]{},:\""[random() % 17];
          break;
        case 2:
          mutated.erase(at, 1 + random() % 4);
          break;
        default:
          mutated.insert(at, 1, static_cast<char>('0' + random() % 10));
      }
    }
    test::write_file(path(), mutated);
    const Result<Safetensors> result = Safetensors::open_file(path());
    if (!result.is_ok()) {
      EXPECT_THAT(result.status().message(), HasSubstr("model.safetensors"));
      continue;
    }
    ++accepted;
    for (const auto& [name, entry] : result->entries()) {
      for (size_t i = 0; i < entry.bytes; ++i) sum += static_cast<unsigned>(entry.data[i]);
    }
  }
  EXPECT_GT(accepted, 100);  // mutated names and values: still well-formed files
  EXPECT_GT(sum, 0u);
}

}  // namespace
}  // namespace kvarn
