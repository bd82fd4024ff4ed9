// Element types and scalar conversions shared by every kernel.
//
// Translation units are compiled once per instruction set, so nothing here may have external linkage: the
// linker would keep one copy, and the portable path could then execute AVX-512 code. Hence `static` functions
// only. A GPU has instructions for the conversions; they give the same bits, but for which NaN a NaN becomes.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__CUDACC__)
#define RESFORMER_INLINE __host__ __device__ __forceinline__
#else
#define RESFORMER_INLINE inline __attribute__((always_inline))
#endif

namespace resformer {

enum class DType : int32_t { float32 = 0, bfloat16 = 1, float16 = 2 };

// Storage types: distinct from uint16_t so that a template can tell them apart.
struct bf16 {
  uint16_t bits;
};
struct f16 {
  uint16_t bits;
};

static RESFORMER_INLINE float float_from_bits(uint32_t bits) {
  float value;
  memcpy(&value, &bits, sizeof(value));
  return value;
}

static RESFORMER_INLINE uint32_t bits_from_float(float value) {
  uint32_t bits;
  memcpy(&bits, &value, sizeof(bits));
  return bits;
}

static RESFORMER_INLINE float to_float(float value) { return value; }
static RESFORMER_INLINE float to_float(int8_t value) { return static_cast<float>(value); }

static RESFORMER_INLINE float to_float(bf16 value) {
  return float_from_bits(static_cast<uint32_t>(value.bits) << 16);
}

// Subtracting 0.5 from (0.5 + mantissa * 2^-24) leaves a subnormal half exactly, without a loop over leading
// zeros.
static RESFORMER_INLINE float to_float(f16 value) {
#if defined(__CUDA_ARCH__)
  float wide;
  asm("cvt.f32.f16 %0, %1;" : "=f"(wide) : "h"(value.bits));
  return wide;
#else
  const uint32_t sign = static_cast<uint32_t>(value.bits & 0x8000u) << 16;
  const uint32_t magnitude = value.bits & 0x7fffu;
  const uint32_t normal = (magnitude << 13) + 0x38000000u;
  const uint32_t special = (magnitude << 13) | 0x7f800000u;
  const uint32_t subnormal = bits_from_float(float_from_bits(0x3f000000u | magnitude) - 0.5f);
  const uint32_t finite = magnitude < 0x0400u ? subnormal : normal;
  return float_from_bits(sign | (magnitude >= 0x7c00u ? special : finite));
#endif
}

template <typename T>
static RESFORMER_INLINE T from_float(float value);

template <>
RESFORMER_INLINE float from_float<float>(float value) {
  return value;
}

// Round to nearest even; a NaN stays one even where its payload sits in the bits that go.
template <>
RESFORMER_INLINE bf16 from_float<bf16>(float value) {
#if defined(__CUDA_ARCH__)
  bf16 rounded;
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(rounded.bits) : "f"(value));
  return rounded;
#else
  const uint32_t bits = bits_from_float(value);
  const uint32_t rounded = bits + 0x7fffu + ((bits >> 16) & 1u);
  return bf16{static_cast<uint16_t>((value != value ? bits | 0x00400000u : rounded) >> 16)};
#endif
}

// Below 2^-14 the float adder rounds: 0.5 + |value| leaves the subnormal half in the lowest bits.
template <>
RESFORMER_INLINE f16 from_float<f16>(float value) {
#if defined(__CUDA_ARCH__)
  f16 rounded;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(rounded.bits) : "f"(value));
  return rounded;
#else
  const uint32_t bits = bits_from_float(value);
  const uint32_t magnitude = bits & 0x7fffffffu;
  const uint32_t subnormal = bits_from_float(float_from_bits(magnitude) + 0.5f) - 0x3f000000u;
  const uint32_t normal = (magnitude - 0x38000000u + 0x0fffu + ((magnitude >> 13) & 1u)) >> 13;
  const uint32_t special = magnitude > 0x7f800000u ? 0x7e00u | ((magnitude >> 13) & 0x3ffu) : 0x7c00u;
  const uint32_t finite = magnitude < 0x38800000u ? subnormal : normal;
  const uint32_t half = magnitude >= 0x47800000u ? special : finite;
  return f16{static_cast<uint16_t>(((bits >> 16) & 0x8000u) | half)};
#endif
}

// `at` counts elements of `dtype`.
static RESFORMER_INLINE void store_as(DType dtype, void* out, int64_t at, double value) {
  const float rounded = static_cast<float>(value);
  if (dtype == DType::float32) {
    static_cast<float*>(out)[at] = rounded;
  } else if (dtype == DType::bfloat16) {
    static_cast<bf16*>(out)[at] = from_float<bf16>(rounded);
  } else {
    static_cast<f16*>(out)[at] = from_float<f16>(rounded);
  }
}

}  // namespace resformer
