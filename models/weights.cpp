#include "models/weights.h"

#include <fmt/format.h>

#include <algorithm>
#include <cstring>
#include <optional>
#include <string_view>

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

}  // namespace

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
  if (shape.size() == 1) {
    Buffer host = allocate_host(shape_bytes(DType::kBF16, shape));
    auto* gains = reinterpret_cast<bf16*>(host.data());
    std::fill_n(gains, *shape.begin(), to_bf16(1.f));
    return adopt(std::move(host), DType::kBF16, shape);
  }
  Buffer memory = backend_.allocate(shape_bytes(DType::kBF16, shape));
  const Tensor tensor(memory.data(), DType::kBF16, shape);
  backend_.fill_normal(tensor, kRandomStddev, seed_ ^ hash_name(name));
  bytes_ += tensor.bytes();
  buffers_.push_back(std::move(memory));
  return tensor;
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
