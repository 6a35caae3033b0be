#include "models/weights.h"

#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <numbers>
#include <optional>
#include <string_view>
#include <thread>

namespace kvarn {
namespace {

constexpr float kRandomStddev = 0.02f;  // Qwen3's initializer_range

std::optional<DType> weight_dtype(std::string_view word) {
  if (word == "BF16") return DType::kBF16;
  if (word == "F16") return DType::kF16;
  if (word == "F32") return DType::kF32;
  return std::nullopt;
}

// Copies that some checkpoints carry beside what the model reads: the head of a tied model (the
// embedding again) and the rotary frequencies (computed from config.json).
bool is_redundant(std::string_view name) {
  return name == "lm_head.weight" || name.ends_with(".rotary_emb.inv_freq");
}

size_t shape_bytes(DType dtype, std::initializer_list<int64_t> shape) {
  return Tensor(nullptr, dtype, shape).bytes();
}

uint64_t hash_name(std::string_view name) {  // FNV-1a
  uint64_t hash = 0xcbf29ce484222325u;
  for (const char c : name) hash = (hash ^ static_cast<unsigned char>(c)) * 0x100000001b3u;
  return hash;
}

uint64_t mix(uint64_t x) {  // splitmix64's finaliser
  x += 0x9e3779b97f4a7c15u;
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9u;
  x = (x ^ (x >> 27)) * 0x94d049bb133111ebu;
  return x ^ (x >> 31);
}

// Quantiles of N(0, 1): entry i is the value at probability (i + 0.5) / 65536. One hash then gives
// four samples by lookup, which fills memory about as fast as it can be written.
std::vector<double> normal_quantiles() {
  constexpr int kHalf = 32768;
  std::vector<double> quantiles(2 * kHalf);
  double x = 0;
  for (int i = 0; i < kHalf; ++i) {
    const double p = 0.5 + (i + 0.5) / (2 * kHalf);
    // Newton on the CDF, concave for x > 0: started left of the root it only climbs towards it.
    for (int round = 0; round < 20; ++round) {
      const double density = std::exp(-x * x / 2) / std::sqrt(2 * std::numbers::pi);
      const double step = (p - 0.5 * std::erfc(-x / std::numbers::sqrt2)) / density;
      x += step;
      if (std::abs(step) < 1e-9) break;
    }
    quantiles[static_cast<size_t>(kHalf + i)] = x;
    quantiles[static_cast<size_t>(kHalf - 1 - i)] = -x;
  }
  return quantiles;
}

}  // namespace

void fill_normal_bf16(bf16* out, int64_t count, float stddev, uint64_t seed, int threads) {
  static const std::vector<double> quantiles = normal_quantiles();
  std::vector<bf16> table(quantiles.size());
  std::transform(quantiles.begin(), quantiles.end(), table.begin(),
                 [&](double q) { return to_bf16(static_cast<float>(stddev * q)); });
  const auto fill = [&](int64_t begin, int64_t end) {  // begin is a multiple of 4
    for (int64_t i = begin; i < end; i += 4) {
      uint64_t bits = mix(seed + static_cast<uint64_t>(i));
      for (int64_t j = i; j < std::min(i + 4, end); ++j, bits >>= 16) out[j] = table[bits & 0xffff];
    }
  };
  constexpr int64_t kGrain = 1 << 16;  // below this a thread costs more than it saves
  const int64_t parts = std::clamp<int64_t>(count / kGrain, 1, std::max(threads, 1));
  const int64_t per_part = (count / parts + 3) / 4 * 4;
  std::vector<std::jthread> helpers;
  for (int64_t part = 1; part < parts; ++part) {
    helpers.emplace_back(fill, std::min(part * per_part, count),
                         part + 1 == parts ? count : std::min((part + 1) * per_part, count));
  }
  fill(0, parts == 1 ? count : per_part);
}

Result<std::unique_ptr<WeightStore>> WeightStore::from_directory(
    const std::filesystem::path& directory, Backend& backend) {
  std::unique_ptr<WeightStore> store(new WeightStore(backend));
  KVARN_ASSIGN_OR_RETURN(store->files_, Safetensors::open_directory(directory));
  return store;
}

std::unique_ptr<WeightStore> WeightStore::random(uint64_t seed, Backend& backend) {
  std::unique_ptr<WeightStore> store(new WeightStore(backend));
  store->random_ = true;
  store->seed_ = seed;
  return store;
}

Result<Tensor> WeightStore::get(const std::string& name, std::initializer_list<int64_t> shape) {
  used_.insert(name);
  if (random_) return make_random(name, shape);
  return get_mapped(name, shape);
}

Result<Tensor> WeightStore::get_mapped(const std::string& name,
                                       std::initializer_list<int64_t> shape) {
  const SafetensorsEntry* entry = files_.find(name);
  if (entry == nullptr) {
    return Status::invalid_argument(
        fmt::format("{}: tensor {} is missing; the weights are incomplete or of another model than "
                    "config.json: download both again",
                    files_.origin(), name));
  }
  if (!std::equal(entry->shape.begin(), entry->shape.end(), shape.begin(), shape.end())) {
    return Status::invalid_argument(fmt::format(
        "{}: tensor {} has shape {} but config.json asks for {}; weights and "
        "config.json must come from the same model",
        *entry->file, name, shape_text(entry->shape), shape_text(std::vector<int64_t>(shape))));
  }
  const std::optional<DType> dtype = weight_dtype(entry->dtype);
  if (!dtype) {
    return Status::invalid_argument(
        fmt::format("{}: tensor {} has dtype {}; this version reads BF16, F16 and F32: take those "
                    "weights of the model or convert them",
                    *entry->file, name, entry->dtype));
  }
  bytes_ += entry->bytes;
  if (reinterpret_cast<uintptr_t>(entry->data) % dtype_bytes(*dtype) == 0) {
    return to_backend(entry->data, *dtype, shape);
  }
  Buffer aligned = allocate_host(entry->bytes);
  std::memcpy(aligned.data(), entry->data, entry->bytes);
  bytes_ -= entry->bytes;  // adopt() counts them
  return adopt(std::move(aligned), *dtype, shape);
}

Tensor WeightStore::make_random(const std::string& name, std::initializer_list<int64_t> shape) {
  Buffer host = allocate_host(shape_bytes(DType::kBF16, shape));
  auto* values = reinterpret_cast<bf16*>(host.data());
  const int64_t count = Tensor(values, DType::kBF16, shape).size();
  if (shape.size() == 1) {
    std::fill_n(values, count, to_bf16(1.f));
  } else {
    fill_normal_bf16(values, count, kRandomStddev, seed_ ^ hash_name(name), backend_.threads());
  }
  return adopt(std::move(host), DType::kBF16, shape);
}

Tensor WeightStore::adopt(Buffer host, DType dtype, std::initializer_list<int64_t> shape) {
  const Tensor tensor = to_backend(host.data(), dtype, shape);
  bytes_ += tensor.bytes();
  if (tensor.raw() == host.data()) buffers_.push_back(std::move(host));
  return tensor;
}

Tensor WeightStore::to_backend(const std::byte* host, DType dtype,
                               std::initializer_list<int64_t> shape) {
  const size_t bytes = shape_bytes(dtype, shape);
  Buffer device = backend_.allocate(bytes);  // untouched, and so free, where upload() needs no copy
  void* data = backend_.upload(host, bytes, device, 0);
  if (data != host) buffers_.push_back(std::move(device));
  return {data, dtype, shape};
}

Status WeightStore::check_all_used() const {
  for (const auto& [name, entry] : files_.entries()) {
    if (!used_.contains(name) && !is_redundant(name)) {
      return Status::invalid_argument(
          fmt::format("{}: tensor {} {} is not part of this architecture; weights and config.json "
                      "must come from the same model",
                      *entry.file, name, shape_text(entry.shape)));
    }
  }
  return Status::ok();
}

}  // namespace kvarn
