#include "engine/host_memory.h"

#include <gtest/gtest.h>

#include "tests/support/tiny_model.h"

namespace kvarn {
namespace {

TEST(HostMemoryTest, ReadsMemAvailableInKib) {
  EXPECT_EQ(parse_mem_available("MemTotal:  100 kB\nMemAvailable:   2048 kB\nBuffers: 1 kB\n"),
            2048u * 1024);
  EXPECT_EQ(parse_mem_available("MemTotal: 100 kB\n"), std::nullopt);
  EXPECT_EQ(parse_mem_available("MemAvailable: many"), std::nullopt);
  EXPECT_EQ(parse_mem_available(""), std::nullopt);
}

TEST(HostMemoryTest, AControlGroupLeavesItsLimitMinusItsUsage) {
  const test::TempDir dir;
  EXPECT_EQ(cgroup_memory_left(dir.path()), std::nullopt);
  test::write_file(dir.path() / "memory.current", "300\n");
  test::write_file(dir.path() / "memory.max", "max\n");
  EXPECT_EQ(cgroup_memory_left(dir.path()), std::nullopt);
  test::write_file(dir.path() / "memory.max", "1000\n");
  EXPECT_EQ(cgroup_memory_left(dir.path()), 700u);
  test::write_file(dir.path() / "memory.max", "200\n");
  EXPECT_EQ(cgroup_memory_left(dir.path()), 0u);
}

TEST(HostMemoryTest, CachedFilePagesDoNotCountAsTaken) {
  const test::TempDir dir;
  test::write_file(dir.path() / "memory.current", "800\n");
  test::write_file(dir.path() / "memory.max", "1000\n");
  test::write_file(dir.path() / "memory.stat", "anon 200\ninactive_file 500\nactive_file 100\n");
  EXPECT_EQ(cgroup_memory_left(dir.path()), 700u);
}

TEST(HostMemoryTest, VersionOneFilesAndItsWayToSayUnlimitedAreKnown) {
  const test::TempDir dir;
  std::filesystem::create_directory(dir.path() / "memory");
  test::write_file(dir.path() / "memory" / "memory.usage_in_bytes", "400\n");
  test::write_file(dir.path() / "memory" / "memory.limit_in_bytes", "1000\n");
  EXPECT_EQ(cgroup_memory_left(dir.path()), 600u);
  test::write_file(dir.path() / "memory" / "memory.limit_in_bytes", "9223372036854771712\n");
  EXPECT_EQ(cgroup_memory_left(dir.path()), std::nullopt);
}

TEST(HostMemoryTest, ThisHostHasSomeMemoryLeft) { EXPECT_GT(available_host_memory(), 1u << 20); }

}  // namespace
}  // namespace kvarn
