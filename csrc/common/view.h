#pragma once

#include <cstdint>

#include "common/scalar.h"

namespace resformer {

// (batch, time, heads, head_dim) through strides in elements; head_dim is contiguous. Packed tensors have
// stride[0] = 0.
struct View {
  void* data = nullptr;
  int64_t stride[4] = {0, 0, 0, 1};

  template <class T>
  RESFORMER_INLINE T* row(int64_t b, int64_t t, int64_t h) const {
    return static_cast<T*>(data) + b * stride[0] + t * stride[1] + h * stride[2];
  }
};

}  // namespace resformer
