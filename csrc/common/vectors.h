// Several neighbouring elements of a GPU lane, moved at once and widened to float32: 16 bytes an instruction
// where COUNT elements fill them (the address is then a multiple of 16), else one by one.
#pragma once

#include "common/scalar.h"

namespace resformer {

template <class T>
constexpr int kVector = 16 / sizeof(T);

template <class T, int COUNT>
static RESFORMER_INLINE void load_vector(const T* from, float* to) {
  T elements[COUNT];
#if defined(__CUDA_ARCH__)
  if constexpr (COUNT * sizeof(T) >= 16) {
    // Read only while the kernel runs, which lets the compiler move loads ahead of stores.
    constexpr int words = COUNT * sizeof(T) / 16;
    uint4 raw[words];
    for (int i = 0; i < words; ++i) raw[i] = __ldg(reinterpret_cast<const uint4*>(from) + i);
    memcpy(elements, raw, sizeof(raw));
  } else {
    memcpy(elements, from, sizeof(elements));
  }
#else
  memcpy(elements, from, sizeof(elements));
#endif
  for (int i = 0; i < COUNT; ++i) to[i] = to_float(elements[i]);
}

template <class T, int COUNT>
static RESFORMER_INLINE void store_vector(T* to, const float* from) {
  T elements[COUNT];
  for (int i = 0; i < COUNT; ++i) elements[i] = from_float<T>(from[i]);
#if defined(__CUDA_ARCH__)
  if constexpr (COUNT * sizeof(T) >= 16) {
    constexpr int words = COUNT * sizeof(T) / 16;
    uint4 raw[words];
    memcpy(raw, elements, sizeof(raw));
    for (int i = 0; i < words; ++i) reinterpret_cast<uint4*>(to)[i] = raw[i];
    return;
  }
#endif
  memcpy(to, elements, sizeof(elements));
}

}  // namespace resformer
