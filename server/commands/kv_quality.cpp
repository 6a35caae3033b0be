#include "server/commands/kv_quality.h"

#include <algorithm>
#include <cmath>

#include "kernels/core/check.h"

namespace kvarn::commands {
namespace {

struct LogSum {
  size_t top;      // most likely token, the lowest id of equals
  double log_sum;  // log of the sum of exp(logits)
};

LogSum log_sum_exp(std::span<const float> logits) {
  const auto top = std::max_element(logits.begin(), logits.end());
  double sum = 0;
  for (const float logit : logits) sum += std::exp(static_cast<double>(logit - *top));
  return {static_cast<size_t>(top - logits.begin()), *top + std::log(sum)};
}

double ratio(double sum, int64_t count) {
  return count == 0 ? 0 : sum / static_cast<double>(count);
}

}  // namespace

void KvQuality::add(std::span<const float> reference, std::span<const float> logits,
                    int32_t target) {
  CHECK(reference.size() == logits.size() && !logits.empty(), "one vocabulary");
  const LogSum p = log_sum_exp(reference), q = log_sum_exp(logits);
  double kl = 0;
  for (size_t i = 0; i < logits.size(); ++i) {
    const double log_p = reference[i] - p.log_sum, log_q = logits[i] - q.log_sum;
    kl += std::exp(log_p) * (log_p - log_q);
  }
  kl_ += std::max(kl, 0.0);  // rounding may leave a little less than nothing
  agreed_ += p.top == q.top ? 1 : 0;
  ++positions_;
  if (target >= 0) {
    const auto token = static_cast<size_t>(target);
    reference_nll_ += p.log_sum - reference[token];
    nll_ += q.log_sum - logits[token];
    ++targets_;
  }
}

double KvQuality::perplexity() const { return std::exp(ratio(nll_, targets_)); }
double KvQuality::reference_perplexity() const { return std::exp(ratio(reference_nll_, targets_)); }
double KvQuality::mean_kl() const { return ratio(kl_, positions_); }
double KvQuality::top1_agreement() const { return ratio(static_cast<double>(agreed_), positions_); }

}  // namespace kvarn::commands
