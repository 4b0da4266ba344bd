// A part [begin, end) of the flat buffers (elements, padding included); end -1: to the end.
#pragma once
#include <cstdint>

namespace hgrn {

struct FlatRange {
  int64_t begin = 0, end = -1;
};

}  // namespace hgrn
