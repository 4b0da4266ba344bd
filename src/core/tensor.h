// A Tensor is a view: pointer, dtype, shape; contiguous, row-major, at most five axes. It owns
// nothing (arena.h does) and is passed by value. An empty Tensor means "absent": no bias, no
// initial state, no gradient wanted.
#pragma once
#include <cstdint>
#include <initializer_list>
#include <string>

#include "core/check.h"
#include "core/dtype.h"

namespace hgrn {

struct Shape {
  static constexpr int kMaxRank = 5;
  int rank = 0;
  int64_t dim[kMaxRank] = {};

  Shape() = default;
  Shape(std::initializer_list<int64_t> dims) {
    check(int(dims.size()) <= kMaxRank, "a shape has at most {} axes, not {}", int(kMaxRank),
          dims.size());
    for (int64_t d : dims) dim[rank++] = d;
  }
  int64_t operator[](int i) const { return dim[i]; }
  int64_t numel() const {
    int64_t n = 1;
    for (int i = 0; i < rank; ++i) n *= dim[i];
    return n;
  }
  bool operator==(const Shape& o) const {
    if (rank != o.rank) return false;
    for (int i = 0; i < rank; ++i)
      if (dim[i] != o.dim[i]) return false;
    return true;
  }
  std::string str() const {  // "(2, 3)"
    std::string s = "(";
    for (int i = 0; i < rank; ++i) s += (i ? ", " : "") + std::to_string(dim[i]);
    return s + ")";
  }
};

struct Tensor {
  void* data = nullptr;
  DType dtype = DType::f32;
  Shape shape;

  Tensor() = default;
  Tensor(void* d, DType t, Shape s) : data(d), dtype(t), shape(s) {}

  explicit operator bool() const { return data != nullptr; }
  int64_t numel() const { return shape.numel(); }
  size_t bytes() const { return size_t(numel()) * size_of(dtype); }
  // Rows and columns when the last axis is taken as the column: (B,T,D) has B*T rows.
  int64_t cols() const { return shape.rank ? shape.dim[shape.rank - 1] : 1; }
  int64_t rows() const { return cols() ? numel() / cols() : 0; }

  template <class T>
  T* ptr() const {
    check(dtype == DTypeOf<T>::value, "a tensor of {} was used as {}", name_of(dtype),
          name_of(DTypeOf<T>::value));
    return static_cast<T*>(data);
  }
  Tensor view(Shape s) const {
    check(s.numel() == numel(), "cannot view {} as {}", shape.str(), s.str());
    return {data, dtype, s};
  }
  // Entries [first, first+count) of the first axis.
  Tensor slice(int64_t first, int64_t count) const {
    check(shape.rank > 0 && first >= 0 && count >= 0 && first + count <= shape[0],
          "slice [{}, {}) of {}", first, first + count, shape.str());
    Tensor t = *this;
    t.shape.dim[0] = count;
    const int64_t step = shape[0] ? numel() / shape[0] : 0;
    if (data) t.data = static_cast<char*>(data) + size_t(first * step) * size_of(dtype);
    return t;
  }
};

}  // namespace hgrn
