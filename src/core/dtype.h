// Element types that a Tensor may have, and the conversions of the 16-bit ones.
#pragma once
#include <cstddef>
#include <cstdint>
#include <cstring>

#include "core/host_device.h"

namespace hgrn {

enum class DType : uint8_t { f32, f64, bf16, f16, i32, i16, u8 };

constexpr size_t size_of(DType t) {
  switch (t) {
    case DType::f64: return 8;
    case DType::f32:
    case DType::i32: return 4;
    case DType::bf16:
    case DType::f16:
    case DType::i16: return 2;
    case DType::u8: return 1;
  }
  return 0;
}

constexpr const char* name_of(DType t) {
  switch (t) {
    case DType::f64: return "f64";
    case DType::f32: return "f32";
    case DType::i32: return "i32";
    case DType::i16: return "i16";
    case DType::bf16: return "bf16";
    case DType::f16: return "f16";
    case DType::u8: return "u8";
  }
  return "?";
}

template <class T>
struct DTypeOf;
template <>
struct DTypeOf<float> {
  static constexpr DType value = DType::f32;
};
template <>
struct DTypeOf<double> {
  static constexpr DType value = DType::f64;
};
template <>
struct DTypeOf<int32_t> {
  static constexpr DType value = DType::i32;
};
template <>
struct DTypeOf<int16_t> {
  static constexpr DType value = DType::i16;
};
template <>
struct DTypeOf<uint8_t> {
  static constexpr DType value = DType::u8;
};

HGRN_HD inline uint32_t bits_of(float x) {
  uint32_t bits;
  memcpy(&bits, &x, sizeof(bits));
  return bits;
}
HGRN_HD inline float float_of(uint32_t bits) {
  float x;
  memcpy(&x, &bits, sizeof(x));
  return x;
}

// Host-side conversions (files, tests). Round to nearest even; NaN stays NaN.
inline float bf16_to_float(uint16_t h) {
  return float_of(uint32_t(h) << 16);
}

inline uint16_t float_to_bf16(float f) {
  const uint32_t u = bits_of(f);
  if ((u & 0x7fffffffu) > 0x7f800000u) return uint16_t((u >> 16) | 0x40u);
  return uint16_t((u + 0x7fffu + ((u >> 16) & 1u)) >> 16);
}

// An fp32 weight in two halves of 16 bits:  bits of the weight = (bf16 << 16) + rest, rest in
// [-2^15, 2^15).  bf16 is the nearest, so that operations may read it; a tie goes away from zero:
// to the nearest even, rest would need 2^15 as well. 0x3f80c000 is 0x3f81 and -0x4000. NaN stays
// NaN, not its bits.
struct SplitWeight {
  uint16_t bf16;
  int16_t rest;
};

HGRN_HD inline SplitWeight split_weight(float weight) {
  const uint32_t u = bits_of(weight);
  if ((u & 0x7fffffffu) > 0x7f800000u) return {uint16_t((u >> 16) | 0x40u), 0};
  return {uint16_t((u + 0x8000u) >> 16), int16_t(uint16_t(u))};
}
HGRN_HD inline float join_weight(SplitWeight w) {
  return float_of((uint32_t(w.bf16) << 16) + uint32_t(int32_t(w.rest)));
}

inline float f16_to_float(uint16_t h) {
  const uint32_t sign = uint32_t(h & 0x8000u) << 16;
  uint32_t exponent = (h >> 10) & 0x1fu, mantissa = h & 0x3ffu, u;
  if (exponent == 0x1f) {
    u = sign | 0x7f800000u | (mantissa << 13);
  } else if (exponent != 0) {
    u = sign | ((exponent + 112) << 23) | (mantissa << 13);
  } else if (mantissa != 0) {  // subnormal: normalise
    exponent = 113;
    while (!(mantissa & 0x400u)) mantissa <<= 1, --exponent;
    u = sign | (exponent << 23) | ((mantissa & 0x3ffu) << 13);
  } else {
    u = sign;
  }
  return float_of(u);
}

}  // namespace hgrn
