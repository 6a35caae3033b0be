// The one pool of CPU threads of a process: woken by spinning shortly and
// then sleeping. The caller is thread 0. Not reentrant; one caller at a time (the worker thread).
#pragma once

#include <cstdint>
#include <memory>
#include <type_traits>

namespace kvarn {

class ThreadPool {
 public:
  explicit ThreadPool(int threads);  // >= 1
  ~ThreadPool();
  ThreadPool(const ThreadPool&) = delete;
  ThreadPool& operator=(const ThreadPool&) = delete;

  int size() const;

  // Splits [0, n) into contiguous ranges of at least `grain` items and calls fn(begin, end, thread)
  // for each, thread in [0, size()). Returns when all are done. `fn` must not throw. Which thread
  // takes which range may vary from run to run: results must not depend on it.
  template <typename Fn>
  void parallel_for(int64_t n, int64_t grain, Fn&& fn) {
    run(
        n, grain,
        [](void* ctx, int64_t begin, int64_t end, int thread) {
          (*static_cast<std::remove_reference_t<Fn>*>(ctx))(begin, end, thread);
        },
        &fn);
  }

 private:
  using Task = void (*)(void* ctx, int64_t begin, int64_t end, int thread);
  void run(int64_t n, int64_t grain, Task task, void* ctx);
  class Impl;
  std::unique_ptr<Impl> impl_;
};

}  // namespace kvarn
