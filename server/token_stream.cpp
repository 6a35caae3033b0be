#include "server/token_stream.h"

#include <iterator>
#include <utility>
#include <variant>

namespace kvarn {
namespace {

constexpr size_t kItemBytes = sizeof(StreamItem);  // the fixed part of each

size_t logprob_bytes(const std::vector<TokenLogprobs>& logprobs) {
  size_t bytes = 0;
  for (const TokenLogprobs& entry : logprobs) {
    bytes += sizeof(TokenLogprobs) + entry.token.bytes.size();
    for (const TokenText& top : entry.top) bytes += sizeof(TokenText) + top.bytes.size();
  }
  return bytes;
}

template <typename T>
void append(std::vector<T>& to, std::vector<T>& from) {
  to.insert(to.end(), std::make_move_iterator(from.begin()), std::make_move_iterator(from.end()));
}

Status slow_reader() {
  return {StatusCode::kCancelled, "slow_reader",
          "the client read too slowly: its outbox is full (--outbox-bytes)"};
}

}  // namespace

size_t stream_item_bytes(const StreamItem& item) {
  if (const auto* delta = std::get_if<Delta>(&item)) {
    return kItemBytes + delta->text.size() + delta->tool_call.arguments.size() +
           delta->tool_call.name.size() + delta->token_ids.size() * sizeof(int32_t) +
           logprob_bytes(delta->logprobs);
  }
  if (const auto* info = std::get_if<PromptInfo>(&item)) {
    return kItemBytes + info->token_ids.size() * sizeof(int32_t);
  }
  return kItemBytes;
}

void TokenStream::set_ready_callback(std::function<void()> ready) {
  const std::lock_guard callback_lock(callback_mutex_);
  ready_ = std::move(ready);
  bool waiting = false;
  {
    const std::lock_guard lock(mutex_);
    waiting = !items_.empty();
  }
  if (waiting && ready_) ready_();
}

std::optional<StreamItem> TokenStream::try_take() {
  const std::lock_guard lock(mutex_);
  if (items_.empty()) return std::nullopt;
  StreamItem item = std::move(items_.front());
  items_.pop_front();
  ++first_;
  account(bytes_ - sizes_.front());
  sizes_.pop_front();
  return item;
}

size_t TokenStream::waiting_bytes() const {
  const std::lock_guard lock(mutex_);
  return bytes_;
}

bool TokenStream::ended() const {
  const std::lock_guard lock(mutex_);
  return ended_;
}

bool TokenStream::aborted() const {
  const std::lock_guard lock(mutex_);
  return aborted_;
}

void TokenStream::account(size_t bytes) {
  if (total_ != nullptr) {
    total_->fetch_add(static_cast<int64_t>(bytes) - static_cast<int64_t>(bytes_),
                      std::memory_order_relaxed);
  }
  bytes_ = bytes;
}

// Joins the waiting delta of the same choice and kind; deltas of other choices between them do not
// matter, since order counts only within a choice.
bool TokenStream::try_merge(Delta& delta) {
  const auto newest = newest_.find(delta.choice);
  if (newest == newest_.end() || newest->second < first_) return false;
  const size_t at = static_cast<size_t>(newest->second - first_);
  Delta& waiting = std::get<Delta>(items_[at]);
  if (waiting.kind != delta.kind || delta.kind == DeltaKind::kFinish) return false;
  if (delta.kind == DeltaKind::kToolCall) {
    if (!delta.tool_call.id.empty() || waiting.tool_call.index != delta.tool_call.index) {
      return false;
    }
    waiting.tool_call.arguments += delta.tool_call.arguments;
  }
  waiting.text += delta.text;
  waiting.num_tokens += delta.num_tokens;
  waiting.num_reasoning_tokens += delta.num_reasoning_tokens;
  append(waiting.token_ids, delta.token_ids);
  append(waiting.logprobs, delta.logprobs);
  return true;
}

bool TokenStream::push(PromptInfo info) { return push_item(std::move(info), nullptr); }

bool TokenStream::push(Delta delta) {
  const int32_t choice = delta.choice;
  return push_item(std::move(delta), &choice);
}

bool TokenStream::push_item(StreamItem item, const int32_t* choice) {
  bool within_bound = true;
  {
    const std::lock_guard lock(mutex_);
    if (ended_) return true;
    const size_t bytes = stream_item_bytes(item);
    const bool merged = choice != nullptr && try_merge(std::get<Delta>(item));
    if (merged) {
      sizes_[static_cast<size_t>(newest_[*choice] - first_)] += bytes - kItemBytes;
      account(bytes_ + bytes - kItemBytes);
    } else {
      items_.push_back(std::move(item));
      sizes_.push_back(bytes);
      if (choice != nullptr) newest_[*choice] = first_ + items_.size() - 1;
      account(bytes_ + bytes);
    }
    within_bound = bytes_ <= max_bytes_;
    if (merged && within_bound) return true;  // the reader knows that something waits
  }
  if (!within_bound) {
    abort(slow_reader());
    return false;
  }
  notify();
  return true;
}

void TokenStream::end(StreamEnd end) {
  {
    const std::lock_guard lock(mutex_);
    if (ended_) return;
    ended_ = true;
    items_.emplace_back(std::move(end));
    sizes_.push_back(kItemBytes);
    account(bytes_ + kItemBytes);
  }
  notify();
}

void TokenStream::abort(Status why) {
  {
    const std::lock_guard lock(mutex_);
    if (ended_) return;
    ended_ = true;
    aborted_ = true;
    first_ += items_.size();
    items_.clear();
    sizes_.clear();
    items_.emplace_back(StreamEnd{std::move(why), {}});
    sizes_.push_back(kItemBytes);
    account(kItemBytes);
  }
  notify();
}

void TokenStream::notify() {
  const std::lock_guard lock(callback_mutex_);
  if (ready_) ready_();
}

}  // namespace kvarn
