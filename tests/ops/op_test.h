// Helpers of the operation tests: tensors on a backend filled from double, and errors.
// Every test fills its inputs in double on the host, so that all backends see the same numbers.
#pragma once
#include <cmath>
#include <cstring>
#include <functional>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "catch.h"
#include "ops/ops.h"

namespace hgrn::test {

using Values = std::vector<double>;

inline Values normals(size_t count, unsigned seed, double mean = 0, double sd = 1) {
  std::mt19937_64 engine(seed);
  std::normal_distribution<double> normal(mean, sd);
  Values v(count);
  for (double& x : v) x = normal(engine);
  return v;
}

inline std::vector<int32_t> integers(size_t count, unsigned seed, int32_t low, int32_t high) {
  std::mt19937_64 engine(seed);
  std::uniform_int_distribution<int32_t> pick(low, high);
  std::vector<int32_t> v(count);
  for (int32_t& x : v) x = pick(engine);
  return v;
}

// Inputs that every precision holds exactly: what bf16 sees, so that an error is the operation's.
inline Values exact(Values v) {
  for (double& x : v) x = double(bf16_to_float(float_to_bf16(float(x))));
  return v;
}

// One backend and the tensors that a test made on it.
class Bench {
 public:
  explicit Bench(std::unique_ptr<Ops> owned) : owned_(std::move(owned)), ops_(owned_.get()) {}
  explicit Bench(Ops& ops) : ops_(&ops) {}
  ~Bench() {
    for (void* p : blocks_) ops_->free(p);
  }
  Bench(const Bench&) = delete;
  Bench& operator=(const Bench&) = delete;

  Ops* operator->() const { return ops_; }
  Ops& ops() const { return *ops_; }

  Tensor empty(Shape shape, DType dtype) {
    Tensor t(nullptr, dtype, shape);
    t.data = ops_->alloc(t.bytes(), "a test");
    blocks_.push_back(t.data);
    return t;
  }
  Tensor zeros(Shape shape, DType dtype) {
    Tensor t = empty(shape, dtype);
    ops_->zero(t);
    return t;
  }
  // In the backend's activation type unless told otherwise.
  Tensor real(Shape shape, const Values& values) { return real(shape, values, ops_->act_dtype()); }
  Tensor real(Shape shape, const Values& values, DType dtype) {
    REQUIRE(shape.numel() == int64_t(values.size()));
    Tensor t = empty(shape, dtype);
    fill(t, values);
    return t;
  }
  void fill(Tensor t, const Values& values) {
    if (t.dtype == DType::f64) {
      ops_->upload(t, values.data());
    } else if (t.dtype == DType::f32) {
      const std::vector<float> host(values.begin(), values.end());
      ops_->upload(t, host.data());
    } else {
      REQUIRE(t.dtype == DType::bf16);
      std::vector<uint16_t> host(values.size());
      for (size_t i = 0; i < host.size(); ++i) host[i] = float_to_bf16(float(values[i]));
      ops_->upload(t, host.data());
    }
  }
  Tensor ids(const std::vector<int32_t>& values) {
    Tensor t = empty({int64_t(values.size())}, DType::i32);
    ops_->upload(t, values.data());
    return t;
  }
  Tensor bytes(const std::vector<uint8_t>& values) {
    Tensor t = empty({int64_t(values.size())}, DType::u8);
    ops_->upload(t, values.data());
    return t;
  }
  // What lies in memory, 16 bits an element.
  std::vector<uint16_t> halves(Tensor t) const {
    REQUIRE(size_of(t.dtype) == 2);
    std::vector<uint16_t> host(size_t(t.numel()));
    ops_->download(host.data(), t);
    return host;
  }
  std::vector<float> floats(Tensor t) const {
    std::vector<float> host(size_t(t.numel()));
    REQUIRE(t.dtype == DType::f32);
    ops_->download(host.data(), t);
    return host;
  }
  Values read(Tensor t) const {
    Values out(static_cast<size_t>(t.numel()));
    if (t.dtype == DType::f64) {
      ops_->download(out.data(), t);
    } else if (t.dtype == DType::f32) {
      std::vector<float> host(out.size());
      ops_->download(host.data(), t);
      out.assign(host.begin(), host.end());
    } else {
      REQUIRE(t.dtype == DType::bf16);
      std::vector<uint16_t> host(out.size());
      ops_->download(host.data(), t);
      for (size_t i = 0; i < host.size(); ++i) out[i] = double(bf16_to_float(host[i]));
    }
    return out;
  }

 private:
  std::unique_ptr<Ops> owned_;
  Ops* ops_;
  std::vector<void*> blocks_;
};

// Where to test, and how far from the double-precision CPU a result may be (root mean square of the
// error over that of the reference). A backend with an accelerator joins this list.
struct Backend {
  const char* name;
  std::unique_ptr<Ops> (*open)();
  double elementwise;  // a handful of roundings each element
  double reduced;      // sums of up to a few thousand terms
  double recurrent;    // errors carried along a sequence
  bool bf16() const { return elementwise > 1e-3; }
};

inline const std::vector<Backend>& backends() {
  // fp32 has 6e-8 per rounding: a few roundings; sums of random sign grow by their square root; a
  // recurrence sums both, and saturated gates multiply logits' rounding by up to a few units.
  // The GPU's fast exponentials and other orders of sums cost a few roundings more. bf16 rounds
  // each result by up to 2^-9 of it (rms 1.7e-3), once or twice in a fused operation and once more
  // where a test feeds the rounded result of forward to backward; inputs are exact in bf16. The
  // sums inside are fp32. 5e-3 is the bar of the recurrence at short lengths (docs/benchmarks.md).
  static const std::vector<Backend> list = [] {
    std::vector<Backend> all = {
        {"cpu fp32", [] { return make_cpu_ops(DType::f32); }, 3e-7, 1e-6, 2e-6}};
    if (cuda_available()) {
      all.push_back({"cuda fp32", [] { return make_cuda_ops(DType::f32, 0); }, 1e-6, 4e-6, 1e-5});
      all.push_back({"cuda bf16", [] { return make_cuda_ops(DType::bf16, 0); }, 4e-3, 5e-3, 5e-3});
    }
    return all;
  }();
  return list;
}

inline std::unique_ptr<Ops> reference_ops() {
  return make_cpu_ops(DType::f64);
}

// rms(a - b) / rms(b); infinite where a number is not finite.
inline double relative_error(const Values& a, const Values& b) {
  REQUIRE(a.size() == b.size());
  double error = 0, norm = 0;
  for (size_t i = 0; i < a.size(); ++i) {
    error += (a[i] - b[i]) * (a[i] - b[i]);
    norm += b[i] * b[i];
  }
  if (!std::isfinite(error) || !std::isfinite(norm)) return INFINITY;
  return norm > 0 ? std::sqrt(error / norm) : std::sqrt(error);
}

inline double dot(const Values& a, const Values& b) {
  double s = 0;
  for (size_t i = 0; i < a.size(); ++i) s += a[i] * b[i];
  return s;
}

// Central differences of a scalar function of `at`, fourth order: the error is O(h^4).
inline Values numeric_gradient(const std::function<double(const Values&)>& f, Values at,
                               double h = 1e-3) {
  Values grad(at.size());
  for (size_t i = 0; i < at.size(); ++i) {
    const double x = at[i];
    const auto value = [&](double step) {
      at[i] = x + step;
      return f(at);
    };
    grad[i] = (8 * (value(h) - value(-h)) - (value(2 * h) - value(-2 * h))) / (12 * h);
    at[i] = x;
  }
  return grad;
}

constexpr double kGradientTolerance = 1e-7;

}  // namespace hgrn::test
