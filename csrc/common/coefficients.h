// A mixing coefficient as a kernel sees it: one number, or a tensor read through strides that are 0 where it
// broadcasts.
#pragma once

#include "common/scalar.h"

namespace resformer {

struct Coefficient {
  const void* data;  // null: the number `value` serves
  DType dtype;       // of data
  float value;
  int64_t stride[4];  // elements, over V's axes (batch, time, head, dim); packed V has batch 1

  RESFORMER_INLINE float load(int64_t offset) const {
    switch (dtype) {
      case DType::bfloat16:
        return to_float(static_cast<const bf16*>(data)[offset]);
      case DType::float16:
        return to_float(static_cast<const f16*>(data)[offset]);
      default:
        return static_cast<const float*>(data)[offset];
    }
  }

  // Where the row (b, t, h) starts; within it, element d lies d * stride[3] further.
  RESFORMER_INLINE int64_t row(int64_t b, int64_t t, int64_t h) const {
    return b * stride[0] + t * stride[1] + h * stride[2];
  }

  RESFORMER_INLINE float at(int64_t b, int64_t t, int64_t h, int64_t d) const {
    return data == nullptr ? value : load(row(b, t, h) + d * stride[3]);
  }

  // One coefficient serves a whole row of V.
  RESFORMER_INLINE bool uniform_in_row() const { return data == nullptr || stride[3] == 0; }
};

}  // namespace resformer
