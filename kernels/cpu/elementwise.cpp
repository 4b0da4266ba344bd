// Memory operations, fixed-order sums and the lower bounds of the forget gates.
// beta (L,D) = cumsum_l softmax_l(gamma) - first row; with s = softmax(gamma):
//   ds_j = sum_{l>=j} dbeta_l for j >= 1, ds_0 = 0;  dgamma += s (ds - sum_j s_j ds_j)
// Twin: kernels/cuda/elementwise.cu   Tests: tests/ops/test_lower_bound.cpp, test_adamw.cpp
#include <cmath>
#include <cstring>
#include <vector>

#include "cpu/cpu_ops.h"

namespace hgrn {
namespace {

constexpr int64_t kBlock = 1 << 15;  // elements of a copying or summing task

template <class To, class From>
void convert(To* dst, const From* src, int64_t n) {
  cpu::parallel_blocks(n, kBlock, n, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) dst[i] = To(src[i]);
  });
}

void to_bf16(uint16_t* dst, const float* src, int64_t n) {
  cpu::parallel_blocks(n, kBlock, n, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) dst[i] = float_to_bf16(src[i]);
  });
}

// Once, not through float: double rounding would differ from the nearest bf16.
void to_bf16(uint16_t* dst, const double* src, int64_t n) {
  cpu::parallel_blocks(n, kBlock, n, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      float f = float(src[i]);  // rounded to odd below, so that the second rounding is exact
      uint32_t bits;
      std::memcpy(&bits, &f, 4);
      if (std::isfinite(f) && double(f) != src[i]) {
        if (std::fabs(double(f)) > std::fabs(src[i])) --bits;
        bits |= 1u;
        std::memcpy(&f, &bits, 4);
      }
      dst[i] = float_to_bf16(f);
    }
  });
}

template <class To>
void from_bf16(To* dst, const uint16_t* src, int64_t n) {
  cpu::parallel_blocks(n, kBlock, n, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) dst[i] = To(bf16_to_float(src[i]));
  });
}

uint16_t* bf16_data(Tensor t) {
  return static_cast<uint16_t*>(t.data);
}

template <class T, class Term>
double sum_range(const T* x, int64_t n, Term term) {
  double s = 0;
#pragma omp simd reduction(+ : s)
  for (int64_t i = 0; i < n; ++i) s += term(double(x[i]));
  return s;
}

// Blocks are summed alone, then joined in order.
template <class T, class Term>
double blocked_sum(const T* x, int64_t n, double* partial, const Term& term) {
  const int64_t blocks = (n + kBlock - 1) / kBlock;
  cpu::parallel_for(blocks, n, [&](int64_t b) {
    const int64_t begin = b * kBlock;
    partial[b] = sum_range(x + begin, std::min(n - begin, kBlock), term);
  });
  double total = 0;
  for (int64_t b = 0; b < blocks; ++b) total += partial[b];
  return total;
}

template <class Term>
double sum_terms(Tensor x, cpu::Scratch& scratch, const Term& term) {
  double total = 0;
  double* partial = scratch.get<double>(size_t(x.numel() / kBlock + 1));
  cpu::with_real(x.dtype, [&](auto zero) {
    total = blocked_sum(x.ptr<decltype(zero)>(), x.numel(), partial, term);
  });
  return total;
}

// One column of softmax over layers, in double.
template <class T>
void layer_softmax(double* s, const T* gamma, int64_t L, int64_t D, int64_t d) {
  double max = -INFINITY, total = 0;
  for (int64_t l = 0; l < L; ++l) max = std::max(max, double(gamma[l * D + d]));
  for (int64_t l = 0; l < L; ++l) total += s[l] = std::exp(double(gamma[l * D + d]) - max);
  for (int64_t l = 0; l < L; ++l) s[l] /= total;
}

}  // namespace

void CpuOps::zero(Tensor t) {
  char* data = static_cast<char*>(t.data);
  const auto bytes = int64_t(t.bytes());
  cpu::parallel_blocks(bytes, 4 * kBlock, bytes, [&](int64_t begin, int64_t end) {
    std::memset(data + begin, 0, size_t(end - begin));
  });
}

void CpuOps::copy(Tensor dst, Tensor src) {
  check(dst.dtype == src.dtype && dst.numel() == src.numel(), "copy: {} {} and {} {} differ",
        name_of(dst.dtype), dst.shape.str(), name_of(src.dtype), src.shape.str());
  auto* to = static_cast<char*>(dst.data);
  const auto* from = static_cast<const char*>(src.data);
  const auto bytes = int64_t(dst.bytes());
  if (to < from + bytes && from < to + bytes) {  // they overlap
    std::memmove(to, from, size_t(bytes));
    return;
  }
  cpu::parallel_blocks(bytes, 4 * kBlock, bytes, [&](int64_t begin, int64_t end) {
    std::memcpy(to + begin, from + begin, size_t(end - begin));
  });
}

void CpuOps::upload(Tensor dst, const void* host) {
  std::memcpy(dst.data, host, dst.bytes());
}
void CpuOps::download(void* host, Tensor src) {
  std::memcpy(host, src.data, src.bytes());
}

void CpuOps::cast(Tensor dst, Tensor src) {
  const int64_t n = src.numel();
  check(dst.numel() == n, "cast: {} and {} differ", dst.shape.str(), src.shape.str());
  if (dst.dtype == src.dtype) return copy(dst, src);
  if (src.dtype == DType::bf16)
    return cpu::with_real(
        dst.dtype, [&](auto zero) { from_bf16(dst.ptr<decltype(zero)>(), bf16_data(src), n); });
  cpu::with_real(src.dtype, [&](auto from) {
    const auto* in = src.ptr<decltype(from)>();
    if (dst.dtype == DType::bf16) return to_bf16(bf16_data(dst), in, n);
    cpu::with_real(dst.dtype, [&](auto to) { convert(dst.ptr<decltype(to)>(), in, n); });
  });
}

void CpuOps::lower_bound_forward(Tensor beta, Tensor gamma) {
  const int64_t L = gamma.rows(), D = gamma.cols();
  check(beta.shape == gamma.shape, "lower_bound_forward: beta {} and gamma {} differ",
        beta.shape.str(), gamma.shape.str());
  cpu::with_real(gamma.dtype, [&](auto zero) {
    using T = decltype(zero);
    T* out = beta.ptr<T>();
    std::vector<double> s(static_cast<size_t>(L));
    for (int64_t d = 0; d < D; ++d) {
      layer_softmax(s.data(), gamma.ptr<T>(), L, D, d);
      double bound = 0;
      for (int64_t l = 0; l < L; ++l) {
        if (l > 0) bound += s[size_t(l)];
        out[l * D + d] = T(bound);
      }
    }
  });
}

void CpuOps::lower_bound_backward(Grad dgamma, Tensor dbeta, Tensor gamma) {
  const int64_t L = gamma.rows(), D = gamma.cols();
  check(dgamma.to.shape == gamma.shape && dbeta.shape == gamma.shape,
        "lower_bound_backward: dgamma {}, dbeta {} and gamma {} differ", dgamma.to.shape.str(),
        dbeta.shape.str(), gamma.shape.str());
  cpu::with_real(gamma.dtype, [&](auto zero) {
    using T = decltype(zero);
    T* out = dgamma.to.ptr<T>();
    const T* grad = dbeta.ptr<T>();
    std::vector<double> s(static_cast<size_t>(L)), ds(static_cast<size_t>(L));
    for (int64_t d = 0; d < D; ++d) {
      layer_softmax(s.data(), gamma.ptr<T>(), L, D, d);
      double tail = 0, mean = 0;
      for (int64_t l = L - 1; l >= 0; --l) {
        tail += double(grad[l * D + d]);
        ds[size_t(l)] = l > 0 ? tail : 0;
        mean += s[size_t(l)] * ds[size_t(l)];
      }
      for (int64_t l = 0; l < L; ++l) {
        const T before = dgamma.fresh ? T(0) : out[l * D + d];
        out[l * D + d] = before + T(s[size_t(l)] * (ds[size_t(l)] - mean));
      }
    }
  });
}

void CpuOps::sum(Tensor out, Tensor x) {
  *out.ptr<double>() += sum_terms(x, scratch_, [](double v) { return v; });
}

void CpuOps::square_sum(Tensor out, Tensor x) {
  *out.ptr<double>() += sum_terms(x, scratch_, [](double v) { return v * v; });
}

}  // namespace hgrn
