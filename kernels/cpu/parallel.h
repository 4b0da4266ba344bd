// Threads and fixed-order reductions of the CPU backend. Work is split by its own size, never by
// the number of threads, and partial results are combined in block order: one thread and many give
// the same bits.
#pragma once
#ifdef _OPENMP
#include <omp.h>
#endif

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <new>

#include "core/tensor.h"

namespace hgrn::cpu {

inline int max_threads() {
#ifdef _OPENMP
  return omp_get_max_threads();
#else
  return 1;
#endif
}

inline int thread_index() {
#ifdef _OPENMP
  return omp_get_thread_num();
#else
  return 0;
#endif
}

// Below this many elements one thread is faster than waking the others.
constexpr int64_t kMinParallel = 16384;

// f(i) for i in [0, n), in contiguous shares; `work` elements are touched in all. f must not throw.
template <class F>
void parallel_for(int64_t n, [[maybe_unused]] int64_t work, const F& f) {
#pragma omp parallel for schedule(static) if (n > 1 && work >= kMinParallel)
  for (int64_t i = 0; i < n; ++i) f(i);
}

// f(begin, end) over [0, n) in blocks of `block`.
template <class F>
void parallel_blocks(int64_t n, int64_t block, int64_t work, const F& f) {
  parallel_for((n + block - 1) / block, work,
               [&](int64_t b) { f(b * block, std::min(n, (b + 1) * block)); });
}

// The kernels' own memory: grows to the largest request and stays.
class Scratch {
 public:
  template <class T>
  T* get(size_t count) {
    const size_t bytes = (count * sizeof(T) + 255) / 256 * 256;
    if (bytes > size_) {
      data_.reset();
      size_ = 0;
      data_.reset(std::aligned_alloc(256, bytes));
      check(data_ != nullptr, "out of memory: {} bytes of kernel scratch; lower train.micro_batch",
            bytes);
      size_ = bytes;
    }
    return static_cast<T*>(data_.get());
  }

 private:
  struct Free {
    void operator()(void* p) const { std::free(p); }
  };
  std::unique_ptr<void, Free> data_;
  size_t size_ = 0;
};

// Sums over rows go through at most this many partial sums.
constexpr int64_t kRowBlocks = 32;

inline int64_t row_blocks(int64_t rows) {
  return std::min(kRowBlocks, rows);
}

// out[c] += (or, fresh, =) sum over blocks of partial[block][c], in block order.
template <class T>
void combine_blocks(T* out, const T* partial, int64_t blocks, int64_t stride, int64_t cols,
                    bool fresh) {
  parallel_blocks(cols, 256, blocks * cols, [&](int64_t begin, int64_t end) {
    for (int64_t c = begin; c < end; ++c) {
      double s = 0;
      for (int64_t b = 0; b < blocks; ++b) s += double(partial[b * stride + c]);
      out[c] = fresh ? T(s) : out[c] + T(s);
    }
  });
}

// Calls f with a value of the element type: with_real(x.dtype, [&](auto zero) { ... }).
template <class F>
void with_real(DType dtype, const F& f) {
  if (dtype == DType::f32) return f(float(0));
  if (dtype == DType::f64) return f(double(0));
  fail(Exit::failed, "the CPU backend computes in f32 or f64, not in {}", name_of(dtype));
}

}  // namespace hgrn::cpu
