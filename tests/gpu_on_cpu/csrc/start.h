// Blocks as they start: how many at a time, and what their registers hold.
#pragma once

#include "machine.h"

namespace gpu {

uint64_t count_of(const uint32_t (&extents)[3]);

// Blocks that a multiprocessor holds at a time; may be 0. Faults: limits.
uint32_t blocks_a_multiprocessor(const Kernel& kernel, const Launch& launch);

// A warp of a block of so many threads, at its first instruction.
void start_warp(Warp& warp, uint32_t threads);

}  // namespace gpu
