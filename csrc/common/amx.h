// AMX's tile registers, eight of up to 16 rows of 64 bytes, as functions of their numbers.
//
// By inline assembly: GCC 12's own intrinsics tell it of no memory that a tile load reads, nor of more than
// eight bytes of a configuration.
#pragma once

#include <cstdint>

#include "common/simd.h"

namespace resformer::RESFORMER_ISA::amx {

constexpr int kRows = 16;   // of a tile
constexpr int kWords = 16;  // 32-bit words in a row of a tile

// The registers of one product: C in 0 to 3, A in 4, B in 5 to 7.
constexpr int kA = 4;
constexpr int kB = 5;

// The operand of ldtilecfg.
struct alignas(64) Configuration {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {};
  uint8_t rows[16] = {};
};

// Gives tiles of A and C `rows` rows and those of B all of theirs. What tiles held is lost.
static inline void configure(int64_t rows) {
  Configuration all;
  for (int t = 0; t < 8; ++t) {
    all.row_bytes[t] = 4 * kWords;
    all.rows[t] = static_cast<uint8_t>(t <= kA ? rows : kRows);
  }
  asm volatile("ldtilecfg %0" : : "m"(all));
}

// Leaves the thread as it was before: with no tiles for the system to save.
static inline void release() { asm volatile("tilerelease" : :); }

template <int tile>
static inline void zero() {
  asm volatile("tilezero %%tmm%c0" : : "i"(tile));
}

// Rows `stride` bytes apart, `column` words to the right of `from`: an immediate, so that the tiles of a step
// share their registers.
template <int tile, int column = 0>
static inline void load(const float* from, int64_t stride) {
  asm volatile("tileloadd %c3(%0,%1,1), %%tmm%c2"
               :
               : "r"(from), "r"(stride), "i"(tile), "i"(4 * column)
               : "memory");
}

template <int tile, int column = 0>
static inline void store(float* to, int64_t stride) {
  asm volatile("tilestored %%tmm%c2, %c3(%0,%1,1)"
               :
               : "r"(to), "r"(stride), "i"(tile), "i"(4 * column)
               : "memory");
}

// C += A B, a word of A and of B being two bfloat16 along the summed axis.
template <int c, int a, int b>
static inline void dot() {
  asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(c), "i"(a), "i"(b));
}

}  // namespace resformer::RESFORMER_ISA::amx
