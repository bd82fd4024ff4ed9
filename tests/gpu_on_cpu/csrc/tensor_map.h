// Tensor maps: what a tensor descriptor is to a kernel that copies tiles of a tensor. NVIDIA does not publish
// the form of its own; Python makes these, see tensor_maps.py.
#pragma once

#include <cstdint>

namespace gpu {

constexpr uint32_t TENSOR_AXES = 5;

struct TensorMap {  // innermost axis first
  static constexpr uint64_t MAGIC = 0x5445'4E53'4F52'4D41;
  uint64_t magic;
  uint64_t address;
  uint32_t rank, element_bytes;
  uint64_t sizes[TENSOR_AXES];
  uint64_t strides[TENSOR_AXES - 1];  // in bytes, of all axes but the first
  uint32_t box[TENSOR_AXES];
  uint32_t swizzle;   // 0: none; n: in patterns of 16 << n bytes
  uint32_t fill_nan;  // outside of the tensor are NaNs, and zeros otherwise
  uint32_t unused;
};
static_assert(sizeof(TensorMap) == 128);

}  // namespace gpu
