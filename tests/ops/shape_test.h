// Helpers of the tests of shapes: an operation runs twice from poisoned outputs, must give equal
// bits both times, and is compared with loops in double.
#pragma once
#include <cmath>
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "ops/op_test.h"

namespace hgrn::test {

// A stream of numbers from the project's own generator.
class Random {
 public:
  explicit Random(uint64_t key) : key_(key) {}
  int64_t below(int64_t n) { return int64_t(philox(key_, 0, n_++).v[0]) % n; }
  double normal() {
    const Philox p = philox(key_, 1, n_++);
    const double u = (double(p.v[0]) + 1) / 4294967297.0, a = double(p.v[1]) / 4294967296.0;
    return std::sqrt(-2 * std::log(u)) * std::cos(2 * M_PI * a);
  }
  Values normals(int64_t n, double scale = 1, double mean = 0) {
    Values h(static_cast<size_t>(n));
    for (double& v : h) v = mean + scale * normal();
    return h;
  }

 private:
  uint64_t key_, n_ = 0;
};

inline double round_to(DType t, double v) {
  if (t == DType::bf16) {  // once, to nearest even: 8 bits of significand
    int exponent;
    const double significand = std::frexp(v, &exponent);
    return std::ldexp(std::nearbyint(std::ldexp(significand, 8)), exponent - 8);
  }
  if (t == DType::f32) return double(float(v));
  return v;
}

// A test's tensors on a backend.
class Buffers : public Bench {
 public:
  explicit Buffers(Ops& ops) : Bench(ops) {}
  Tensor make(Shape shape, DType dtype) { return empty(shape, dtype); }
  // Rounds `values` to dtype, in place too, so that a reference sees what the backend sees.
  Tensor put(Values& values, Shape shape, DType dtype) {
    const Tensor t = make(shape, dtype);
    write(t, values);
    return t;
  }
  void write(Tensor t, Values& values) {
    if (t.dtype == DType::i32) {
      const std::vector<int32_t> host(values.begin(), values.end());
      ops().upload(t, host.data());
      return;
    }
    for (double& v : values) v = round_to(t.dtype, v);
    fill(t, values);
  }
  void poison(Tensor t) {
    const std::vector<char> ones(t.bytes(), char(0xff));  // NaN in every type
    ops().upload(t, ones.data());
  }
  std::vector<char> raw(Tensor t) {
    std::vector<char> bytes(t.bytes());
    ops().download(bytes.data(), t);
    return bytes;
  }
};

inline void report(bool ok, const std::string& what) {
  INFO(what);
  CHECK(ok);
}

struct Output {
  const char* name;
  Tensor t;
  std::optional<Values> start;  // what the operation adds to; else the tensor is poisoned with NaN
  Values want;
  double tolerance;
};

// Runs an operation twice from the same start: equal bits, and close to what the loops gave.
inline void compare(Ops& ops, Buffers& buffers, const std::string& op, const std::string& shape,
                    std::vector<Output> outputs, const std::function<void()>& call) {
  std::vector<std::vector<char>> first;
  for (int run = 0; run < 2; ++run) {
    for (Output& o : outputs) {
      if (o.start)
        buffers.write(o.t, *o.start);
      else
        buffers.poison(o.t);
    }
    call();
    for (size_t i = 0; i < outputs.size(); ++i) {
      Output& o = outputs[i];
      std::vector<char> raw = buffers.raw(o.t);
      const std::string what =
          fmt::format("{} {} {}: {}", op, name_of(ops.act_dtype()), shape, o.name);
      if (run == 0) {
        const double error = relative_error(buffers.read(o.t), o.want);
        report(error <= o.tolerance,
               fmt::format("{}: error {:.3g}, allowed {:.3g}", what, error, o.tolerance));
        first.push_back(std::move(raw));
      } else {
        report(raw == first[i], what + ": two runs differ");
      }
    }
  }
}

struct Tolerance {
  double act, f32;  // of outputs in act_dtype (bf16 rounds by up to 2^-8 of it), of f32 outputs
};
inline Tolerance tolerance(const Ops& ops) {
  return ops.act_dtype() == DType::bf16 ? Tolerance{4e-3, 5e-5} : Tolerance{5e-6, 5e-6};
}

inline void check_backends(const std::function<void(Ops&)>& check) {
  for (const Backend& backend : backends()) {
    INFO(backend.name);
    const std::unique_ptr<Ops> ops = backend.open();
    check(*ops);
  }
}

}  // namespace hgrn::test
