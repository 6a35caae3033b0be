// WeightStore owns a model's weights and hands them out by name: mapped from safetensors files and
// used in place, or random for benchmarks. On the CPU no tensor is copied; one whose bytes are
// misaligned for its dtype is the exception. A GPU gets copies: matrices in bf16 whatever the file
// holds (its kernels know no other), stacked ones contiguous; vectors in bf16 or f32. A store must
// outlive every Tensor taken from it. Worker thread only; Tensors may be read from any thread.
#pragma once

#include <filesystem>
#include <memory>
#include <set>
#include <string>
#include <vector>

#include "kernels/backend.h"
#include "models/safetensors.h"

namespace kvarn {

class WeightStore {
 public:
  // Opens and checks the files of a model directory (models/safetensors.h).
  static Result<std::unique_ptr<WeightStore>> from_directory(const std::filesystem::path& directory,
                                                             Backend& backend);
  // Every get() makes its tensor in bf16: matrices N(0, 0.02), vectors (norm gains) 1. Values
  // depend on seed and name alone.
  static std::unique_ptr<WeightStore> random(uint64_t seed, Backend& backend);

  // The tensor `name`, which must have exactly this shape and dtype bf16, f16 or f32. Throws
  // std::bad_alloc where the device has no room.
  Result<Tensor> get(const std::string& name, std::initializer_list<int64_t> shape);
  // The matrices `names`, [out_features[i], in_features] each, as the row blocks of one. On a GPU
  // they lie one after another in memory and so are one matrix.
  Result<LinearWeight> get_stacked(const std::vector<std::string>& names,
                                   const std::vector<int64_t>& out_features, int64_t in_features);
  // Names that get() never took are an error: they belong to another model, and ignoring them would
  // answer with the wrong one. Redundant copies that checkpoints carry are passed over.
  Status check_all_used() const;
  // Keeps the array that `host` holds, in the backend's memory (tables that a model computes).
  Tensor adopt(Buffer host, DType dtype, std::initializer_list<int64_t> shape);

  size_t bytes() const { return bytes_; }  // of everything handed out

 private:
  explicit WeightStore(Backend& backend)
      : backend_(backend), on_device_(backend.device_memory().has_value()) {}
  Tensor to_backend(const std::byte* host, DType dtype, std::initializer_list<int64_t> shape);
  // The checked entry of a file and its dtype.
  struct Found {
    const SafetensorsEntry* entry;
    DType dtype;
  };
  Result<Found> find(const std::string& name, std::initializer_list<int64_t> shape);
  Tensor map(const Found& found, std::initializer_list<int64_t> shape);
  // Writes the tensor at `offset` of `memory` on the device.
  Result<Tensor> copy_to_device(const std::string& name, std::initializer_list<int64_t> shape,
                                Buffer& memory, size_t offset);
  void upload_converted(const Found& found, const Tensor& to, Buffer& memory, size_t offset);
  Tensor make_random(const std::string& name, std::initializer_list<int64_t> shape);
  void fill_random(const std::string& name, Tensor matrix);

  Backend& backend_;
  const bool on_device_;
  bool told_of_conversion_ = false;
  bool random_ = false;
  uint64_t seed_ = 0;
  Safetensors files_;
  std::set<std::string> used_;
  std::vector<Buffer> buffers_;  // host or device memory that the store owns
  size_t bytes_ = 0;
};

}  // namespace kvarn
