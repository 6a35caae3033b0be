// Safetensors files by mmap. A file is 8 bytes of header length, a JSON header, and the tensors'
// bytes back to back; everything the header claims is checked against the file before a pointer is
// handed out, so a Tensor from here never reaches outside the mapping.
// Immutable after open; thread-safe to read.
#pragma once

#include <cstddef>
#include <filesystem>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "kernels/core/status.h"
#include "kernels/core/tensor.h"

namespace kvarn {

// A whole file, mapped read-only and privately. Move-only through unique_ptr.
class MappedFile {
 public:
  static Result<std::unique_ptr<MappedFile>> open(const std::filesystem::path& path);
  ~MappedFile();
  MappedFile(const MappedFile&) = delete;
  MappedFile& operator=(const MappedFile&) = delete;

  const std::byte* data() const { return data_; }
  size_t size() const { return size_; }

 private:
  MappedFile(const std::byte* data, size_t size) : data_(data), size_(size) {}
  const std::byte* data_;
  size_t size_;
};

// One tensor as its header describes it. `dtype` is the file's word ("BF16", "F8_E4M3", ...), known
// to us or not; bytes lie inside the mapping of `file`.
struct SafetensorsEntry {
  std::string name;
  std::string dtype;
  std::vector<int64_t> shape;
  const std::byte* data = nullptr;
  size_t bytes = 0;
  const std::string* file = nullptr;  // path for messages, owned by the set
};

// The tensors of one file, or of a directory: its index's files, or its model.safetensors, or its
// only *.safetensors file.
class Safetensors {
 public:
  static Result<Safetensors> open_file(const std::filesystem::path& path);
  static Result<Safetensors> open_directory(const std::filesystem::path& directory);

  const SafetensorsEntry* find(const std::string& name) const;
  const std::map<std::string, SafetensorsEntry>& entries() const { return entries_; }
  size_t mapped_bytes() const;
  // What the tensors were read from, for messages: the file, the index or the directory.
  const std::string& origin() const { return origin_; }

 private:
  Status add_file(const std::filesystem::path& path);
  static Result<Safetensors> open_index(const std::filesystem::path& index);

  std::string origin_;
  std::vector<std::unique_ptr<MappedFile>> files_;
  std::vector<std::unique_ptr<std::string>> paths_;
  std::map<std::string, SafetensorsEntry> entries_;
};

// "[1024, 128]"
std::string shape_text(const std::vector<int64_t>& shape);

}  // namespace kvarn
