// safetensors files: u64 little-endian header length, JSON header {name: {dtype, shape,
// data_offsets}}, then the data. Every lie in a header (a length beyond the file, offsets that
// overlap, leave holes or do not match dtype * shape, ...) is Exit::data with file and tensor.
#pragma once
#include <cstdint>
#include <map>
#include <memory>
#include <string>
#include <string_view>
#include <unordered_map>
#include <vector>

#include "core/file.h"
#include "core/tensor.h"

namespace hgrn {

// Readers and writers of the format share these.
constexpr uint64_t kSafetensorsMaxHeader = 100'000'000;  // bytes, the limit of the reference
constexpr const char* kSafetensorsMetadataKey = "__metadata__";
uint64_t safetensors_dtype_size(std::string_view dtype);  // bytes an element; 0: unknown

struct TensorInfo {
  std::string name;
  std::string dtype;            // as in the file: "F32", "BF16", "F16", "F64", "I32", "U8", ...
  Shape shape;                  // at most 5 axes; a scalar has none
  uint64_t begin = 0, end = 0;  // bytes from the start of the data
};

// The header alone. `data_bytes` is what follows it in the file; `where` names the file.
struct SafetensorsHeader {
  std::vector<TensorInfo> tensors;  // in the order of their data
  std::map<std::string, std::string> metadata;
};
SafetensorsHeader parse_safetensors_header(std::string_view json, uint64_t data_bytes,
                                           const std::string& where);

// One open file. Everything is validated at opening, so reads can only fail if the disk does.
// Reading is thread-safe.
class SafetensorsReader {
 public:
  explicit SafetensorsReader(const std::string& path);
  const std::string& path() const { return path_; }
  const std::vector<TensorInfo>& tensors() const { return header_.tensors; }
  const TensorInfo* find(std::string_view name) const;  // null if there is none
  const std::map<std::string, std::string>& metadata() const { return header_.metadata; }

  // `count` elements from element `first` on (count -1: the rest), from F32, BF16, F16 or F64.
  void read_f32(const TensorInfo& t, float* out, int64_t first = 0, int64_t count = -1) const;
  void read_f64(const TensorInfo& t, double* out, int64_t first = 0, int64_t count = -1) const;
  // The bytes as they are.
  void read_raw(const TensorInfo& t, void* out) const;

 private:
  template <class T>
  void read_as(const TensorInfo& t, T* out, int64_t first, int64_t count) const;
  std::string path_;
  Fd fd_;
  uint64_t data_start_ = 0;
  SafetensorsHeader header_;
  std::unordered_map<std::string, size_t> index_;
};

// Writes one new file as a stream: all tensors declared first (begin and end are ignored), then
// their bytes in that order. finish() checks the count and fsyncs; without it the file is removed.
// The same calls give the same bytes.
class SafetensorsWriter {
 public:
  SafetensorsWriter(const std::string& path, std::vector<TensorInfo> tensors,
                    const std::map<std::string, std::string>& metadata);
  void write(const void* data, size_t bytes);
  void finish();
  uint64_t size() const { return out_->size(); }  // of the file so far
  uint64_t hash() const { return out_->hash(); }  // XXH3 of the file so far

 private:
  std::string path_;
  uint64_t data_bytes_ = 0, written_ = 0;
  std::unique_ptr<FileWriter> out_;
};

// A Hugging Face model folder: model.safetensors, or shards with model.safetensors.index.json.
class ModelFolder {
 public:
  explicit ModelFolder(const std::string& dir);
  const std::string& path() const { return dir_; }
  std::vector<std::string> names() const;               // sorted
  const TensorInfo* find(std::string_view name) const;  // null if there is none
  // A missing tensor or another shape is Exit::data naming tensor, found and expected shape.
  void read_f32(const std::string& name, const Shape& expected, float* out) const;
  void read_f64(const std::string& name, const Shape& expected, double* out) const;

 private:
  struct Entry {
    const SafetensorsReader* file;
    const TensorInfo* info;
  };
  const Entry& checked(const std::string& name, const Shape& expected) const;
  std::string dir_;
  std::vector<std::unique_ptr<SafetensorsReader>> files_;
  std::map<std::string, Entry, std::less<>> entries_;
};

}  // namespace hgrn
