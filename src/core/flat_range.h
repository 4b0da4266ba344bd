// Parts of the flat buffers (core/params.h), and tensors that hold some parts of one.
#pragma once
#include <cstdint>
#include <utility>
#include <vector>

#include "core/tensor.h"

namespace hgrn {

// [begin, end), elements, padding included; end -1: to the end, where a function says so.
struct FlatRange {
  int64_t begin = 0, end = -1;
  int64_t size() const { return end - begin; }
};

inline int64_t total_size(const std::vector<FlatRange>& ranges) {
  int64_t size = 0;
  for (const FlatRange& r : ranges) size += r.size();
  return size;
}

// `data` (total_size(ranges)) has the ranges (ascending) of a flat buffer one after another.
struct RangedTensor {
  std::vector<FlatRange> ranges;
  Tensor data;

  // A part by its place in the flat buffer; it must lie in one of the ranges.
  Tensor part(FlatRange wanted) const {
    int64_t before = 0;
    for (const FlatRange& r : ranges) {
      if (r.begin <= wanted.begin && wanted.end <= r.end)
        return data.slice(before + wanted.begin - r.begin, wanted.size());
      before += r.size();
    }
    fail(Exit::failed, "[{}, {}) of the flat buffers is not on this rank", wanted.begin,
         wanted.end);
  }
};

}  // namespace hgrn
