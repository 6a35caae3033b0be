// Linear layers of the Qwen3 models, in a graph, weights from memory: own kernels for few rows and
// cuBLASLt, against a plain read of the same weights in the same run.
//   kvarn_cuda_linear_bench [--models 0.6B,8B] [--what matrices|layers|all|sweep] [--matrix qkv]
//                           [--rows 16] [--json FILE] [--commit HASH]
// `layers` times the linear part of whole layers, fused and not; `sweep` prints every plan for few
// rows: how few_rows_plan() was found.
#include <cmath>
#include <cstdio>
#include <map>
#include <memory>
#include <set>
#include <string>
#include <vector>

#include "bench/cuda/timing.h"
#include "kernels/cuda_check.h"
#include "kernels/linear_cublaslt.h"
#include "kernels/linear_few_cuda.h"
#include "kernels/ops_cuda.h"
#include "kernels/random_fill.h"

namespace kvarn::bench {
namespace {

struct Matrix {
  std::string model, name;
  int64_t n, k;
  size_t bytes() const { return static_cast<size_t>(n * k) * sizeof(bf16); }
};

std::vector<Matrix> matrices() {
  struct Model {
    const char* name;
    int64_t hidden, q_heads, ffn;
  };
  constexpr int64_t kKvHeads = 8, kHeadDim = 128, kVocab = 151936;
  std::vector<Matrix> out;
  for (const Model m : {Model{"0.6B", 1024, 16, 3072}, Model{"1.7B", 2048, 16, 6144},
                        Model{"4B", 2560, 32, 9728}, Model{"8B", 4096, 32, 12288},
                        Model{"14B", 5120, 40, 17408}, Model{"32B", 5120, 64, 25600}}) {
    out.push_back({m.name, "qkv", (m.q_heads + 2 * kKvHeads) * kHeadDim, m.hidden});
    out.push_back({m.name, "o", m.hidden, m.q_heads * kHeadDim});
    out.push_back({m.name, "gate_up", 2 * m.ffn, m.hidden});
    out.push_back({m.name, "down", m.hidden, m.ffn});
    out.push_back({m.name, "head", kVocab, m.hidden});
  }
  return out;
}

class Case {
 public:
  Case(const Matrix& matrix, const DeviceBytes& quantiles)
      : matrix_(matrix),
        variants_(variants_for(matrix.bytes())),
        weights_(matrix.bytes() * static_cast<size_t>(variants_)),
        x_(static_cast<size_t>(kMaxRows * matrix.k) * sizeof(bf16)),
        y_(static_cast<size_t>(kMaxRows * matrix.n) * sizeof(float)) {
    const auto* table = reinterpret_cast<const bf16*>(quantiles.data());
    cuda::fill_normal(nullptr,
                      Tensor(weights_.data(), DType::kBF16, {variants_ * matrix.n * matrix.k}),
                      table, 1);
    cuda::fill_normal(nullptr, Tensor(x_.data(), DType::kBF16, {kMaxRows * matrix.k}), table, 2);
    CUDA_CHECK(cudaDeviceSynchronize());
  }
  static constexpr int64_t kMaxRows = 128;

  Tensor x(int64_t rows) const { return {x_.data(), DType::kBF16, {rows, matrix_.k}}; }
  // Logits are f32, everything else bf16.
  DType y_dtype() const { return matrix_.name == "head" ? DType::kF32 : DType::kBF16; }
  Tensor y(int64_t rows) const { return {y_.data(), y_dtype(), {rows, matrix_.n}}; }
  Tensor weight(int variant) const {
    return {weights_.data() + static_cast<size_t>(variant) * matrix_.bytes(),
            DType::kBF16,
            {matrix_.n, matrix_.k}};
  }

  double own_us(int64_t rows, const cuda::FewRowsPlan& plan, bool overlap) const {
    return time_us(variants_, [&](cudaStream_t stream, int variant) {
      own(stream, rows, variant, plan, overlap);
    });
  }
  double library_us(int64_t rows, cuda::CublasLt& library) const {
    library.run(nullptr, x(rows), weight(0), y_.data(), y_dtype(), matrix_.n);  // plans
    CUDA_CHECK(cudaDeviceSynchronize());
    return time_us(variants_, [&](cudaStream_t stream, int variant) {
      library.run(stream, x(rows), weight(variant), y_.data(), y_dtype(), matrix_.n);
    });
  }

  // The relative difference of own and library results, so that no wrong kernel is timed.
  double difference(int64_t rows, const cuda::FewRowsPlan& plan, cuda::CublasLt& library) const {
    CUDA_CHECK(cudaMemset(y_.data(), 0xff, y_.bytes()));
    own(nullptr, rows, 0, plan, false);
    const std::vector<float> a = results(rows);
    CUDA_CHECK(cudaMemset(y_.data(), 0xff, y_.bytes()));
    library.run(nullptr, x(rows), weight(0), y_.data(), y_dtype(), matrix_.n);
    const std::vector<float> b = results(rows);
    double squares = 0, differences = 0;
    for (size_t i = 0; i < a.size(); ++i) {
      squares += double{b[i]} * double{b[i]};
      differences += (double{a[i]} - double{b[i]}) * (double{a[i]} - double{b[i]});
    }
    return std::sqrt(differences / squares);
  }

 private:
  void own(cudaStream_t stream, int64_t rows, int variant, const cuda::FewRowsPlan& plan,
           bool overlap) const {
    LinearWeight w;
    w.num_parts = 1;
    w.parts[0] = weight(variant);
    cuda::linear_few_rows(stream, x(rows), w, y(rows), cuda::LinearResult::kStore, plan, overlap);
  }
  std::vector<float> results(int64_t rows) const {
    CUDA_CHECK(cudaDeviceSynchronize());
    const auto count = static_cast<size_t>(rows * matrix_.n);
    std::vector<float> out(count);
    if (y_dtype() == DType::kF32) {
      CUDA_CHECK(cudaMemcpy(out.data(), y_.data(), count * 4, cudaMemcpyDeviceToHost));
      return out;
    }
    std::vector<bf16> narrow(count);
    CUDA_CHECK(cudaMemcpy(narrow.data(), y_.data(), count * 2, cudaMemcpyDeviceToHost));
    for (size_t i = 0; i < count; ++i) out[i] = to_float(narrow[i]);
    return out;
  }

  Matrix matrix_;
  int variants_;
  DeviceBytes weights_, x_, y_;
};

void sweep(const Case& c, const Matrix& m, cuda::CublasLt& library, int sms, int64_t rows) {
  const auto percent = [&](double us) {
    // A plain read in a graph on an H100: start-up and rate.
    return 100 * (1.85 + static_cast<double>(m.bytes()) / 3.185e6) / us;
  };
  const double theirs = c.library_us(rows, library);
  std::printf("%s %s M %d: library %.2f us (%.0f %%)\n", m.model.c_str(), m.name.c_str(),
              static_cast<int>(rows), theirs, percent(theirs));
  const int64_t all = (m.n + 7) / 8;
  for (const int warps : {4, 5, 6, 8, 10, 12, 16}) {
    std::set<int64_t> grids = {all, std::min<int64_t>(all, int64_t{16 / warps} * sms)};
    for (const int64_t blocks : grids) {
      const double us = c.own_us(rows, {warps, blocks}, false);
      const double overlapped = blocks == all ? c.own_us(rows, {warps, blocks}, true) : kNone;
      std::printf("  warps %2d blocks %5d: %7.2f us (%.0f %%), overlapped %.2f (%.0f %%)\n", warps,
                  static_cast<int>(blocks), us, percent(us), overlapped, percent(overlapped));
    }
  }
  std::fflush(stdout);
}

// The linear part of a layer with what lies between: seven kernels, or six with silu * mul and the
// additions to the residual fused. `overlap` is that of the linear kernels; the others always do.
class Layer {
 public:
  Layer(const std::vector<Matrix>& all, const std::string& model, const DeviceBytes& quantiles) {
    for (const Matrix& m : all) {
      if (m.model == model && m.name != "head") matrices_[m.name] = m;
    }
    for (const auto& [name, m] : matrices_) bytes_ += m.bytes();
    variants_ = variants_for(bytes_);
    weights_ = std::make_unique<DeviceBytes>(bytes_ * static_cast<size_t>(variants_));
    hidden_ = matrices_["o"].n;
    ffn_ = matrices_["down"].k;
    const int64_t widest = std::max(matrices_["gate_up"].n, matrices_["qkv"].n);
    for (auto* activation : {&residual_, &norm_, &x_, &wide_, &heads_, &hidden_states_, &delta_}) {
      *activation = std::make_unique<DeviceBytes>(static_cast<size_t>(cuda::kFewRows * widest) * 4);
    }
    const auto* table = reinterpret_cast<const bf16*>(quantiles.data());
    const auto fill = [&](const DeviceBytes& bytes, uint64_t seed) {
      const auto count = static_cast<int64_t>(bytes.bytes() / sizeof(bf16));
      cuda::fill_normal(nullptr, Tensor(bytes.data(), DType::kBF16, {count}), table, seed);
    };
    fill(*weights_, 1);
    fill(*norm_, 2);
    fill(*heads_, 3);
    CUDA_CHECK(cudaMemset(residual_->data(), 0x3c, residual_->bytes()));  // 0.0115
    CUDA_CHECK(cudaDeviceSynchronize());
  }
  size_t bytes() const { return bytes_; }

  double us(int64_t rows, bool fused, bool overlap, int sms) const {
    return time_us(variants_, [&](cudaStream_t stream, int variant) {
      size_t offset = bytes_ * static_cast<size_t>(variant);
      const auto linear = [&](const char* name, Tensor x, Tensor y, cuda::LinearResult result) {
        const Matrix& m = matrices_.at(name);
        LinearWeight w;
        w.num_parts = 1;
        w.parts[0] = Tensor(weights_->data() + offset, DType::kBF16, {m.n, m.k});
        offset += m.bytes();
        cuda::linear_few_rows(stream, x, w, y, result,
                              cuda::few_rows_plan(rows, m.n, m.k, result, sms), overlap);
      };
      using enum cuda::LinearResult;
      const Tensor residual(residual_->data(), DType::kF32, {rows, hidden_});
      const Tensor gamma(norm_->data(), DType::kBF16, {hidden_});
      const auto narrow = [&](const DeviceBytes& bytes, int64_t columns) {
        return Tensor(bytes.data(), DType::kBF16, {rows, columns});
      };
      const Tensor x = narrow(*x_, hidden_), delta = narrow(*delta_, hidden_);
      const Tensor wide = narrow(*wide_, matrices_.at("qkv").n);
      const Tensor heads = narrow(*heads_, matrices_.at("o").k);
      const Tensor gate_up = narrow(*wide_, 2 * ffn_), hidden = narrow(*hidden_states_, ffn_);
      if (fused) {
        cuda::rms_norm(stream, residual, gamma, kEps, x);
        linear("qkv", x, wide, kStore);
        linear("o", heads, residual, kAdd);
        cuda::rms_norm(stream, residual, gamma, kEps, x);
        linear("gate_up", x, hidden, kSiluMul);
        linear("down", hidden, residual, kAdd);
        return;
      }
      cuda::add_rms_norm(stream, residual, delta, gamma, kEps, x);
      linear("qkv", x, wide, kStore);
      linear("o", heads, delta, kStore);
      cuda::add_rms_norm(stream, residual, delta, gamma, kEps, x);
      linear("gate_up", x, gate_up, kStore);
      cuda::silu_mul(stream, gate_up, hidden);
      linear("down", hidden, delta, kStore);
    });
  }

 private:
  static constexpr float kEps = 1e-6f;
  std::map<std::string, Matrix> matrices_;
  size_t bytes_ = 0;
  int variants_ = 0;
  int64_t hidden_ = 0, ffn_ = 0;
  std::unique_ptr<DeviceBytes> weights_, residual_, norm_, x_, wide_, heads_, hidden_states_,
      delta_;
};

// `list` is empty for all.
bool named(const std::string& list, const std::string& name) {
  return list.empty() || ("," + list + ",").find("," + name + ",") != std::string::npos;
}

void layers(const std::string& models, const DeviceBytes& quantiles, int sms, Report& report) {
  for (const std::string model : {"0.6B", "1.7B", "4B", "8B", "14B", "32B"}) {
    if (!named(models, model)) continue;
    const Layer layer(matrices(), model, quantiles);
    const double limit = read_limit_us(layer.bytes());
    for (const int64_t rows : {1, 8, 16}) {
      for (const bool fused : {false, true}) {
        for (const bool overlap : {false, true}) {
          const double us = layer.us(rows, fused, overlap, sms);
          report.add({.name = "layer-" + model + "-m" + std::to_string(rows) +
                              (fused ? "-fused" : "-separate") + (overlap ? "-overlapped" : ""),
                      .value = us,
                      .unit = "us",
                      .against = "plain read of the weights",
                      .against_value = limit,
                      .ratio = limit / us});
        }
      }
    }
  }
}

int run(int argc, char** argv) {
  const std::string models = option(argc, argv, "--models", "");
  const std::string what = option(argc, argv, "--what", "all");
  const std::string only = option(argc, argv, "--matrix", "");
  int sms = 0;
  CUDA_CHECK(cudaDeviceGetAttribute(&sms, cudaDevAttrMultiProcessorCount, 0));
  const std::vector<bf16> table = normal_quantiles(0.02f);
  const DeviceBytes quantiles(table.size() * sizeof(bf16));
  CUDA_CHECK(cudaMemcpy(quantiles.data(), table.data(), quantiles.bytes(), cudaMemcpyHostToDevice));
  cuda::CublasLt library;
  Report report(argc, argv);
  if (what == "layers" || what == "all") layers(models, quantiles, sms, report);
  if (what == "layers") return 0;
  std::map<size_t, double> limits;
  for (const Matrix& m : matrices()) {
    if (!named(models, m.model) || !named(only, m.name)) continue;
    const Case c(m, quantiles);
    const auto plan = [&](int64_t rows) {
      return cuda::few_rows_plan(rows, m.n, m.k, cuda::LinearResult::kStore, sms);
    };
    for (const int64_t rows : {8, 16}) {
      if (const double d = c.difference(rows, plan(rows), library); !(d < 1e-2)) {
        std::fprintf(stderr, "%s %s: results differ by %g\n", m.model.c_str(), m.name.c_str(), d);
        return 1;
      }
    }
    if (what == "sweep") {
      const int64_t some = std::stoi(option(argc, argv, "--rows", "0"));
      for (const int64_t rows : {1, 8, 16}) {
        if (some == 0 || some == rows) sweep(c, m, library, sms, rows);
      }
      continue;
    }
    if (!limits.contains(m.bytes())) limits[m.bytes()] = read_limit_us(m.bytes());
    const double limit = limits[m.bytes()];
    for (const int64_t rows : {1, 8, 16, 32, 128}) {
      const std::string name = "linear-" + m.model + "-" + m.name + "-m" + std::to_string(rows);
      const auto add = [&](const char* who, double us) {
        report.add({.name = name + "-" + who,
                    .value = us,
                    .unit = "us",
                    .against = "plain read of the weights",
                    .against_value = limit,
                    .ratio = limit / us});
        std::printf("    %.0f GB/s\n", static_cast<double>(m.bytes()) * 1e-3 / us);
      };
      if (rows <= cuda::kFewRows) {
        add("own", c.own_us(rows, plan(rows), false));
        if (rows == 1) add("own-overlapped", c.own_us(rows, plan(rows), true));
      }
      add("cublaslt", c.library_us(rows, library));
    }
  }
  return 0;
}

}  // namespace
}  // namespace kvarn::bench

int main(int argc, char** argv) { return kvarn::bench::run(argc, argv); }
