// Units and sequences of a block of the CUDA kernel, and their place in its shared memory.
//
// A block has whole groups of units, and waits for no other block; or one part of a group, whose other parts
// `split - 1` blocks have. A team of `members` blocks has all units. Each team takes some of the sequences,
// independently of the other teams.
#pragma once

#include <algorithm>
#include <limits>

#include "reservoir/reservoir.h"

namespace resformer {

struct BlockPlan {
  int64_t groups, size, inputs;   // of the recurrence; columns of W_in, or 0
  int64_t padded, padded_inputs;  // rounded up to vectors of kVector
  int64_t whole;                  // groups per block
  int64_t split;                  // blocks per group; 1 where blocks have whole groups
  int64_t each;                   // units of one group per block
  int64_t members, teams;
  int64_t sequences;  // most sequences per team
  bool narrow;        // bfloat16 W

  RESFORMER_INLINE int64_t own() const { return whole * each; }
  RESFORMER_INLINE int64_t blocks() const { return members * teams; }
  RESFORMER_INLINE int64_t heard() const { return whole * padded; }
};

constexpr int64_t kVector = 4;  // elements that a lane reads at once

// A sequence, as a block stores it.
struct BlockSpan {
  int64_t row;    // of the states, its first step
  int64_t input;  // elements, of its first step
  int64_t steps;
};

// Offsets in a block's shared memory, in bytes. Arrays up to `rows` are read in vectors.
struct BlockMemory {
  int64_t heard;       // float (2, sequences, heard): factors of W, of this step and of the next
  int64_t inputs;      // float (2, sequences, padded_inputs)
  int64_t in_rows;     // float (own, padded_inputs): W_in
  int64_t rows;        // (own, padded): W
  int64_t spans;       // BlockSpan (sequences)
  int64_t state;       // float (sequences, own)
  int64_t drive;       // float (2, sequences, own): the inputs themselves, without W_in
  int64_t gain;        // float (2, sequences, own): of the adjoint
  int64_t leak, bias;  // float (own)
  int64_t end;
};

static RESFORMER_INLINE BlockMemory memory_of(const BlockPlan& p) {
  BlockMemory m{};
  const int64_t own = p.own(), s = p.sequences;
  m.heard = 0;
  m.inputs = m.heard + 8 * s * p.heard();
  m.in_rows = m.inputs + 8 * s * p.padded_inputs;
  m.rows = m.in_rows + 4 * own * p.padded_inputs;
  m.spans = m.rows + (p.narrow ? 2 : 4) * own * p.padded;
  m.state = m.spans + static_cast<int64_t>(sizeof(BlockSpan)) * s;
  m.drive = m.state + 4 * s * own;
  m.gain = m.drive + 8 * s * own;
  m.leak = m.gain + 8 * s * own;
  m.bias = m.leak + 4 * own;
  m.end = m.bias + 4 * own;
  return m;
}

// A warp sums for `units` by `columns` sequences at once, which share their loads.
struct WarpTile {
  int64_t units, columns;
};

constexpr WarpTile kOneSequence{2, 1}, kSequences{4, 4};

inline WarpTile tile_of(const BlockPlan& p) { return p.sequences == 1 ? kOneSequence : kSequences; }

namespace reservoir_blocks {

inline int64_t whole_number(int64_t of, int64_t by) { return (of + by - 1) / by; }

// Modelled cycles of a step, from data sheets: a multiprocessor reads 128 bytes of shared memory per cycle; a
// number takes some 1500 cycles from one multiprocessor to another; the L2 cache gives 2500 bytes per cycle.
inline int64_t cycles(const BlockPlan& p) {
  const WarpTile tile = tile_of(p);
  const int64_t tiles = p.whole * whole_number(p.each, tile.units) * whole_number(p.sequences, tile.columns);
  const int64_t weights = tile.units * (p.padded * (p.narrow ? 2 : 4) + p.padded_inputs * 4);
  const int64_t read = weights + 4 * tile.columns * (p.padded + p.padded_inputs);
  const int64_t alone = (tiles + 3) / 4 * 4 * read / 128;
  return p.split == 1 ? alone : alone + 1500 + p.blocks() * p.sequences * p.size * 8 / 2500;
}

// Completes a plan whose `whole` and `split` are set; false where there are too few blocks for all units.
inline bool complete(BlockPlan* p, int64_t sequences, int64_t multiprocessors) {
  p->members = p->split > 1 ? p->groups * p->split : whole_number(p->groups, p->whole);
  if (p->members > multiprocessors) return false;
  p->teams = std::max<int64_t>(1, std::min(sequences, multiprocessors / p->members));
  p->sequences = std::max<int64_t>(1, whole_number(sequences, p->teams));
  return true;
}

}  // namespace reservoir_blocks

// The fastest plan that fits; `blocks()` is 0 where none does. `cuda_plan.py` gives the same answer.
inline BlockPlan plan_blocks(int64_t groups, int64_t size, int64_t inputs, int64_t sequences, bool narrow,
                             int64_t multiprocessors, int64_t block_bytes) {
  using namespace reservoir_blocks;
  BlockPlan best{};
  int64_t least = std::numeric_limits<int64_t>::max();
  const auto consider = [&](int64_t whole, int64_t split) {
    BlockPlan p{groups, size, inputs};
    p.padded = whole_number(size, kVector) * kVector;
    p.padded_inputs = whole_number(inputs, kVector) * kVector;
    p.narrow = narrow;
    p.whole = whole;
    p.each = whole_number(size, split);
    p.split = whole_number(size, p.each);
    if (!complete(&p, sequences, multiprocessors) || memory_of(p).end > block_bytes) return;
    if (cycles(p) < least) {
      least = cycles(p);
      best = p;
    }
  };
  for (int64_t whole = 1; whole < 2 * groups; whole *= 2) consider(std::min(whole, groups), 1);
  const int64_t most = multiprocessors / groups;
  for (int64_t split = 2; split < 2 * most; split *= 2) consider(1, std::min(split, most));
  return best;
}

}  // namespace resformer
