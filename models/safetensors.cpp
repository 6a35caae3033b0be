#include "models/safetensors.h"

#include <fcntl.h>
#include <fmt/format.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <fstream>
#include <limits>
#include <nlohmann/json.hpp>
#include <optional>
#include <set>

namespace kvarn {
namespace {

namespace fs = std::filesystem;
using Json = nlohmann::json;

constexpr uint64_t kMaxHeaderBytes = 100'000'000;  // the format's own limit
constexpr int kMaxDepth = 16;  // of JSON; a header has 3, metadata may hold what it likes
constexpr const char* kAgain = "download the file again";

// Bits per element of every dtype word of the format; unknown words are refused.
std::optional<uint64_t> dtype_bits(std::string_view word) {
  struct Known {
    std::string_view word;
    uint64_t bits;
  };
  static constexpr Known kKnown[] = {
      {"F64", 64}, {"I64", 64}, {"U64", 64},    {"C64", 64},    {"F32", 32},    {"I32", 32},
      {"U32", 32}, {"F16", 16}, {"BF16", 16},   {"I16", 16},    {"U16", 16},    {"I8", 8},
      {"U8", 8},   {"BOOL", 8}, {"F8_E4M3", 8}, {"F8_E5M2", 8}, {"F8_E8M0", 8}, {"F4", 4},
  };
  for (const Known& known : kKnown) {
    if (known.word == word) return known.bits;
  }
  return std::nullopt;
}

// Names come from the file: keep messages to one readable line.
std::string shown(std::string_view text) {
  std::string out;
  for (const char c : text.substr(0, 120)) {
    out += static_cast<unsigned char>(c) < 0x20 || c == 0x7f ? '?' : c;
  }
  return text.size() > 120 ? out + "..." : out;
}

struct ParsedJson {
  Json root;
  std::string duplicate;  // a key that its object holds twice; the parser would keep the last
  bool too_deep = false;
};

ParsedJson parse_json(const char* begin, const char* end) {
  ParsedJson parsed;
  std::vector<std::set<std::string>> keys;
  const auto watch = [&](int depth, Json::parse_event_t event, Json& value) {
    if (depth > kMaxDepth) parsed.too_deep = true;
    if (event == Json::parse_event_t::object_start) keys.emplace_back();
    if (event == Json::parse_event_t::object_end) keys.pop_back();
    if (event == Json::parse_event_t::key && parsed.duplicate.empty()) {
      auto name = value.get<std::string>();
      if (!keys.back().insert(name).second) parsed.duplicate = std::move(name);
    }
    return true;
  };
  parsed.root = Json::parse(begin, end, watch, /*allow_exceptions=*/false);
  return parsed;
}

std::optional<uint64_t> as_unsigned(const Json& value) {
  if (!value.is_number_integer()) return std::nullopt;
  if (!value.is_number_unsigned() && value.get<int64_t>() < 0) return std::nullopt;
  return value.get<uint64_t>();
}

// Elements times bits / 8, or nothing when it overflows or is no whole number of bytes.
std::optional<uint64_t> tensor_bytes(const std::vector<int64_t>& shape, uint64_t bits) {
  uint64_t total = bits;
  for (const int64_t extent : shape) {
    if (__builtin_mul_overflow(total, static_cast<uint64_t>(extent), &total)) return std::nullopt;
  }
  if (total % 8 != 0) return std::nullopt;
  return total / 8;
}

struct Span {
  uint64_t begin, end;
  const std::string* name;
};

// One header entry, checked on its own (dtype, shape, offsets inside the data).
Result<SafetensorsEntry> parse_entry(const std::string& file, const std::string& name,
                                     const Json& value, const std::byte* data,
                                     uint64_t data_bytes) {
  const auto bad = [&](const std::string& what) {
    return Status::invalid_argument(
        fmt::format("{}: tensor {}: {}; {}", file, shown(name), what, kAgain));
  };
  if (!value.is_object() || !value.contains("dtype") || !value.contains("shape") ||
      !value.contains("data_offsets")) {
    return bad("the header lacks dtype, shape or data_offsets");
  }
  SafetensorsEntry entry;
  entry.name = name;
  const Json& dtype = value.at("dtype");
  const std::optional<uint64_t> bits =
      dtype.is_string() ? dtype_bits(dtype.get_ref<const std::string&>()) : std::nullopt;
  if (!bits)
    return bad(fmt::format("unknown dtype {}",
                           shown(dtype.dump(-1, ' ', true, Json::error_handler_t::replace))));
  entry.dtype = dtype.get<std::string>();

  const Json& shape = value.at("shape");
  if (!shape.is_array() || shape.size() > 8) return bad("shape must be a list of at most 8 sizes");
  for (const Json& extent : shape) {
    const std::optional<uint64_t> size = as_unsigned(extent);
    if (!size || *size > static_cast<uint64_t>(std::numeric_limits<int64_t>::max())) {
      return bad("shape must hold sizes from 0 up");
    }
    entry.shape.push_back(static_cast<int64_t>(*size));
  }

  const Json& offsets = value.at("data_offsets");
  const bool is_pair = offsets.is_array() && offsets.size() == 2;
  const std::optional<uint64_t> begin = is_pair ? as_unsigned(offsets[0]) : std::nullopt;
  const std::optional<uint64_t> end = is_pair ? as_unsigned(offsets[1]) : std::nullopt;
  if (!begin || !end || *begin > *end)
    return bad("data_offsets must be [begin, end] with begin <= end");
  if (*end > data_bytes) {
    return bad(
        fmt::format("its bytes end at {} of the data but the file holds only {}: the file is "
                    "truncated",
                    *end, data_bytes));
  }
  const std::optional<uint64_t> expected = tensor_bytes(entry.shape, *bits);
  if (!expected || *expected != *end - *begin) {
    return bad(fmt::format("shape {} of {} needs {} bytes but data_offsets span {}",
                           shape_text(entry.shape), entry.dtype,
                           expected ? std::to_string(*expected) : "too many", *end - *begin));
  }
  entry.data = data + *begin;
  entry.bytes = *end - *begin;
  return entry;
}

// The format stores tensors back to back: an overlap or a hole means a damaged or crafted header.
Status check_layout(const std::string& file, std::vector<Span>& spans, uint64_t data_bytes) {
  std::sort(spans.begin(), spans.end(), [](const Span& a, const Span& b) {
    return a.begin != b.begin ? a.begin < b.begin : a.end < b.end;
  });
  uint64_t at = 0;
  const std::string* before = nullptr;
  for (const Span& span : spans) {
    if (span.begin < at) {
      return Status::invalid_argument(fmt::format("{}: tensors {} and {} overlap in the file; {}",
                                                  file, shown(*before), shown(*span.name), kAgain));
    }
    if (span.begin > at) {
      return Status::invalid_argument(fmt::format("{}: {} unused bytes before tensor {}; {}", file,
                                                  span.begin - at, shown(*span.name), kAgain));
    }
    at = span.end;
    before = span.name;
  }
  if (at != data_bytes) {
    return Status::invalid_argument(
        fmt::format("{}: {} bytes after the last tensor that the header does not name; {}", file,
                    data_bytes - at, kAgain));
  }
  return Status::ok();
}

Result<std::string> read_text(const fs::path& path) {
  std::ifstream in(path, std::ios::binary);
  if (!in) return Status::not_found(fmt::format("{}: cannot be read", path.string()));
  return std::string(std::istreambuf_iterator<char>(in), {});
}

// A file of the index must lie beside it: anything else could read what the user did not name.
bool is_plain_name(const std::string& name) {
  return !name.empty() && name != "." && name != ".." &&
         name.find_first_of(std::string_view("/\\\0", 3)) == std::string::npos;
}

}  // namespace

std::string shape_text(const std::vector<int64_t>& shape) {
  return fmt::format("[{}]", fmt::join(shape, ", "));
}

Result<std::unique_ptr<MappedFile>> MappedFile::open(const fs::path& path) {
  const auto failed = [&](const char* what) {
    return Status::not_found(fmt::format("{}: {}: {}", path.string(), what, std::strerror(errno)));
  };
  const int fd = ::open(path.c_str(), O_RDONLY | O_CLOEXEC);
  if (fd < 0) return failed("cannot be opened");
  struct stat info {};
  if (fstat(fd, &info) != 0 || !S_ISREG(info.st_mode)) {
    ::close(fd);
    return Status::invalid_argument(fmt::format("{}: not a regular file", path.string()));
  }
  const auto size = static_cast<size_t>(info.st_size);
  if (size == 0) {
    ::close(fd);
    return Status::invalid_argument(
        fmt::format("{}: the file is empty; {}", path.string(), kAgain));
  }
  void* data = mmap(nullptr, size, PROT_READ, MAP_PRIVATE, fd, 0);
  ::close(fd);
  if (data == MAP_FAILED) return failed("cannot be mapped");
  madvise(data, size, MADV_WILLNEED);  // start reading ahead; a refusal only costs speed
  return std::unique_ptr<MappedFile>(new MappedFile(static_cast<std::byte*>(data), size));
}

MappedFile::~MappedFile() { munmap(const_cast<std::byte*>(data_), size_); }

Status Safetensors::add_file(const fs::path& path) {
  KVARN_ASSIGN_OR_RETURN(std::unique_ptr<MappedFile> file, MappedFile::open(path));
  const std::string& name = *paths_.emplace_back(std::make_unique<std::string>(path.string()));
  const auto bad = [&](const std::string& what) {
    return Status::invalid_argument(fmt::format("{}: {}; {}", name, what, kAgain));
  };
  uint64_t header_bytes = 0;
  if (file->size() < sizeof(header_bytes)) {
    return bad(fmt::format("{} bytes are no safetensors file: it is truncated", file->size()));
  }
  std::memcpy(&header_bytes, file->data(), sizeof(header_bytes));  // little-endian, as this host
  const uint64_t rest = file->size() - sizeof(header_bytes);
  if (header_bytes > kMaxHeaderBytes) {
    return bad(fmt::format("a header of {} bytes is above the format's {}: not a safetensors file",
                           header_bytes, kMaxHeaderBytes));
  }
  if (header_bytes > rest) {
    return bad(fmt::format("the header needs {} bytes but the file holds only {}: it is truncated",
                           header_bytes, rest));
  }
  const char* header = reinterpret_cast<const char*>(file->data()) + sizeof(header_bytes);
  const ParsedJson parsed = parse_json(header, header + header_bytes);
  if (!parsed.root.is_object() || parsed.too_deep) return bad("the header is not a JSON object");
  if (!parsed.duplicate.empty()) {
    return bad(fmt::format("tensor {} is in the header twice", shown(parsed.duplicate)));
  }

  const std::byte* data = file->data() + sizeof(header_bytes) + header_bytes;
  const uint64_t data_bytes = rest - header_bytes;
  std::vector<Span> spans;
  for (const auto& [key, value] : parsed.root.items()) {
    if (key == "__metadata__") continue;
    KVARN_ASSIGN_OR_RETURN(SafetensorsEntry entry, parse_entry(name, key, value, data, data_bytes));
    entry.file = &name;
    const auto begin = static_cast<uint64_t>(entry.data - data);
    const uint64_t end = begin + entry.bytes;
    const auto [it, added] = entries_.emplace(key, std::move(entry));
    if (!added) {
      return Status::invalid_argument(fmt::format(
          "tensor {} is in both {} and {}; keep one of them", shown(key), *it->second.file, name));
    }
    spans.push_back({begin, end, &it->first});
  }
  files_.push_back(std::move(file));
  return check_layout(name, spans, data_bytes);
}

Result<Safetensors> Safetensors::open_file(const fs::path& path) {
  Safetensors set;
  set.origin_ = path.string();
  KVARN_RETURN_IF_ERROR(set.add_file(path));
  return set;
}

Result<Safetensors> Safetensors::open_index(const fs::path& index) {
  KVARN_ASSIGN_OR_RETURN(const std::string text, read_text(index));
  const auto bad = [&](const std::string& what) {
    return Status::invalid_argument(fmt::format("{}: {}", index.string(), what));
  };
  const ParsedJson parsed = parse_json(text.data(), text.data() + text.size());
  if (!parsed.root.is_object() || parsed.too_deep) {
    return bad(fmt::format("not a JSON object; {}", kAgain));
  }
  if (!parsed.duplicate.empty()) {
    return bad(fmt::format("{} is named twice; {}", shown(parsed.duplicate), kAgain));
  }
  const auto map = parsed.root.find("weight_map");
  if (map == parsed.root.end() || !map->is_object() || map->empty()) {
    return bad(fmt::format("\"weight_map\" must name the file of each tensor; {}", kAgain));
  }

  std::set<std::string> names;
  for (const auto& [tensor, value] : map->items()) {
    if (!value.is_string())
      return bad(fmt::format("the file of tensor {} is not a string; {}", shown(tensor), kAgain));
    const auto& name = value.get_ref<const std::string&>();
    if (!is_plain_name(name)) {
      return bad(
          fmt::format("tensor {} points to \"{}\": a file must lie beside the index and be "
                      "named without a path",
                      shown(tensor), shown(name)));
    }
    names.insert(name);
  }
  Safetensors set;
  set.origin_ = index.string();
  for (const std::string& name : names) {
    const fs::path path = index.parent_path() / name;
    if (!fs::exists(path)) {
      return Status::not_found(fmt::format("{}: named by {} but missing; {}", path.string(),
                                           index.filename().string(), kAgain));
    }
    KVARN_RETURN_IF_ERROR(set.add_file(path));
  }
  for (const auto& [tensor, value] : map->items()) {
    const SafetensorsEntry* entry = set.find(tensor);
    const std::string file = (index.parent_path() / value.get<std::string>()).string();
    if (entry == nullptr) {
      return bad(fmt::format("tensor {} should be in {} but is in no file; {}", shown(tensor),
                             shown(file), kAgain));
    }
    if (*entry->file != file) {
      return bad(fmt::format("tensor {} should be in {} but is in {}; {}", shown(tensor),
                             shown(file), *entry->file, kAgain));
    }
  }
  for (const auto& [tensor, entry] : set.entries_) {
    if (!map->contains(tensor)) {
      return bad(fmt::format("tensor {} of {} is not in the index; {}", shown(tensor), *entry.file,
                             kAgain));
    }
  }
  return set;
}

Result<Safetensors> Safetensors::open_directory(const fs::path& directory) {
  std::error_code error;
  if (!fs::is_directory(directory, error)) {
    return Status::not_found(fmt::format(
        "{}: no such directory; --model takes one that holds config.json and *.safetensors",
        directory.string()));
  }
  const fs::path index = directory / "model.safetensors.index.json";
  if (fs::exists(index, error)) return open_index(index);
  const fs::path single = directory / "model.safetensors";
  if (fs::exists(single, error)) return open_file(single);
  std::vector<fs::path> found;
  for (const auto& item : fs::directory_iterator(directory, error)) {
    if (item.path().extension() == ".safetensors") found.push_back(item.path());
  }
  if (found.size() == 1) return open_file(found.front());
  if (found.empty()) {
    return Status::not_found(
        fmt::format("{}: holds no *.safetensors; download the model's weights (or use "
                    "--load-format dummy for benchmarks)",
                    directory.string()));
  }
  return Status::not_found(
      fmt::format("{}: holds {} *.safetensors files but no model.safetensors.index.json; download "
                  "the index too",
                  directory.string(), found.size()));
}

const SafetensorsEntry* Safetensors::find(const std::string& name) const {
  const auto it = entries_.find(name);
  return it == entries_.end() ? nullptr : &it->second;
}

size_t Safetensors::mapped_bytes() const {
  size_t total = 0;
  for (const auto& file : files_) total += file->size();
  return total;
}

}  // namespace kvarn
