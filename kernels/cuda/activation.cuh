// The activations of gates in fp32, for kernels whose results are stored as T.
#pragma once
#include <type_traits>

#include "cuda/vec.cuh"
#include "ops/seq_kernel.h"

namespace hgrn {

// In bf16 the fast exponential and division are far below the rounding of the result.
template <class T>
__device__ __forceinline__ float sigmoid(float x) {
  if constexpr (std::is_same_v<T, bf16>) return __fdividef(1.0f, 1.0f + __expf(-x));
  return 1.0f / (1.0f + expf(-x));
}

template <class T>
__device__ __forceinline__ float activate(float x, Act act) {
  if (act == Act::identity) return x;
  const float s = sigmoid<T>(x);
  return act == Act::silu ? x * s : s;
}

}  // namespace hgrn
