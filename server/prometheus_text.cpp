#include "server/prometheus_text.h"

#include <algorithm>
#include <cmath>

#include <fmt/format.h>

namespace kvarn {
namespace {

void append_escaped(std::string& out, std::string_view value) {
  for (const char c : value) {
    if (c == '\\' || c == '"') {
      out += '\\';
      out += c;
    } else if (c == '\n') {
      out += "\\n";
    } else {
      out += c;
    }
  }
}

void append_number(std::string& out, double value) {
  if (std::isinf(value)) {
    out += value > 0 ? "+Inf" : "-Inf";
  } else if (value == std::floor(value) && std::abs(value) < 1e15) {
    fmt::format_to(std::back_inserter(out), "{:.0f}", value);
  } else {
    fmt::format_to(std::back_inserter(out), "{}", value);
  }
}

void append_labels(std::string& out, const Labels& common, const Labels& labels) {
  bool first = true;
  for (const Labels* list : {&common, &labels}) {
    for (const auto& [name, value] : *list) {
      out += first ? '{' : ',';
      first = false;
      out += name;
      out += "=\"";
      append_escaped(out, value);
      out += '"';
    }
  }
  if (!first) out += '}';
}

}  // namespace

Histogram::Histogram(std::vector<double> bounds)
    : bounds_(std::move(bounds)), counts_(bounds_.size() + 1) {}

void Histogram::observe(double value) {
  const auto bucket = std::lower_bound(bounds_.begin(), bounds_.end(), value) - bounds_.begin();
  ++counts_[static_cast<size_t>(bucket)];
  sum_ += value;
  ++count_;
}

std::vector<double> one_two_five(double largest) {
  std::vector<double> bounds;
  for (double decade = 1;; decade *= 10) {
    for (const double step : {1.0, 2.0, 5.0}) {
      bounds.push_back(decade * step);
      if (bounds.back() >= largest) return bounds;
    }
  }
}

PrometheusPage::PrometheusPage(Labels common) : common_(std::move(common)) {}

void PrometheusPage::family(std::string_view name, std::string_view type, std::string_view help) {
  fmt::format_to(std::back_inserter(text_), "# HELP {} {}\n# TYPE {} {}\n", name, help, name, type);
}

void PrometheusPage::sample(std::string_view name, const Labels& labels, double value) {
  text_ += name;
  append_labels(text_, common_, labels);
  text_ += ' ';
  append_number(text_, value);
  text_ += '\n';
}

void PrometheusPage::histogram(std::string_view name, const Labels& labels,
                               const Histogram& histogram) {
  const std::string bucket = fmt::format("{}_bucket", name);
  uint64_t cumulative = 0;
  for (size_t i = 0; i < histogram.counts().size(); ++i) {
    cumulative += histogram.counts()[i];
    Labels with_bound = labels;
    const bool last = i == histogram.bounds().size();
    with_bound.emplace_back("le", last ? "+Inf" : fmt::format("{}", histogram.bounds()[i]));
    sample(bucket, with_bound, static_cast<double>(cumulative));
  }
  sample(fmt::format("{}_sum", name), labels, histogram.sum());
  sample(fmt::format("{}_count", name), labels, static_cast<double>(histogram.count()));
}

void PrometheusPage::gauge(std::string_view name, std::string_view help, double value) {
  family(name, "gauge", help);
  sample(name, {}, value);
}

void PrometheusPage::counter(std::string_view name, std::string_view help, double value) {
  family(name, "counter", help);
  sample(name, {}, value);
}

}  // namespace kvarn
