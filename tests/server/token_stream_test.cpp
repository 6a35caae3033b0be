// The outbox of one client: order, merging, bound, end, callbacks.
#include "server/token_stream.h"

#include <gtest/gtest.h>

#include <atomic>
#include <random>
#include <thread>

#include "server/fold.h"

namespace kvarn::test {
namespace {

Delta text(int choice, const std::string& content, DeltaKind kind = DeltaKind::kContent) {
  Delta delta;
  delta.choice = choice;
  delta.kind = kind;
  delta.text = content;
  delta.num_tokens = 1;
  delta.token_ids = {static_cast<int32_t>(content.size())};
  return delta;
}

Delta finish(int choice) {
  Delta delta;
  delta.choice = choice;
  delta.kind = DeltaKind::kFinish;
  delta.finish = Finish{};
  return delta;
}

std::vector<Delta> take_all(TokenStream& stream) {
  std::vector<Delta> out;
  while (auto item = stream.try_take()) {
    if (auto* delta = std::get_if<Delta>(&*item)) out.push_back(std::move(*delta));
  }
  return out;
}

TEST(TokenStream, MergesNeighboursOfOneChoiceAndKindOnlyWhileTheyWait) {
  TokenStream stream(1 << 20);
  stream.push(text(0, "a"));
  stream.push(text(0, "b"));
  std::vector<Delta> deltas = take_all(stream);
  ASSERT_EQ(deltas.size(), 1u);
  EXPECT_EQ(deltas[0].text, "ab");
  EXPECT_EQ(deltas[0].num_tokens, 2);
  EXPECT_EQ(deltas[0].token_ids, (std::vector<int32_t>{1, 1}));
  stream.push(text(0, "c"));
  EXPECT_EQ(take_all(stream)[0].text, "c");
}

TEST(TokenStream, KeepsKindsApartAndMergesAcrossOtherChoices) {
  TokenStream stream(1 << 20);
  stream.push(text(0, "r", DeltaKind::kReasoning));
  stream.push(text(1, "x"));
  stream.push(text(0, "s", DeltaKind::kReasoning));
  stream.push(text(0, "c"));
  stream.push(text(1, "y"));
  stream.push(finish(1));
  stream.push(text(0, "d"));
  const std::vector<Delta> deltas = take_all(stream);
  ASSERT_EQ(deltas.size(), 4u);
  EXPECT_EQ(deltas[0].text, "rs");
  EXPECT_EQ(deltas[1].text, "xy");
  EXPECT_EQ(deltas[2].text, "cd");
  EXPECT_EQ(deltas[3].kind, DeltaKind::kFinish);
}

TEST(TokenStream, StartsANewDeltaForEachToolCall) {
  TokenStream stream(1 << 20);
  for (int index = 0; index < 2; ++index) {
    Delta head;
    head.kind = DeltaKind::kToolCall;
    head.tool_call = {index, "call_" + std::to_string(index), "f", ""};
    stream.push(head);
    head.tool_call = {index, "", "", "{}"};
    stream.push(head);
  }
  const std::vector<Delta> deltas = take_all(stream);
  ASSERT_EQ(deltas.size(), 2u);
  EXPECT_EQ(deltas[1].tool_call.id, "call_1");
  EXPECT_EQ(deltas[1].tool_call.arguments, "{}");
}

TEST(TokenStream, EndsWithSlowReaderPastItsBoundAndFreesWhatWaits) {
  std::atomic<int64_t> total{0};
  TokenStream stream(4096, &total);
  bool within = true;
  int pushed = 0;
  while (within && pushed < 10000) {
    within = stream.push(text(0, std::string(100, 'x')));
    ++pushed;
  }
  EXPECT_FALSE(within);
  EXPECT_LT(pushed, 60);
  EXPECT_TRUE(stream.aborted());
  EXPECT_TRUE(stream.push(text(0, "late")));  // dropped
  const std::optional<StreamItem> item = stream.try_take();
  ASSERT_TRUE(item.has_value());
  EXPECT_EQ(std::get<StreamEnd>(*item).status.reason(), "slow_reader");
  EXPECT_FALSE(stream.try_take().has_value());
  EXPECT_EQ(total.load(), 0);
}

TEST(TokenStream, CountsWhatWaitsAlsoAfterMerging) {
  std::atomic<int64_t> total{0};
  {
    TokenStream stream(1 << 20, &total);
    std::mt19937 random(7);
    for (int i = 0; i < 2000; ++i) {
      if (random() % 3 == 0) {
        stream.try_take();
      } else {
        stream.push(text(static_cast<int>(random() % 3), std::string(random() % 50, 'a'),
                         random() % 4 == 0 ? DeltaKind::kReasoning : DeltaKind::kContent));
      }
      EXPECT_EQ(static_cast<size_t>(total.load()), stream.waiting_bytes());
    }
    take_all(stream);
    EXPECT_EQ(stream.waiting_bytes(), 0u);
    stream.push(text(0, "left behind"));
  }
  EXPECT_EQ(total.load(), 0);
}

TEST(TokenStream, TheFirstEndCounts) {
  TokenStream stream(1 << 20);
  stream.push(text(0, "a"));
  stream.end({Status::ok(), {1, 2, 0, 0}});
  stream.abort(Status::internal("late"));
  stream.end({Status::internal("later"), {}});
  EXPECT_TRUE(stream.ended());
  stream.try_take();
  const std::optional<StreamItem> end = stream.try_take();
  ASSERT_TRUE(end.has_value());
  EXPECT_TRUE(std::get<StreamEnd>(*end).status.is_ok());
  EXPECT_EQ(std::get<StreamEnd>(*end).usage.completion_tokens, 2);
  EXPECT_FALSE(stream.try_take().has_value());
}

TEST(TokenStream, CallsBackAtOnceIfSomethingWaitsAndNeverAfterItsRemoval) {
  TokenStream stream(1 << 20);
  int calls = 0;
  stream.push(text(0, "a"));
  stream.set_ready_callback([&] { ++calls; });
  EXPECT_EQ(calls, 1);
  stream.push(text(0, "b"));  // merged: the reader knows already
  EXPECT_EQ(calls, 1);
  take_all(stream);
  stream.push(text(0, "c"));
  EXPECT_EQ(calls, 2);
  stream.set_ready_callback({});
  stream.push(finish(0));
  EXPECT_EQ(calls, 2);
}

TEST(TokenStream, LosesNothingBetweenAWriterAndAReader) {
  constexpr int kTokens = 20000;
  TokenStream stream(size_t{1} << 30);
  std::atomic<int> wakes{0};
  stream.set_ready_callback([&] { ++wakes; });
  std::thread writer([&] {
    std::mt19937 random(3);
    for (int i = 0; i < kTokens; ++i) {
      stream.push(text(i % 2, std::to_string(i) + ",",
                       random() % 5 == 0 ? DeltaKind::kReasoning : DeltaKind::kContent));
    }
    stream.end({});
  });
  Fold fold(2);
  for (bool ended = false; !ended;) {
    std::optional<StreamItem> item = stream.try_take();
    if (!item.has_value()) {
      std::this_thread::yield();
    } else if (auto* delta = std::get_if<Delta>(&*item)) {
      fold.add(std::move(*delta));
    } else {
      ended = true;
    }
  }
  writer.join();
  EXPECT_EQ(fold.usage().completion_tokens, kTokens);
  EXPECT_GT(wakes, 0);
  std::mt19937 random(3);
  std::string content[2], reasoning[2];
  for (int i = 0; i < kTokens; ++i) {
    std::string* const kind = random() % 5 == 0 ? reasoning : content;
    kind[i % 2] += std::to_string(i) + ",";
  }
  for (size_t choice = 0; choice < 2; ++choice) {
    EXPECT_EQ(fold.choices()[choice].content, content[choice]);
    EXPECT_EQ(fold.choices()[choice].reasoning, reasoning[choice]);
  }
}

}  // namespace
}  // namespace kvarn::test
