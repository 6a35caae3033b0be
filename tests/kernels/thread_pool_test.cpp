#include "kernels/thread_pool.h"

#include <gtest/gtest.h>

#include <atomic>
#include <chrono>
#include <numeric>
#include <thread>
#include <vector>

namespace kvarn {
namespace {

TEST(ThreadPoolTest, EveryItemIsDoneExactlyOnce) {
  for (const int threads : {1, 2, 3, 8}) {
    ThreadPool pool(threads);
    EXPECT_EQ(pool.size(), threads);
    for (const int64_t n : {0, 1, 2, 7, 64, 1000, 12345}) {
      for (const int64_t grain : {1, 3, 100, 100000}) {
        std::vector<std::atomic<int>> done(static_cast<size_t>(n));
        pool.parallel_for(n, grain, [&](int64_t begin, int64_t end, int thread) {
          EXPECT_GE(thread, 0);
          EXPECT_LT(thread, threads);
          EXPECT_LT(begin, end);
          for (int64_t i = begin; i < end; ++i) done[static_cast<size_t>(i)]++;
        });
        for (const auto& count : done) ASSERT_EQ(count.load(), 1) << n << " by " << grain;
      }
    }
  }
}

TEST(ThreadPoolTest, RangesHaveAtLeastGrainItems) {
  ThreadPool pool(4);
  std::atomic<int64_t> smallest{1 << 20};
  std::atomic<int> ranges{0};
  pool.parallel_for(1000, 64, [&](int64_t begin, int64_t end, int) {
    ++ranges;
    int64_t seen = smallest.load();
    while (end - begin < seen && !smallest.compare_exchange_weak(seen, end - begin)) {
    }
  });
  EXPECT_GE(smallest.load(), 64);
  EXPECT_GT(ranges.load(), 1);
}

TEST(ThreadPoolTest, SmallWorkRunsOnTheCaller) {
  ThreadPool pool(4);
  const std::thread::id caller = std::this_thread::get_id();
  pool.parallel_for(10, 10, [&](int64_t begin, int64_t end, int thread) {
    EXPECT_EQ(std::this_thread::get_id(), caller);
    EXPECT_EQ(thread, 0);
    EXPECT_EQ(begin, 0);
    EXPECT_EQ(end, 10);
  });
}

TEST(ThreadPoolTest, WritesOfTheWorkersAreSeenAfterTheCall) {
  // Plain memory on purpose: a data race here is what the thread sanitizer would report.
  ThreadPool pool(3);
  std::vector<int64_t> values(5000);
  int64_t expected = 0;
  for (int64_t round = 1; round <= 500; ++round) {
    pool.parallel_for(5000, 16, [&](int64_t begin, int64_t end, int) {
      for (int64_t i = begin; i < end; ++i) values[static_cast<size_t>(i)] += i * round;
    });
    expected += 4999 * 5000 / 2 * round;
    ASSERT_EQ(std::accumulate(values.begin(), values.end(), int64_t{0}), expected);
  }
}

TEST(ThreadPoolTest, SleepingWorkersWakeUp) {
  ThreadPool pool(3);
  for (int round = 0; round < 5; ++round) {
    std::this_thread::sleep_for(std::chrono::milliseconds(20));  // beyond the spinning
    std::atomic<int> done{0};
    pool.parallel_for(
        12, 1, [&](int64_t begin, int64_t end, int) { done += static_cast<int>(end - begin); });
    ASSERT_EQ(done.load(), 12);
  }
}

TEST(ThreadPoolTest, SeveralThreadsTakePart) {
  ThreadPool pool(2);
  std::atomic<int> inside{0};
  // Each range waits for the other, so one thread alone would never finish the two.
  pool.parallel_for(2, 1, [&](int64_t, int64_t, int) {
    ++inside;
    const auto give_up = std::chrono::steady_clock::now() + std::chrono::seconds(20);
    while (inside.load() < 2 && std::chrono::steady_clock::now() < give_up) {
      std::this_thread::yield();
    }
  });
  EXPECT_EQ(inside.load(), 2);
}

TEST(ThreadPoolTest, PoolsComeAndGo) {
  for (int i = 0; i < 50; ++i) {
    ThreadPool pool(1 + i % 5);
    std::atomic<int> done{0};
    if (i % 2 == 0) {
      pool.parallel_for(
          100, 1, [&](int64_t begin, int64_t end, int) { done += static_cast<int>(end - begin); });
      ASSERT_EQ(done.load(), 100);
    }
  }
}

}  // namespace
}  // namespace kvarn
