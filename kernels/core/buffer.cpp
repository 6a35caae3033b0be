#include "kernels/core/buffer.h"

#include <sys/mman.h>

#include <new>

namespace kvarn {

Buffer allocate_host(size_t bytes) {
  if (bytes == 0) return {};
  void* data = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (data == MAP_FAILED) throw std::bad_alloc();
  // Huge pages spare the TLB when a step streams gigabytes; a refusal only costs speed.
  madvise(data, bytes, MADV_HUGEPAGE);
  return {data, bytes, [](void* p, size_t n) { munmap(p, n); }};
}

}  // namespace kvarn
