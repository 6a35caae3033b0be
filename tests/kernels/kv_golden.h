// Reads the golden vectors in tests/data/kvarn: raw little-endian arrays, described by
// manifest.json and checked by tools/oracles/kvarn_golden.py.
#pragma once

#include <gtest/gtest.h>

#include <fstream>
#include <string>
#include <vector>

namespace kvarn::test {

// The whole file as `count` elements of T; a missing or short file fails the test by name.
template <typename T>
std::vector<T> read_golden(const std::string& name, size_t count) {
  const std::string path = std::string(KVARN_SOURCE_DIR) + "/tests/data/kvarn/" + name + ".bin";
  std::vector<T> values(count);
  std::ifstream file(path, std::ios::binary);
  file.read(reinterpret_cast<char*>(values.data()),
            static_cast<std::streamsize>(count * sizeof(T)));
  EXPECT_TRUE(file && file.peek() == std::ifstream::traits_type::eof())
      << path << " must hold exactly " << count * sizeof(T) << " bytes";
  return values;
}

}  // namespace kvarn::test
