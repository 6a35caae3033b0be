// How far one set of logits is from another: perplexity, mean KL divergence and top-1 agreement
// over positions. Sums are kept in double. Not thread-safe.
#pragma once

#include <cstdint>
#include <span>

namespace kvarn::commands {

class KvQuality {
 public:
  // One position. `reference` and `logits` are raw logits [vocab]; `target` is the token that
  // follows, -1: none (then only KL and agreement count).
  void add(std::span<const float> reference, std::span<const float> logits, int32_t target);

  int64_t positions() const { return positions_; }
  double perplexity() const;            // of the text under `logits`
  double reference_perplexity() const;  // under `reference`
  double mean_kl() const;               // sum p (log p - log q), nats, p the reference
  double top1_agreement() const;        // share of positions with the same most likely token

 private:
  int64_t positions_ = 0, targets_ = 0, agreed_ = 0;
  double nll_ = 0, reference_nll_ = 0, kl_ = 0;
};

}  // namespace kvarn::commands
