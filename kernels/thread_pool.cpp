// Work is claimed in chunks from one atomic word, so a worker that the scheduler has put aside
// delays nobody: the caller takes the chunks it did not. A job is done when every chunk is, however
// few threads took part. Workers spin for some tens of microseconds (the gap between two ops of a
// step), then sleep.
#include "kernels/thread_pool.h"

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <mutex>
#include <thread>
#include <vector>

#include "kernels/core/check.h"

namespace kvarn {
namespace {

constexpr int kChunksPerThread = 4;  // evens out cores that run at different speeds
constexpr int kSpins = 4000;         // of ~10-40 ns each
constexpr int kYieldEvery = 64;      // an oversubscribed machine needs the core for someone else

inline void cpu_relax() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

// The claim word: job number (high 32 bits), chunks of the job (16), chunks claimed so far (16).
constexpr uint64_t make_word(uint32_t job, uint32_t chunks) {
  return uint64_t{job} << 32 | uint64_t{chunks} << 16;
}
constexpr uint32_t job_of(uint64_t word) { return static_cast<uint32_t>(word >> 32); }
constexpr uint32_t chunks_of(uint64_t word) { return static_cast<uint32_t>(word >> 16) & 0xffffu; }
constexpr uint32_t claimed_of(uint64_t word) { return static_cast<uint32_t>(word) & 0xffffu; }

}  // namespace

class ThreadPool::Impl {
 public:
  explicit Impl(int threads) : size_(threads) {
    workers_.reserve(static_cast<size_t>(threads - 1));
    for (int i = 1; i < threads; ++i) workers_.emplace_back([this, i] { work(i); });
  }

  ~Impl() {
    {
      const std::lock_guard lock(mutex_);
      stop_.store(true, std::memory_order_relaxed);
    }
    wake_.notify_all();
    for (std::thread& worker : workers_) worker.join();
  }

  int size() const { return size_; }

  void run(int64_t n, int64_t grain, Task task, void* ctx) {
    if (n <= 0) return;
    grain = std::max<int64_t>(grain, 1);
    const int64_t chunks = std::min<int64_t>(n / grain, int64_t{size_} * kChunksPerThread);
    if (size_ == 1 || chunks <= 1) {
      task(ctx, 0, n, 0);
      return;
    }
    // No chunk of the previous job is open, so no worker reads these fields.
    n_ = n;
    task_ = task;
    ctx_ = ctx;
    num_chunks_ = chunks;
    finished_.store(0, std::memory_order_relaxed);
    // Sequentially consistent, as is the worker's "sleepers up, then look": one sees the other.
    word_.store(make_word(++job_, static_cast<uint32_t>(chunks)), std::memory_order_seq_cst);
    if (sleepers_.load(std::memory_order_seq_cst) > 0) {
      { const std::lock_guard lock(mutex_); }  // a worker is either before its check or asleep
      wake_.notify_all();
    }
    take_chunks(0);
    for (int spins = 0; finished_.load(std::memory_order_acquire) != chunks; ++spins) {
      if (spins % kYieldEvery == kYieldEvery - 1) {
        std::this_thread::yield();
      } else {
        cpu_relax();
      }
    }
  }

 private:
  void take_chunks(int thread) {
    uint64_t word = word_.load(std::memory_order_acquire);
    while (claimed_of(word) < chunks_of(word)) {
      // Success means that this chunk is open, hence the job's fields are valid until it is closed.
      if (!word_.compare_exchange_weak(word, word + 1, std::memory_order_acq_rel,
                                       std::memory_order_acquire)) {
        continue;
      }
      const int64_t chunk = claimed_of(word);
      const int64_t begin = n_ * chunk / num_chunks_;
      const int64_t end = n_ * (chunk + 1) / num_chunks_;
      task_(ctx_, begin, end, thread);
      finished_.fetch_add(1, std::memory_order_release);
      word = word_.load(std::memory_order_acquire);
    }
  }

  bool has_work(uint32_t seen_job) const {
    return job_of(word_.load(std::memory_order_seq_cst)) != seen_job;
  }

  void work(int thread) {
    uint32_t seen_job = 0;
    while (true) {
      int spins = 0;
      while (!has_work(seen_job) && !stop_.load(std::memory_order_relaxed) && spins < kSpins) {
        if (++spins % kYieldEvery == 0) {
          std::this_thread::yield();
        } else {
          cpu_relax();
        }
      }
      if (!has_work(seen_job)) {
        std::unique_lock lock(mutex_);
        sleepers_.fetch_add(1, std::memory_order_seq_cst);
        wake_.wait(lock,
                   [&] { return has_work(seen_job) || stop_.load(std::memory_order_relaxed); });
        sleepers_.fetch_sub(1, std::memory_order_seq_cst);
      }
      if (stop_.load(std::memory_order_relaxed)) return;
      seen_job = job_of(word_.load(std::memory_order_acquire));
      take_chunks(thread);
    }
  }

  const int size_;
  uint32_t job_ = 0;  // caller only

  // Of the current job; written by the caller while no chunk is open.
  int64_t n_ = 0;
  int64_t num_chunks_ = 0;
  Task task_ = nullptr;
  void* ctx_ = nullptr;

  alignas(64) std::atomic<uint64_t> word_{0};
  alignas(64) std::atomic<int64_t> finished_{0};
  alignas(64) std::atomic<int> sleepers_{0};
  std::atomic<bool> stop_{false};
  std::mutex mutex_;
  std::condition_variable wake_;
  std::vector<std::thread> workers_;
};

ThreadPool::ThreadPool(int threads) {
  CHECK(threads >= 1 && threads <= 4096, "a pool has 1 to 4096 threads");
  impl_ = std::make_unique<Impl>(threads);
}
ThreadPool::~ThreadPool() = default;

int ThreadPool::size() const { return impl_->size(); }

void ThreadPool::run(int64_t n, int64_t grain, Task task, void* ctx) {
  impl_->run(n, grain, task, ctx);
}

}  // namespace kvarn
