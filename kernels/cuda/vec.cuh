// Wide loads and stores. A Pack is kVec elements of a tensor as they lie in memory: at most two
// 16-byte accesses. Arithmetic is in fp32 whatever the tensor holds, so packs convert.
// Kernels come in two widths: kWide where rows and pointers are 16-byte aligned, else 1.
#pragma once
#include <cuda_bf16.h>

#include <cstdint>
#include <initializer_list>
#include <type_traits>

#include "core/rng.h"
#include "core/tensor.h"

namespace hgrn {

using bf16 = __nv_bfloat16;

template <>
struct DTypeOf<__nv_bfloat16> {
  static constexpr DType value = DType::bf16;
};

constexpr int kWide = 8;  // 16 bytes of bf16, 32 of fp32

// f(std::type_identity<T>) with the tensor's element type.
template <class F>
void dispatch(DType t, F&& f) {
  if (t == DType::bf16) return f(std::type_identity<bf16>{});
  if (t == DType::f32) return f(std::type_identity<float>{});
  fail(Exit::failed, "the CUDA backend computes in f32 or bf16, not in {}", name_of(t));
}

// f(std::integral_constant<int, kWide>) where rows of `cols` elements may be read 16 bytes at a
// time, else f(std::integral_constant<int, 1>).
template <class F>
void dispatch_width(int64_t cols, std::initializer_list<const void*> pointers, F&& f) {
  bool wide = cols % kWide == 0;
  for (const void* p : pointers) wide = wide && reinterpret_cast<uintptr_t>(p) % 16 == 0;
  if (wide) return f(std::integral_constant<int, kWide>{});
  f(std::integral_constant<int, 1>{});
}

__device__ __forceinline__ float bf16_low(uint32_t pair) {
  return __uint_as_float(pair << 16);
}
__device__ __forceinline__ float bf16_high(uint32_t pair) {
  return __uint_as_float(pair & 0xffff0000u);
}
__device__ __forceinline__ uint32_t bf16_pair(float low, float high) {
  const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
  return *reinterpret_cast<const uint32_t*>(&pair);
}

template <class T, int kVec>
struct Pack;

template <>
struct Pack<bf16, 8> {
  uint4 raw;
  __device__ __forceinline__ void load(const bf16* p) { raw = *reinterpret_cast<const uint4*>(p); }
  __device__ __forceinline__ void store(bf16* p) const { *reinterpret_cast<uint4*>(p) = raw; }
  __device__ __forceinline__ void unpack(float (&v)[8]) const {
    const uint32_t r[4] = {raw.x, raw.y, raw.z, raw.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) v[2 * i] = bf16_low(r[i]), v[2 * i + 1] = bf16_high(r[i]);
  }
  __device__ __forceinline__ void pack(const float (&v)[8]) {
    raw = {bf16_pair(v[0], v[1]), bf16_pair(v[2], v[3]), bf16_pair(v[4], v[5]),
           bf16_pair(v[6], v[7])};
  }
};

template <>
struct Pack<bf16, 4> {
  uint2 raw;
  __device__ __forceinline__ void load(const bf16* p) { raw = *reinterpret_cast<const uint2*>(p); }
  __device__ __forceinline__ void store(bf16* p) const { *reinterpret_cast<uint2*>(p) = raw; }
  __device__ __forceinline__ void unpack(float (&v)[4]) const {
    v[0] = bf16_low(raw.x), v[1] = bf16_high(raw.x);
    v[2] = bf16_low(raw.y), v[3] = bf16_high(raw.y);
  }
  __device__ __forceinline__ void pack(const float (&v)[4]) {
    raw = {bf16_pair(v[0], v[1]), bf16_pair(v[2], v[3])};
  }
};

template <>
struct Pack<bf16, 1> {
  bf16 raw;
  __device__ __forceinline__ void load(const bf16* p) { raw = *p; }
  __device__ __forceinline__ void store(bf16* p) const { *p = raw; }
  __device__ __forceinline__ void unpack(float (&v)[1]) const { v[0] = __bfloat162float(raw); }
  __device__ __forceinline__ void pack(const float (&v)[1]) { raw = __float2bfloat16_rn(v[0]); }
};

template <>
struct Pack<float, 8> {
  float4 a, b;
  __device__ __forceinline__ void load(const float* p) {
    a = reinterpret_cast<const float4*>(p)[0], b = reinterpret_cast<const float4*>(p)[1];
  }
  __device__ __forceinline__ void store(float* p) const {
    reinterpret_cast<float4*>(p)[0] = a, reinterpret_cast<float4*>(p)[1] = b;
  }
  __device__ __forceinline__ void unpack(float (&v)[8]) const {
    v[0] = a.x, v[1] = a.y, v[2] = a.z, v[3] = a.w, v[4] = b.x, v[5] = b.y, v[6] = b.z, v[7] = b.w;
  }
  __device__ __forceinline__ void pack(const float (&v)[8]) {
    a = {v[0], v[1], v[2], v[3]}, b = {v[4], v[5], v[6], v[7]};
  }
};

template <>
struct Pack<float, 4> {
  float4 raw;
  __device__ __forceinline__ void load(const float* p) {
    raw = *reinterpret_cast<const float4*>(p);
  }
  __device__ __forceinline__ void store(float* p) const { *reinterpret_cast<float4*>(p) = raw; }
  __device__ __forceinline__ void unpack(float (&v)[4]) const {
    v[0] = raw.x, v[1] = raw.y, v[2] = raw.z, v[3] = raw.w;
  }
  __device__ __forceinline__ void pack(const float (&v)[4]) { raw = {v[0], v[1], v[2], v[3]}; }
};

template <>
struct Pack<float, 1> {
  float raw;
  __device__ __forceinline__ void load(const float* p) { raw = *p; }
  __device__ __forceinline__ void store(float* p) const { *p = raw; }
  __device__ __forceinline__ void unpack(float (&v)[1]) const { v[0] = raw; }
  __device__ __forceinline__ void pack(const float (&v)[1]) { raw = v[0]; }
};

template <int kVec, class T>
__device__ __forceinline__ void load(float (&v)[kVec], const T* p) {
  Pack<T, kVec> pack;
  pack.load(p);
  pack.unpack(v);
}

template <int kVec, class T>
__device__ __forceinline__ void store(T* p, const float (&v)[kVec]) {
  Pack<T, kVec> pack;
  pack.pack(v);
  pack.store(p);
}

// v rounded to T and back: what a reader of the stored value will see.
template <class T>
__device__ __forceinline__ float rounded(float v) {
  if constexpr (std::is_same_v<T, bf16>) return __bfloat162float(__float2bfloat16_rn(v));
  return v;
}

// core/rng.h's Dropout with what the host works out once a launch.
struct DropMask {
  float p, scale;
  uint32_t threshold;  // in the upper half
  uint64_t key;
  int64_t row0;
  const int64_t* clock;
  uint64_t seed;
  uint32_t site;

  DropMask(const Dropout& d)
      : p(d.p),
        scale(d.scale()),
        threshold(d.threshold() << 16),
        key(d.key()),
        row0(d.row0),
        clock(d.p > 0 ? d.clock : nullptr),
        seed(d.seed),
        site(d.site) {}

  // A kernel starts with it: the mask of the step that the clock, if there is one, shows.
  __device__ __forceinline__ DropMask now() const {
    DropMask m = *this;
    if (clock) {
      Dropout d;
      d.seed = seed, d.step = uint64_t(clock[0]), d.site = site;
      m.key = d.key(), m.row0 = clock[1];
    }
    return m;
  }

  __device__ __forceinline__ Philox bits(int64_t row, int64_t col) const {
    return Dropout::bits(key, row0 + row, col / 8);
  }
  // x with the factor of the random bits in the upper half of a word; those below change nothing.
  __device__ __forceinline__ float keep(float x, uint32_t upper) const {
    return upper >= threshold ? x * scale : 0.0f;
  }
  // The columns of two, four or eight that follow each other, by the words of theirs.
  template <int kWords>
  __device__ __forceinline__ void apply(float* v, const uint32_t (&words)[kWords]) const {
#pragma unroll
    for (int i = 0; i < kWords; ++i) {
      v[2 * i] = keep(v[2 * i], words[i] << 16);
      v[2 * i + 1] = keep(v[2 * i + 1], words[i]);
    }
  }
  // Multiplies columns col .. col+kVec-1 of the row by 0 or scale. col % kVec == 0.
  template <int kVec>
  __device__ __forceinline__ void apply(float (&v)[kVec], int64_t row, int64_t col) const {
    static_assert(kVec == 1 || kVec % 8 == 0);
    if (p == 0) return;
    if constexpr (kVec == 1) {
      const Philox b = bits(row, col);
      const int i = int(col % 8 / 2);  // selects: a run-time index would move bits to local memory
      const uint32_t word = i == 0 ? b.v[0] : i == 1 ? b.v[1] : i == 2 ? b.v[2] : b.v[3];
      v[0] = keep(v[0], col % 2 ? word : word << 16);
    } else {
#pragma unroll
      for (int from = 0; from < kVec; from += 8) apply(v + from, bits(row, col + from).v);
    }
  }
};

}  // namespace hgrn
