#include "model/safetensors.h"

#include <algorithm>
#include <bit>
#include <cstring>
#include <nlohmann/json.hpp>
#include <set>
#include <type_traits>

#include "core/check.h"
#include "core/json_text.h"

namespace hgrn {
namespace {

static_assert(std::endian::native == std::endian::little, "the format's numbers are little-endian");
constexpr size_t kChunkElements = size_t(1) << 18;  // of a conversion
constexpr uint64_t kMaxIndexBytes = 100'000'000;

template <class T>
void convert(T* out, const unsigned char* in, size_t n, std::string_view dtype) {
  const auto each = [&](auto raw, auto to_value) {
    for (size_t i = 0; i < n; ++i) {
      std::memcpy(&raw, in + i * sizeof raw, sizeof raw);
      out[i] = T(to_value(raw));
    }
  };
  if (dtype == "F32") each(float{}, [](float x) { return x; });
  if (dtype == "F64") each(double{}, [](double x) { return x; });
  if (dtype == "BF16") each(uint16_t{}, bf16_to_float);
  if (dtype == "F16") each(uint16_t{}, f16_to_float);
}

bool is_float(std::string_view dtype) {
  return dtype == "F32" || dtype == "F64" || dtype == "BF16" || dtype == "F16";
}

}  // namespace

// ---- reading

SafetensorsReader::SafetensorsReader(const std::string& path)
    : path_(path), fd_(open_for_read(path)) {
  const uint64_t size = file_size(path);
  check(size >= 8, Exit::data, "{}: {} bytes are too few for a safetensors file", path, size);
  uint64_t length = 0;
  pread_exact(fd_, path, &length, 8, 0);
  check(length <= kSafetensorsMaxHeader, Exit::data,
        "{}: header of {} bytes, at most {} are allowed; this is no safetensors file", path, length,
        kSafetensorsMaxHeader);
  check(length <= size - 8, Exit::data,
        "{}: header of {} bytes in a file of {}; it is cut short or no safetensors file", path,
        length, size);
  std::string text(size_t(length), '\0');
  pread_exact(fd_, path, text.data(), text.size(), 8);
  data_start_ = 8 + length;
  header_ = parse_safetensors_header(text, size - data_start_, path);
  for (size_t i = 0; i < header_.tensors.size(); ++i) index_[header_.tensors[i].name] = i;
}

const TensorInfo* SafetensorsReader::find(std::string_view name) const {
  const auto it = index_.find(std::string(name));
  return it == index_.end() ? nullptr : &header_.tensors[it->second];
}

template <class T>
void SafetensorsReader::read_as(const TensorInfo& t, T* out, int64_t first, int64_t count) const {
  check(is_float(t.dtype), Exit::data, "{}: tensor {} is {}; F32, BF16, F16 or F64 is needed here",
        path_, t.name, t.dtype);
  const int64_t numel = t.shape.numel();
  if (count < 0) count = numel - first;
  check(first >= 0 && first <= numel && count >= 0 && count <= numel - first,
        "elements [{}, {}) of {} {} in {}", first, first + count, t.name, t.shape.str(), path_);
  const size_t unit = safetensors_dtype_size(t.dtype);
  uint64_t at = data_start_ + t.begin + uint64_t(first) * unit;
  if (t.dtype == (std::is_same_v<T, float> ? "F32" : "F64")) {
    pread_exact(fd_, path_, out, size_t(count) * unit, at);
    return;
  }
  std::vector<unsigned char> chunk(std::min(size_t(count), kChunkElements) * unit);
  for (int64_t done = 0; done < count;) {
    const size_t n = std::min(size_t(count - done), kChunkElements);
    pread_exact(fd_, path_, chunk.data(), n * unit, at);
    convert(out + done, chunk.data(), n, t.dtype);
    at += n * unit, done += int64_t(n);
  }
}

void SafetensorsReader::read_f32(const TensorInfo& t, float* out, int64_t first,
                                 int64_t count) const {
  read_as(t, out, first, count);
}

void SafetensorsReader::read_f64(const TensorInfo& t, double* out, int64_t first,
                                 int64_t count) const {
  read_as(t, out, first, count);
}

void SafetensorsReader::read_raw(const TensorInfo& t, void* out) const {
  pread_exact(fd_, path_, out, size_t(t.end - t.begin), data_start_ + t.begin);
}

// ---- writing

SafetensorsWriter::SafetensorsWriter(const std::string& path, std::vector<TensorInfo> tensors,
                                     const std::map<std::string, std::string>& metadata)
    : path_(path) {
  nlohmann::ordered_json header = nlohmann::ordered_json::object();
  if (!metadata.empty()) header[kSafetensorsMetadataKey] = metadata;
  std::set<std::string> names;  // ordered_json looks keys up one by one: too slow for many
  for (const TensorInfo& t : tensors) {
    const uint64_t unit = safetensors_dtype_size(t.dtype);
    check(unit > 0, "{}: tensor {}: unknown dtype {}", path, t.name, t.dtype);
    check(names.insert(t.name).second && t.name != kSafetensorsMetadataKey,
          "{}: tensor {} is declared twice", path, t.name);
    const uint64_t end = data_bytes_ + uint64_t(t.shape.numel()) * unit;
    nlohmann::ordered_json entry;
    entry["dtype"] = t.dtype;
    entry["shape"] = std::vector<int64_t>(t.shape.dim, t.shape.dim + t.shape.rank);
    entry["data_offsets"] = {data_bytes_, end};
    header.get_ref<nlohmann::ordered_json::object_t&>().emplace_back(t.name, std::move(entry));
    data_bytes_ = end;
  }
  std::string text;
  try {
    text = header.dump();
  } catch (const nlohmann::json::exception& e) {
    fail(Exit::failed, "{}: a name is not UTF-8: {}", path, e.what());
  }
  text.append((8 - text.size() % 8) % 8, ' ');
  const uint64_t length = text.size();
  check(length <= kSafetensorsMaxHeader, "{}: header of {} bytes", path, length);
  out_ = std::make_unique<FileWriter>(path, 8 + length + data_bytes_);
  out_->write(&length, 8);
  out_->write(text.data(), text.size());
}

void SafetensorsWriter::write(const void* data, size_t bytes) {
  check(bytes <= data_bytes_ - written_, "{}: more data than was declared ({} bytes)", path_,
        data_bytes_);
  out_->write(data, bytes);
  written_ += bytes;
}

void SafetensorsWriter::finish() {
  check(written_ == data_bytes_, "{}: {} bytes written, {} declared", path_, written_, data_bytes_);
  out_->finish();
}

// ---- folders

ModelFolder::ModelFolder(const std::string& dir) : dir_(dir) {
  check(is_folder(dir), Exit::data, "{} is not a folder; a model or checkpoint folder is needed",
        dir);
  const std::string single = dir + "/model.safetensors", index = single + ".index.json";
  const auto open = [&](const std::string& path) {
    files_.push_back(std::make_unique<SafetensorsReader>(path));
    return files_.back().get();
  };
  if (exists(single)) {
    const SafetensorsReader* file = open(single);
    for (const TensorInfo& t : file->tensors()) entries_[t.name] = {file, &t};
    return;
  }
  check(exists(index), Exit::data,
        "{} holds neither model.safetensors nor model.safetensors.index.json", dir);
  const nlohmann::ordered_json root = parse_json(read_file(index, kMaxIndexBytes), index);
  check(root.is_object() && root.contains("weight_map") && root["weight_map"].is_object(),
        Exit::data, "{}: no object \"weight_map\"", index);
  std::map<std::string, const SafetensorsReader*> opened;
  for (const auto& [name, value] : root["weight_map"].items()) {
    check(value.is_string(), Exit::data, "{}: the file of {} is not a string", index, name);
    const std::string file = value.get<std::string>();
    check(!file.empty() && file.find('/') == std::string::npos && file[0] != '.', Exit::data,
          "{}: tensor {}: \"{}\" is not a file name of this folder", index, name, file);
    const SafetensorsReader*& reader = opened[file];
    if (!reader) reader = open(dir + "/" + file);
    const TensorInfo* info = reader->find(name);
    check(info != nullptr, Exit::data, "{}: tensor {} is not in {}", index, name, file);
    entries_[name] = {reader, info};
  }
}

std::vector<std::string> ModelFolder::names() const {
  std::vector<std::string> names;
  for (const auto& [name, entry] : entries_) names.push_back(name);
  return names;
}

const TensorInfo* ModelFolder::find(std::string_view name) const {
  const auto it = entries_.find(name);
  return it == entries_.end() ? nullptr : it->second.info;
}

const ModelFolder::Entry& ModelFolder::checked(const std::string& name,
                                               const Shape& expected) const {
  const auto it = entries_.find(name);
  check(it != entries_.end(), Exit::data, "{}: tensor {} is missing", dir_, name);
  check(it->second.info->shape == expected, Exit::data,
        "{}: tensor {} has shape {}, {} is expected; does the config belong to these weights?",
        it->second.file->path(), name, it->second.info->shape.str(), expected.str());
  return it->second;
}

void ModelFolder::read_f32(const std::string& name, const Shape& expected, float* out) const {
  const Entry& e = checked(name, expected);
  e.file->read_f32(*e.info, out);
}

void ModelFolder::read_f64(const std::string& name, const Shape& expected, double* out) const {
  const Entry& e = checked(name, expected);
  e.file->read_f64(*e.info, out);
}

}  // namespace hgrn
