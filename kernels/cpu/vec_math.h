// Elementary functions that g++ -O3 vectorises: no branches, no calls, no tables. Float versions
// are polynomials within 2 ulp, right at overflow, infinities and NaN; double versions are libm's.
// Test: tests/ops/test_glu.cpp
#pragma once
#include <bit>
#include <cmath>
#include <cstdint>

#include "ops/seq_kernel.h"

namespace hgrn::cpu {

// e^x = 2^n e^r, n = round(x / ln 2), |r| <= ln(2)/2, ln 2 in two parts (Cody & Waite).
inline float exp_of(float x) {
  constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer
  x = x > 89.0f ? 89.0f : x;             // overflows below; NaN fails both tests and stays
  x = x < -104.0f ? -104.0f : x;         // underflows to 0 below
  const float shifted = x * 1.44269504088896341f + kRound;
  const float n = shifted - kRound;
  const float r = (x - n * 0.693145751953125f) - n * 1.42860682030941723e-6f;
  float p = 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * (r * r) + r + 1.0f;
  // 2^n in two factors, since n runs from -150 to 128.
  const int32_t whole = int32_t(std::bit_cast<uint32_t>(shifted) - std::bit_cast<uint32_t>(kRound));
  const int32_t half = whole >> 1;
  const float s1 = std::bit_cast<float>((uint32_t(half) + 127u) << 23);
  const float s2 = std::bit_cast<float>((uint32_t(whole) - uint32_t(half) + 127u) << 23);
  return p * s1 * s2;
}
inline double exp_of(double x) {
  return std::exp(x);
}

template <class T>
inline T sigmoid_of(T x) {
  return T(1) / (T(1) + exp_of(-x));
}

// sigmoid(x) and sigmoid(-x) from one exponential that cannot overflow, neither by subtraction.
template <class T>
struct SigmoidPair {
  T plus, minus;
};
template <class T>
inline SigmoidPair<T> sigmoid_pair(T x) {
  const T e = exp_of(x < T(0) ? x : -x), near_one = T(1) / (T(1) + e), near_zero = e * near_one;
  return {x < T(0) ? near_zero : near_one, x < T(0) ? near_one : near_zero};
}

template <Act A, class T>
inline T act_of(T x) {
  if constexpr (A == Act::identity) return x;
  if constexpr (A == Act::sigmoid) return sigmoid_of(x);
  if constexpr (A == Act::silu) return x * sigmoid_of(x);
}

// Value and derivative together: they share the exponential.
template <class T>
struct ActPair {
  T value, slope;
};
template <Act A, class T>
inline ActPair<T> act_pair(T x) {
  if constexpr (A == Act::identity) {
    return {x, T(1)};
  } else {
    const T s = sigmoid_of(x);
    if constexpr (A == Act::sigmoid) return {s, s * (T(1) - s)};
    if constexpr (A == Act::silu) return {x * s, s + x * s * (T(1) - s)};
  }
}

// Calls f.template operator()<A>() for the run-time activation.
template <class F>
inline void with_act(Act act, const F& f) {
  switch (act) {
    case Act::identity: return f.template operator()<Act::identity>();
    case Act::silu: return f.template operator()<Act::silu>();
    case Act::sigmoid: return f.template operator()<Act::sigmoid>();
  }
}

}  // namespace hgrn::cpu
