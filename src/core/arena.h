// Memory by lifetime. An Arena hands out named, aligned tensors from one block.
// It is laid out twice by the same code: first unbound (tensors without memory, sizes counted;
// this is all that `hgrn plan` needs), then bound to a block of peak() bytes. Nothing is allocated
// after start-up, and the plan cannot disagree with the run.
//
//   Arena acts("activations");
//   layout(acts);                                  // counts
//   acts.bind(ops.alloc(acts.peak(), acts.name()));
//   layout(acts);                                  // hands out memory
#pragma once
#include <cstddef>
#include <string>
#include <string_view>
#include <vector>

#include "core/tensor.h"

namespace hgrn {

class Arena {
 public:
  static constexpr size_t kAlign = 256;  // bytes; what cuBLASLt and 512-bit vectors like
  struct Row {
    std::string name;
    size_t bytes;
  };

  explicit Arena(std::string name) : name_(std::move(name)) {}

  // The next tensor. Its data is null while the arena is unbound.
  Tensor take(std::string_view name, Shape shape, DType dtype);

  // Stack discipline for scratch: what was taken after mark() is given back by release(mark).
  size_t mark() const { return used_; }
  void release(size_t mark) { used_ = mark; }

  // Starts the second pass over a block of at least peak() bytes.
  void bind(void* base);

  const std::string& name() const { return name_; }
  size_t peak() const { return peak_; }                   // bytes
  const std::vector<Row>& rows() const { return rows_; }  // one a name, bytes summed

 private:
  std::string name_;
  char* base_ = nullptr;
  size_t used_ = 0, peak_ = 0;
  std::vector<Row> rows_;
};

}  // namespace hgrn
