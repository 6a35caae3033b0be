// TokenStream: one client's bounded outbox. The output worker pushes, the client's door takes. It
// merges a delta into the waiting one of the same choice and kind, so a slow reader costs its text
// and not one item per token; over the bound it is closed with "slow_reader" and the request is
// cancelled, other requests do not notice. Exactly one StreamEnd comes out, last. Thread-safe.
#pragma once

#include <atomic>
#include <cstdint>
#include <deque>
#include <functional>
#include <mutex>
#include <optional>
#include <unordered_map>

#include "server/generate_output.h"

namespace kvarn {

class TokenStream {
 public:
  // `total`, where given, is the gauge of bytes waiting in all streams; it must outlive this one.
  explicit TokenStream(size_t max_bytes, std::atomic<int64_t>* total = nullptr)
      : max_bytes_(max_bytes), total_(total) {}
  ~TokenStream() { account(0); }

  // Called, from any thread and without locks held, when an item waits where none did. Called at
  // once if one waits already. It must be short and must not set a callback itself. Replaces an
  // earlier callback; an empty one detaches the reader. After set_ready_callback() returns the
  // earlier callback is not running and will not run.
  void set_ready_callback(std::function<void()> ready);
  // The next item, or nothing yet.
  std::optional<StreamItem> try_take();
  // Bytes that wait, by the same estimate as the bound.
  size_t waiting_bytes() const;
  bool ended() const;    // StreamEnd was pushed (it may still wait)
  bool aborted() const;  // ended by abort() or over the bound: nothing but the end waits

  // Output side. False: the bound was exceeded now; the stream has ended with "slow_reader" and the
  // caller cancels the request. After the end everything is dropped (true).
  bool push(PromptInfo info);
  bool push(Delta delta);
  void end(StreamEnd end);  // the first one counts
  // Ends it with `why` and drops what waits: no reader will take it.
  void abort(Status why);

 private:
  bool try_merge(Delta& delta);
  bool push_item(StreamItem item, const int32_t* choice);
  void account(size_t bytes);  // sets bytes_ and moves the gauge
  void notify();

  const size_t max_bytes_;
  std::atomic<int64_t>* const total_;
  mutable std::mutex mutex_;
  std::deque<StreamItem> items_;
  std::deque<size_t> sizes_;                      // of items_, as counted in bytes_
  uint64_t first_ = 0;                            // sequence number of items_.front()
  std::unordered_map<int32_t, uint64_t> newest_;  // choice -> its newest waiting delta
  size_t bytes_ = 0;
  bool ended_ = false, aborted_ = false;
  std::mutex callback_mutex_;  // taken before mutex_, held while the callback runs
  std::function<void()> ready_;
};

// Size of an item towards the bound: its text and ids plus a fixed part.
size_t stream_item_bytes(const StreamItem& item);

}  // namespace kvarn
