// Elementary functions without branches, calls or tables: of a float or a double, in loops that
// g++ -O3 vectorises, and of a whole vector of floats (tiles.h). Float versions are polynomials
// within 2 ulp, right at overflow, infinities and NaN; double versions are libm's.
// Test: tests/ops/test_glu.cpp
#pragma once
#include <cmath>
#include <cstdint>
#include <type_traits>

#include "cpu/isa.h"
#include "ops/act.h"

namespace hgrn::cpu {
inline namespace HGRN_ISA {

// The same constant in T: a number or every lane of a vector.
template <class T>
inline T constant(float x) {
  if constexpr (std::is_arithmetic_v<T>)
    return T(x);
  else
    return T{} + x;
}

// Integers of the same shape: of a float here, of vectors in tiles.h.
template <class T>
struct IntOf;
template <>
struct IntOf<float> {
  using type = int32_t;
};

// e^x = 2^n e^r, n = round(x / ln 2), |r| <= ln(2)/2, ln 2 in two parts (Cody & Waite).
template <class T>
struct ExpParts {
  T shifted, mantissa;  // n in the low bits of shifted; e^r
};
constexpr float kExpRound = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer
template <class T>
inline ExpParts<T> exp_parts(T x) {
  const T shifted = x * 1.44269504088896341f + kExpRound;
  const T n = shifted - kExpRound;
  const T r = (x - n * 0.693145751953125f) - n * 1.42860682030941723e-6f;
  T p = r * 1.9875691500e-4f + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  return {shifted, p * (r * r) + r + 1.0f};
}
template <class T>
inline T clamped(T x, float low, float high) {  // NaN fails both tests and stays
  const T lowest = constant<T>(low), highest = constant<T>(high);
  x = highest < x ? highest : x;
  return lowest > x ? lowest : x;
}

inline float exp_of(float x) {
  const ExpParts<float> e = exp_parts(clamped(x, -104.0f, 89.0f));
  // 2^n in two factors, since n runs from -150 to 128.
  const uint32_t whole = __builtin_bit_cast(uint32_t, e.shifted) - 0x4b400000u;
  const uint32_t half = uint32_t(int32_t(whole) >> 1);
  const float s1 = __builtin_bit_cast(float, (half + 127u) << 23);
  const float s2 = __builtin_bit_cast(float, (whole - half + 127u) << 23);
  return e.mantissa * s1 * s2;
}
inline double exp_of(double x) {
  return std::exp(x);
}

// e^x where a subnormal result counts as 0 and one above 2^127.5 as infinity: for sums with 1.
template <class T>
inline T exp_or_limit(T x) {
  if constexpr (std::is_same_v<T, double>) {
    return std::exp(x);
  } else {
    using Int = typename IntOf<T>::type;
    const ExpParts<T> e = exp_parts(clamped(x, -88.0f, 88.8f));  // n from -127 to 128
    const Int scale = (__builtin_bit_cast(Int, e.shifted) - (0x4b400000 - 127)) << 23;
    return e.mantissa * __builtin_bit_cast(T, scale);
  }
}

// 1/x; tiles.h has a faster one for the vectors of some processors.
template <class T>
struct Reciprocal {
  static T of(T x) { return 1.0f / x; }
};

template <class T>
inline T sigmoid_of(T x) {
  return Reciprocal<T>::of(1.0f + exp_or_limit(-x));
}

template <class T>
inline T abs_of(T x) {
  if constexpr (std::is_arithmetic_v<T>)
    return std::fabs(x);
  else
    return __builtin_bit_cast(T, __builtin_bit_cast(typename IntOf<T>::type, x) & 0x7fffffff);
}

// sigmoid(x) and sigmoid(-x) from one exponential that cannot overflow, neither by subtraction.
template <class T>
struct SigmoidPair {
  T plus, minus;
};
template <class T>
inline SigmoidPair<T> sigmoid_pair(T x) {
  const T e = exp_or_limit(-abs_of(x));
  const T near_one = Reciprocal<T>::of(1.0f + e), near_zero = e * near_one;
  return {x < constant<T>(0) ? near_zero : near_one, x < constant<T>(0) ? near_one : near_zero};
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
    return {x, constant<T>(1)};
  } else {
    const T s = sigmoid_of(x);
    if constexpr (A == Act::sigmoid) return {s, s * (1.0f - s)};
    if constexpr (A == Act::silu) return {x * s, s + x * s * (1.0f - s)};
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

}  // namespace HGRN_ISA
}  // namespace hgrn::cpu
