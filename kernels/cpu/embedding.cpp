// Embedding. x[r] = dropout(scale * w[token[r]]); dw[token[r]] += scale * dropout'(dx[r]).
// x (N,D) tokens (N) w (V,D)
// Twin: kernels/cuda/embedding.cu   Test: tests/ops/test_embedding.cpp
#include <vector>

#include "cpu/cpu_ops.h"
#include "cpu/dropout.h"

namespace hgrn {
namespace {

constexpr int64_t kColumns = 64;  // a backward task: whole cache lines, whole calls of Philox

void check_shapes(Tensor x, Tensor tokens, Tensor w) {
  check(x.cols() == w.cols() && x.rows() == tokens.numel() && x.dtype == w.dtype,
        "embedding: x {} {}, tokens {}, w {} {} do not fit", name_of(x.dtype), x.shape.str(),
        tokens.shape.str(), name_of(w.dtype), w.shape.str());
  const int32_t* id = tokens.ptr<int32_t>();
  for (int64_t r = 0; r < tokens.numel(); ++r)
    check(id[r] >= 0 && id[r] < w.rows(), Exit::data,
          "token {} in row {} is outside the vocabulary of {}; do the data and the tokenizer "
          "belong together?",
          id[r], r, w.rows());
}

template <class T>
void forward(Tensor x, const int32_t* token, const T* w, T scale, const Dropout& drop) {
  const int64_t rows = x.rows(), D = x.cols();
  T* out = x.ptr<T>();
  const uint64_t key = drop.key();
  cpu::parallel_blocks(rows, 16, rows * D, [&](int64_t begin, int64_t end) {
    std::vector<T> factor(drop.p > 0 ? size_t(D) : 0);
    for (int64_t r = begin; r < end; ++r) {
      const T* from = w + token[r] * D;
      T* to = out + r * D;
      for (int64_t d = 0; d < D; ++d) to[d] = scale * from[d];
      if (drop.p > 0) {
        cpu::dropout_factors(factor.data(), drop, key, r, 0, D);
        for (int64_t d = 0; d < D; ++d) to[d] *= factor[size_t(d)];
      }
    }
  });
}

// A task owns columns, so that rows of one token are added in order whatever the threads do.
template <class T>
void backward(Tensor dw, const T* dx, const int32_t* token, int64_t rows, T scale,
              const Dropout& drop) {
  const int64_t D = dw.cols();
  T* out = dw.ptr<T>();
  const uint64_t key = drop.key();
  cpu::parallel_blocks(D, kColumns, rows * D, [&](int64_t begin, int64_t end) {
    T factor[kColumns];
    for (int64_t r = 0; r < rows; ++r) {
      const T* from = dx + r * D;
      T* to = out + token[r] * D;
      if (drop.p > 0) {
        cpu::dropout_factors(factor, drop, key, r, begin, end);
        for (int64_t d = begin; d < end; ++d) to[d] += scale * factor[d - begin] * from[d];
      } else {
        for (int64_t d = begin; d < end; ++d) to[d] += scale * from[d];
      }
    }
  });
}

}  // namespace

void CpuOps::embedding_forward(Tensor x, Tensor tokens, Tensor w, float scale, Dropout drop,
                               Tensor /*order*/) {
  check_shapes(x, tokens, w);
  drop = drop.now();
  cpu::with_real(x.dtype, [&](auto zero) {
    using T = decltype(zero);
    forward<T>(x, tokens.ptr<int32_t>(), w.ptr<T>(), T(scale), drop);
  });
}

void CpuOps::embedding_backward(Grad dw, Tensor dx, Tensor tokens, float scale, Dropout drop,
                                Tensor /*order*/) {
  check_shapes(dx, tokens, dw.to);
  if (dw.fresh) zero(dw.to);
  drop = drop.now();
  cpu::with_real(dx.dtype, [&](auto zero) {
    using T = decltype(zero);
    backward<T>(dw.to, dx.ptr<T>(), tokens.ptr<int32_t>(), dx.rows(), T(scale), drop);
  });
}

}  // namespace hgrn
