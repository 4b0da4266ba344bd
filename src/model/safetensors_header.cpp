// The header of a safetensors file, read without trusting a byte of it.
#include <algorithm>
#include <limits>
#include <nlohmann/json.hpp>
#include <set>
#include <tuple>

#include "core/check.h"
#include "model/safetensors.h"

namespace hgrn {
namespace {

using nlohmann::json;

// Reads the JSON as events, so that neither deep nesting nor a huge array is ever built in memory,
// and a name given twice is seen. Depth 1: tensor names; 2: their fields; 3: numbers of a field.
class HeaderSax : public json::json_sax_t {
 public:
  HeaderSax(SafetensorsHeader& out, const std::string& where) : out_(out), where_(where) {}

  bool null() override { return unexpected("null"); }
  bool boolean(bool) override { return unexpected("a boolean"); }
  bool number_float(double, const std::string&) override { return unexpected("a fraction"); }
  bool binary(json::binary_t&) override { return unexpected("binary"); }
  bool number_integer(int64_t n) override {
    fail(Exit::data, "{}: tensor {}: negative number {} in {}", where_, tensor_.name, n, field_);
  }
  bool number_unsigned(uint64_t n) override {
    if (!in_array_) return unexpected("a number");
    if (field_ == "shape") {
      check(tensor_.shape.rank < Shape::kMaxRank, Exit::data, "{}: tensor {} has more than {} axes",
            where_, tensor_.name, int(Shape::kMaxRank));
      check(n <= uint64_t(std::numeric_limits<int64_t>::max()), Exit::data,
            "{}: tensor {}: axis of {} entries", where_, tensor_.name, n);
      tensor_.shape.dim[tensor_.shape.rank++] = int64_t(n);
    } else {
      check(offsets_ < 2, Exit::data, "{}: tensor {} has more than two data_offsets", where_,
            tensor_.name);
      (offsets_++ == 0 ? tensor_.begin : tensor_.end) = n;
    }
    return true;
  }
  bool string(std::string& s) override {
    if (in_metadata_) {
      check(out_.metadata.emplace(field_, s).second, Exit::data, "{}: metadata \"{}\" twice",
            where_, field_);
      return true;
    }
    if (depth_ != 2 || field_ != "dtype" || in_array_) return unexpected("a string");
    tensor_.dtype = s;
    return true;
  }
  bool start_object(size_t) override {
    if (depth_ >= 2 || in_array_) return unexpected("an object");
    if (++depth_ == 2) {
      in_metadata_ = name_ == kSafetensorsMetadataKey;
      tensor_ = TensorInfo{};
      tensor_.name = name_;
      offsets_ = 0;
      fields_.clear();
    }
    return true;
  }
  bool key(std::string& k) override {
    if (depth_ == 1) {
      check(names_.insert(k).second, Exit::data, "{}: tensor {} is described twice", where_, k);
      name_ = k;
      return true;
    }
    field_ = k;
    if (in_metadata_) return true;
    check(k == "dtype" || k == "shape" || k == "data_offsets", Exit::data,
          "{}: tensor {} has an unknown field \"{}\"", where_, tensor_.name, k);
    check(fields_.insert(k).second, Exit::data, "{}: tensor {} has {} twice", where_, tensor_.name,
          k);
    return true;
  }
  bool end_object() override {
    if (depth_-- == 2 && !in_metadata_) {
      check(fields_.size() == 3 && offsets_ == 2, Exit::data,
            "{}: tensor {} lacks dtype, shape or data_offsets", where_, tensor_.name);
      out_.tensors.push_back(tensor_);
    }
    in_metadata_ = false;
    return true;
  }
  bool start_array(size_t) override {
    const bool wanted = depth_ == 2 && !in_metadata_ && !in_array_ && field_ != "dtype";
    if (!wanted) return unexpected("an array");
    in_array_ = true;
    return true;
  }
  bool end_array() override {
    in_array_ = false;
    return true;
  }
  bool parse_error(size_t at, const std::string&, const json::exception&) override {
    fail(Exit::data, "{}: the header is not valid JSON at byte {}", where_, 8 + at);
  }

 private:
  bool unexpected(const char* what) {
    fail(Exit::data, "{}: the header has {} where none belongs (tensor {}, field {})", where_, what,
         name_, field_);
  }
  SafetensorsHeader& out_;
  const std::string& where_;
  TensorInfo tensor_;
  std::string name_, field_;
  std::set<std::string> names_, fields_;
  int depth_ = 0, offsets_ = 0;
  bool in_metadata_ = false, in_array_ = false;
};

// dtype * shape; an unknown dtype (0 bytes) is only refused when it is read.
void check_size(const TensorInfo& t, const std::string& where) {
  const uint64_t unit = safetensors_dtype_size(t.dtype);
  uint64_t bytes = unit ? unit : 1;
  int64_t elements = 1;
  for (int i = 0; i < t.shape.rank; ++i) {
    const bool fits = !__builtin_mul_overflow(bytes, uint64_t(t.shape.dim[i]), &bytes) &&
                      !__builtin_mul_overflow(elements, t.shape.dim[i], &elements);
    check(fits, Exit::data, "{}: tensor {}: shape {} overflows 64 bits", where, t.name,
          t.shape.str());
  }
  check(unit == 0 || bytes == t.end - t.begin, Exit::data,
        "{}: tensor {}: {} {} needs {} bytes, data_offsets [{}, {}] hold {}", where, t.name,
        t.dtype, t.shape.str(), bytes, t.begin, t.end, t.end - t.begin);
}

}  // namespace

uint64_t safetensors_dtype_size(std::string_view dtype) {
  static const std::map<std::string_view, uint64_t> sizes = {
      {"F64", 8},  {"F32", 4},     {"F16", 2},     {"BF16", 2}, {"I64", 8}, {"I32", 4},
      {"I16", 2},  {"I8", 1},      {"U64", 8},     {"U32", 4},  {"U16", 2}, {"U8", 1},
      {"BOOL", 1}, {"F8_E4M3", 1}, {"F8_E5M2", 1}, {"C64", 8}};
  const auto it = sizes.find(dtype);
  return it == sizes.end() ? 0 : it->second;
}

SafetensorsHeader parse_safetensors_header(std::string_view text, uint64_t data_bytes,
                                           const std::string& where) {
  check(!text.empty() && text.front() == '{', Exit::data, "{}: the header does not start with '{{'",
        where);
  SafetensorsHeader header;
  HeaderSax sax(header, where);
  json::sax_parse(text.begin(), text.end(), &sax);
  std::sort(header.tensors.begin(), header.tensors.end(),
            [](const TensorInfo& a, const TensorInfo& b) {
              return std::tie(a.begin, a.end, a.name) < std::tie(b.begin, b.end, b.name);
            });
  uint64_t at = 0;
  for (const TensorInfo& t : header.tensors) {
    check(
        t.begin <= t.end && t.end <= data_bytes, Exit::data,
        "{}: tensor {}: data_offsets [{}, {}] do not lie in the {} bytes of data; the file is cut "
        "short or damaged",
        where, t.name, t.begin, t.end, data_bytes);
    check(t.begin == at, Exit::data, "{}: tensor {} starts at byte {} of the data, not at {}: {}",
          where, t.name, t.begin, at, t.begin < at ? "tensors overlap" : "there is a hole");
    check_size(t, where);
    at = t.end;
  }
  check(at == data_bytes, Exit::data, "{}: {} bytes follow the last tensor's end at byte {}", where,
        data_bytes - at, at);
  return header;
}

}  // namespace hgrn
