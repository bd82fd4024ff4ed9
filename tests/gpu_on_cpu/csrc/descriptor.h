// Matrix operands of wgmma in shared memory, as 64-bit descriptors tell.
#pragma once

#include <cstdint>

#include "memory.h"

namespace gpu {

// All in bytes. An operand is made of chunks of 16 bytes; eight lines of `span` bytes are an atom, in which a
// swizzle permutes the chunks.
struct Descriptor {
  uint32_t start = 0;
  uint32_t leading = 0, stride = 0;
  uint32_t span = 16;  // 16: no swizzle; 32, 64 or 128
  uint32_t base = 0;   // where the swizzle's pattern starts, modulo 1024
};

// An operand: `extent` elements of M or N by 32 bytes of K.
struct Tile {
  Descriptor at;
  bool k_major;     // elements along K follow one another; otherwise those along M or N, of 16 bits
  uint32_t extent;  // of the whole operand
};

// Fault{Kind::malformed} where it is no descriptor of such an operand in `shared_bytes`.
Tile read_descriptor(uint64_t bits, bool k_major, uint32_t extent, uint64_t shared_bytes);

// Elements [first, first + count) of M or N: each with its 32 bytes of K, or each of the 16 numbers of K with
// theirs.
void read_tile(const Access& by, const Tile& tile, uint32_t first, uint32_t count, std::byte* to);

}  // namespace gpu
