#include "models/weights.h"

#include <fmt/format.h>

#include <algorithm>
#include <cstring>
#include <numeric>
#include <optional>
#include <string_view>

#include "kernels/core/log.h"

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

// What a GPU's kernels read: bf16 matrices, bf16 or f32 vectors.
DType device_dtype(DType file, size_t dims) {
  if (dims > 1) return DType::kBF16;
  return file == DType::kF16 ? DType::kF32 : file;
}

template <typename From>
void convert_from(const std::byte* from, int64_t count, DType to, std::byte* out) {
  for (int64_t i = 0; i < count; ++i) {
    From value;  // the file may hold it at an odd address
    std::memcpy(&value, from + static_cast<size_t>(i) * sizeof(From), sizeof(From));
    if (to == DType::kBF16) {
      reinterpret_cast<bf16*>(out)[i] = to_bf16(to_float(value));
    } else {
      reinterpret_cast<float*>(out)[i] = to_float(value);
    }
  }
}

void convert_elements(const std::byte* from, DType from_dtype, int64_t count, DType to,
                      std::byte* out) {
  if (from_dtype == DType::kF16) {
    convert_from<half>(from, count, to, out);
  } else {
    CHECK(from_dtype == DType::kF32, "bf16 is never converted");
    convert_from<float>(from, count, to, out);
  }
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
  if (random_) {
    used_.insert(name);
    return make_random(name, shape);
  }
  KVARN_ASSIGN_OR_RETURN(const Found found, find(name, shape));
  if (!on_device_) return map(found, shape);
  Buffer memory = backend_.allocate(shape_bytes(device_dtype(found.dtype, shape.size()), shape));
  KVARN_ASSIGN_OR_RETURN(const Tensor tensor, copy_to_device(name, shape, memory, 0));
  buffers_.push_back(std::move(memory));
  return tensor;
}

Result<LinearWeight> WeightStore::get_stacked(const std::vector<std::string>& names,
                                              const std::vector<int64_t>& out_features,
                                              int64_t in_features) {
  LinearWeight weight;
  CHECK(names.size() == out_features.size() && names.size() <= weight.parts.size(),
        "one size per name, and room for every part");
  const int64_t rows = std::accumulate(out_features.begin(), out_features.end(), int64_t{0});
  Buffer memory;
  if (on_device_) memory = backend_.allocate(shape_bytes(DType::kBF16, {rows, in_features}));
  size_t offset = 0;
  for (size_t i = 0; i < names.size(); ++i) {
    Tensor& part = weight.parts[i];
    const std::initializer_list<int64_t> shape = {out_features[i], in_features};
    if (on_device_) {
      KVARN_ASSIGN_OR_RETURN(part, copy_to_device(names[i], shape, memory, offset));
      offset += part.bytes();
    } else {
      KVARN_ASSIGN_OR_RETURN(part, get(names[i], shape));
    }
    weight.num_parts += 1;
  }
  if (on_device_) buffers_.push_back(std::move(memory));
  return weight;
}

Result<WeightStore::Found> WeightStore::find(const std::string& name,
                                             std::initializer_list<int64_t> shape) {
  used_.insert(name);
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
  return Found{entry, *dtype};
}

Tensor WeightStore::map(const Found& found, std::initializer_list<int64_t> shape) {
  const SafetensorsEntry& entry = *found.entry;
  if (reinterpret_cast<uintptr_t>(entry.data) % dtype_bytes(found.dtype) == 0) {
    bytes_ += entry.bytes;
    return to_backend(entry.data, found.dtype, shape);
  }
  Buffer aligned = allocate_host(entry.bytes);
  std::memcpy(aligned.data(), entry.data, entry.bytes);
  return adopt(std::move(aligned), found.dtype, shape);
}

Result<Tensor> WeightStore::copy_to_device(const std::string& name,
                                           std::initializer_list<int64_t> shape, Buffer& memory,
                                           size_t offset) {
  std::byte* const data = memory.data() + offset;
  if (random_) {
    used_.insert(name);
    const Tensor tensor(data, DType::kBF16, shape);
    fill_random(name, tensor);
    bytes_ += tensor.bytes();
    return tensor;
  }
  KVARN_ASSIGN_OR_RETURN(const Found found, find(name, shape));
  const Tensor tensor(data, device_dtype(found.dtype, shape.size()), shape);
  if (tensor.dtype() == found.dtype) {
    backend_.upload(found.entry->data, tensor.bytes(), memory, offset);
  } else {
    upload_converted(found, tensor, memory, offset);
  }
  bytes_ += tensor.bytes();
  return tensor;
}

void WeightStore::upload_converted(const Found& found, const Tensor& to, Buffer& memory,
                                   size_t offset) {
  if (!told_of_conversion_) {
    told_of_conversion_ = true;
    log_info(fmt::format("weights_converted from={} to={} first=\"{}\"", dtype_name(found.dtype),
                         dtype_name(to.dtype()), found.entry->name));
  }
  constexpr int64_t kSlice = 1 << 20;  // elements: a few megabytes of host memory at a time
  const size_t from_bytes = dtype_bytes(found.dtype), to_bytes = dtype_bytes(to.dtype());
  Buffer slice = allocate_host(static_cast<size_t>(std::min(kSlice, to.size())) * to_bytes);
  for (int64_t first = 0; first < to.size(); first += kSlice) {
    const int64_t count = std::min(kSlice, to.size() - first);
    convert_elements(found.entry->data + static_cast<size_t>(first) * from_bytes, found.dtype,
                     count, to.dtype(), slice.data());
    backend_.upload(slice.data(), static_cast<size_t>(count) * to_bytes, memory,
                    offset + static_cast<size_t>(first) * to_bytes);
  }
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
  fill_random(name, tensor);
  bytes_ += tensor.bytes();
  buffers_.push_back(std::move(memory));
  return tensor;
}

void WeightStore::fill_random(const std::string& name, Tensor matrix) {
  backend_.fill_normal(matrix, kRandomStddev, seed_ ^ hash_name(name));
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
