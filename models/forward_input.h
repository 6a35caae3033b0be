// What a model's forward() takes besides the step's arrays: the pages of every layer, and somebody
// who watches.
#pragma once

#include <atomic>
#include <chrono>
#include <span>

#include "kernels/backend.h"

namespace kvarn {

// Signs of life of a running forward(), for the stall watch. Any thread may read.
struct ForwardProgress {
  std::atomic<std::chrono::steady_clock::time_point> last_layer;

  void layer_done() {
    last_layer.store(std::chrono::steady_clock::now(), std::memory_order_relaxed);
  }
};

// The pages of every layer, views into the engine's pool.
struct KvCacheView {
  std::span<const KvLayerView> layers;
  KvLayout layout;
};

}  // namespace kvarn
