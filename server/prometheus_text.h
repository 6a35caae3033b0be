// Prometheus' text format, version 0.0.4: a page writer and a histogram. Not thread-safe.
#pragma once

#include <cstdint>
#include <initializer_list>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

namespace kvarn {

// Label names and values, rendered in order; values are escaped.
using Labels = std::vector<std::pair<std::string, std::string>>;

class Histogram {
 public:
  explicit Histogram(std::vector<double> bounds);  // ascending upper bounds, without +Inf
  void observe(double value);
  const std::vector<double>& bounds() const { return bounds_; }
  const std::vector<uint64_t>& counts() const { return counts_; }  // per bucket, the last is +Inf
  double sum() const { return sum_; }
  uint64_t count() const { return count_; }

 private:
  std::vector<double> bounds_;
  std::vector<uint64_t> counts_;
  double sum_ = 0;
  uint64_t count_ = 0;
};

// 1 2 5 10 20 50 ... up to and including the first bound that reaches `largest`.
std::vector<double> one_two_five(double largest);

class PrometheusPage {
 public:
  // `common` labels go on every sample.
  explicit PrometheusPage(Labels common);

  // HELP and TYPE; the samples of the family follow.
  void family(std::string_view name, std::string_view type, std::string_view help);
  void sample(std::string_view name, const Labels& labels, double value);
  void histogram(std::string_view name, const Labels& labels, const Histogram& histogram);
  // A family of one sample without labels of its own.
  void gauge(std::string_view name, std::string_view help, double value);
  void counter(std::string_view name, std::string_view help, double value);

  std::string take() { return std::move(text_); }

 private:
  Labels common_;
  std::string text_;
};

}  // namespace kvarn
