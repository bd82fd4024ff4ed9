// Matrices in the registers of a warp.
//
// All fragments of mma and wgmma have one pattern. Four lanes hold a row of an 8-row block, each of them EACH
// elements that follow one another, and a lane's registers go through the blocks: down first, then to the
// right. An operand B is the same with its columns for rows.
#pragma once

#include <algorithm>
#include <cstring>

#include "fault.h"
#include "formats.h"
#include "machine.h"
#include "product.h"

namespace gpu {

// Whether all lanes of a warp are here, as .sync.aligned asks. Where it is false, the step returns
// Outcome::waits.
inline bool whole_warp(Warp& warp) {
  if (!together(warp, ALL)) return false;
  if (warp.live != ALL)
    fail(Kind::barrier, "needs 32 lanes, and the warp has ", __builtin_popcount(warp.live));
  if (warp.active != ALL) fail(Kind::barrier, "its guard is not the same in all lanes");
  return true;
}

struct Place {
  uint32_t row, column;
};

// The first of the elements that a lane holds in its block of that number.
constexpr Place place_of(uint32_t block, uint32_t blocks_down, uint32_t each, uint32_t lane) {
  return {block % blocks_down * 8 + lane / 4, (block / blocks_down * 4 + lane % 4) * each};
}

// The values of operand A or B, element (row, column) to to[row * row_step + column * column_step].
// `blocks_down` is 2 for the 16 rows of A, 1 for 8 rows of A and the 8 columns of B.
inline void load_operand(const Warp& warp, const Row* rows, Element element, uint32_t k, uint32_t blocks_down,
                         uint32_t row_step, uint32_t column_step, float* to) {
  const uint32_t each = 4 / bytes_of(element);
  float values[4 * LANES];
  for (uint32_t i = 0; i < blocks_down * k / (4 * each); ++i) {
    widen(element, warp.frame + rows[i], each * LANES, values);
    for (uint32_t lane = 0; lane < LANES; ++lane) {
      const Place at = place_of(i, blocks_down, each, lane);
      for (uint32_t e = 0; e < each; ++e)
        to[at.row * row_step + (at.column + e) * column_step] = values[lane * each + e];
    }
  }
}

constexpr uint32_t accumulator_rows(const Product& p) {
  return p.m * p.n / LANES / (p.sum == Sum::f16 ? 2 : 1);
}

// Calls do_it(element of `values`, register, index in it) for what a warp's accumulators hold; `PACKED` are
// two in a register. The inner loops are such that a compiler sees elements beside one another.
template <bool PACKED, class DoIt>
void for_accumulators(const Product& p, DoIt&& do_it) {
  for (uint32_t block = 0; block < p.m * p.n / 64; ++block) {
    const Place first = place_of(block, p.m / 8, 2, 0);
    for (uint32_t i = 0; i < 8; ++i) {
      const uint32_t at = (first.row + i) * p.n + first.column;
      for (uint32_t j = 0; j < 8; ++j)
        do_it(at + j, PACKED ? block : block * 2 + j % 2, PACKED ? i * 8 + j : i * 4 + j / 2);
    }
  }
}

// The accumulators in float32, m x n. Those of integers are zeros here: `store_sums` adds to them.
inline void load_sums(const Warp& warp, const Row* rows, const Product& p, float* to) {
  if (p.sum == Sum::s32) {
    std::fill_n(to, p.m * p.n, 0.0f);
  } else if (p.sum == Sum::f32) {
    for_accumulators<false>(
        p, [&](uint32_t at, uint32_t r, uint32_t i) { to[at] = warp.row<float>(rows[r])[i]; });
  } else {
    for_accumulators<true>(p, [&](uint32_t at, uint32_t r, uint32_t i) {
      to[at] = decode<F16>(warp.row<uint16_t>(rows[r])[i]);
    });
  }
}

// The sums to accumulators; integers are added to those in `before`, unless it is nullptr.
inline void store_sums(const Warp& warp, const Row* rows, const Row* before, const Product& p,
                       const float* from) {
  if (p.sum == Sum::f32) {
    for_accumulators<false>(
        p, [&](uint32_t at, uint32_t r, uint32_t i) { warp.row<float>(rows[r])[i] = from[at]; });
  } else if (p.sum == Sum::f16) {
    for_accumulators<true>(p, [&](uint32_t at, uint32_t r, uint32_t i) {
      warp.row<uint16_t>(rows[r])[i] = static_cast<uint16_t>(encode<F16>(from[at], Round::nearest));
    });
  } else {
    for_accumulators<false>(p, [&](uint32_t at, uint32_t r, uint32_t i) {
      int64_t sum = static_cast<int64_t>(from[at]);
      if (before != nullptr) sum += warp.row<int32_t>(before[r])[i];
      if (p.saturates) sum = std::clamp<int64_t>(sum, INT32_MIN, INT32_MAX);
      warp.row<int32_t>(rows[r])[i] = static_cast<int32_t>(sum);
    });
  }
}

}  // namespace gpu
