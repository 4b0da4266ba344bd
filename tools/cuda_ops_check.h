// Shared by the two files of the CUDA operations check: device buffers filled from host values, and
// the list of results. See cuda_ops_check.cu.
#pragma once
#include <cmath>
#include <cstring>
#include <functional>
#include <string>
#include <vector>

#include "core/dtype.h"
#include "core/rng.h"
#include "cuda/cuda_ops.h"

namespace hgrn::check_tool {

using Host = std::vector<double>;

// A stream of numbers from the project's own generator.
class Random {
 public:
  explicit Random(uint64_t key) : key_(key) {}
  uint32_t bits() { return philox(key_, 0, n_++).v[0]; }
  int64_t below(int64_t n) { return int64_t(bits()) % n; }
  double normal() {
    const Philox p = philox(key_, 1, n_++);
    const double u = (double(p.v[0]) + 1) / 4294967297.0, a = double(p.v[1]) / 4294967296.0;
    return std::sqrt(-2 * std::log(u)) * std::cos(2 * 3.14159265358979323846 * a);
  }
  Host normals(int64_t n, double scale = 1, double mean = 0) {
    Host h(static_cast<size_t>(n));
    for (double& v : h) v = mean + scale * normal();
    return h;
  }

 private:
  uint64_t key_, n_ = 0;
};

inline double round_to(DType t, double v) {
  if (t == DType::bf16) return bf16_to_float(float_to_bf16(float(v)));
  if (t == DType::f32) return float(v);
  return v;
}

// Owns device buffers until it goes out of scope.
class Buffers {
 public:
  explicit Buffers(CudaOps& ops) : ops_(ops) {}
  ~Buffers() {
    for (void* p : owned_) ops_.free(p);
  }
  Buffers(const Buffers&) = delete;
  Buffers& operator=(const Buffers&) = delete;

  Tensor make(Shape shape, DType dtype) {
    Tensor t(nullptr, dtype, shape);
    t.data = ops_.alloc(t.bytes(), "a test tensor");
    owned_.push_back(t.data);
    return t;
  }
  // Rounds `values` to dtype, in place too, so that a reference sees what the device sees.
  Tensor put(Host& values, Shape shape, DType dtype) {
    const Tensor t = make(shape, dtype);
    write(t, values);
    return t;
  }
  void write(Tensor t, Host& values) {
    std::vector<char> raw(t.bytes());
    for (size_t i = 0; i < values.size(); ++i) {
      values[i] = t.dtype == DType::i32 ? values[i] : round_to(t.dtype, values[i]);
      const float f = float(values[i]);
      const uint16_t h = float_to_bf16(f);
      const int32_t n = int32_t(values[i]);
      switch (t.dtype) {
        case DType::f32: std::memcpy(&raw[i * 4], &f, 4); break;
        case DType::bf16: std::memcpy(&raw[i * 2], &h, 2); break;
        case DType::i32: std::memcpy(&raw[i * 4], &n, 4); break;
        default: std::memcpy(&raw[i * 8], &values[i], 8);
      }
    }
    ops_.upload(t, raw.data());
    ops_.synchronize();
  }
  std::vector<char> raw(Tensor t) {
    std::vector<char> bytes(t.bytes());
    ops_.download(bytes.data(), t);
    return bytes;
  }
  static Host decode(const std::vector<char>& bytes, DType dtype) {
    Host h(bytes.size() / size_of(dtype));
    for (size_t i = 0; i < h.size(); ++i) {
      float f;
      uint16_t b;
      switch (dtype) {
        case DType::f32: std::memcpy(&f, &bytes[i * 4], 4), h[i] = f; break;
        case DType::bf16: std::memcpy(&b, &bytes[i * 2], 2), h[i] = bf16_to_float(b); break;
        default: std::memcpy(&h[i], &bytes[i * 8], 8);
      }
    }
    return h;
  }

 private:
  CudaOps& ops_;
  std::vector<void*> owned_;
};

// Times every operation at the 150M, the 1B and the WikiText-103 shapes.
void run_timings(CudaOps& ops);

}  // namespace hgrn::check_tool
