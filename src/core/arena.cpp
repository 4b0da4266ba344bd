#include "core/arena.h"

namespace hgrn {

Tensor Arena::take(std::string_view name, Shape shape, DType dtype) {
  const size_t bytes = size_t(shape.numel()) * size_of(dtype);
  const size_t padded = (bytes + kAlign - 1) / kAlign * kAlign;
  Tensor t(base_ ? base_ + used_ : nullptr, dtype, shape);
  used_ += padded;
  if (base_) {
    check(used_ <= peak_, "arena {} asks for {} bytes in its second pass but counted {}", name_,
          used_, peak_);
    return t;
  }
  if (used_ > peak_) peak_ = used_;
  for (Row& row : rows_)
    if (row.name == name) {
      row.bytes += padded;
      return t;
    }
  rows_.push_back({std::string(name), padded});
  return t;
}

void Arena::bind(void* base) {
  base_ = static_cast<char*>(base);
  used_ = 0;
}

}  // namespace hgrn
