// Tensors of tools/hgru2_*.cu on the device.
#pragma once
#include <cuda_runtime.h>

#include <algorithm>
#include <cstring>
#include <vector>

#include "core/dtype.h"
#include "core/tensor.h"
#include "cuda/cuda_check.h"

namespace hgrn::hgru2_cases {

struct Buffer {  // device memory, filled with NaN bytes
  Tensor t;
  Buffer(DType type, Shape shape) : t(nullptr, type, shape) {
    CUDA_CHECK(cudaMalloc(&t.data, std::max<size_t>(t.bytes(), 16)));
    CUDA_CHECK(cudaMemset(t.data, 0xff, t.bytes()));
  }
  Buffer(const Buffer&) = delete;
  ~Buffer() { cudaFree(t.data); }
  void put(const std::vector<float>& v) {
    if (t.dtype == DType::f32) {
      CUDA_CHECK(cudaMemcpy(t.data, v.data(), t.bytes(), cudaMemcpyHostToDevice));
      return;
    }
    std::vector<uint16_t> u(v.size());
    for (size_t i = 0; i < v.size(); ++i) u[i] = float_to_bf16(v[i]);
    CUDA_CHECK(cudaMemcpy(t.data, u.data(), t.bytes(), cudaMemcpyHostToDevice));
  }
  std::vector<double> get() const {
    std::vector<double> out(t.numel());
    std::vector<char> raw(t.bytes());
    CUDA_CHECK(cudaMemcpy(raw.data(), t.data, raw.size(), cudaMemcpyDeviceToHost));
    for (size_t i = 0; i < out.size(); ++i) {
      if (t.dtype == DType::bf16) {
        uint16_t u;
        std::memcpy(&u, &raw[2 * i], 2);
        out[i] = bf16_to_float(u);
      } else {
        float f;
        std::memcpy(&f, &raw[4 * i], 4);
        out[i] = f;
      }
    }
    return out;
  }
};

}  // namespace hgrn::hgru2_cases
