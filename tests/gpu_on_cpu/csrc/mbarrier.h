// Barriers in shared memory, by phases: threads that arrive, and bytes that asynchronous copies bring.
#pragma once

#include <cstdint>
#include <vector>

#include "causality.h"

namespace gpu {

struct Block;

struct MBarrier {
  struct Use {  // by a warp, the last one of each
    Strand strand;
    Clock clock;
    uint32_t lane, pc, warp;
  };
  uint32_t expected = 0;  // arrivals a phase
  uint32_t pending = 0;   // arrivals that this phase still waits for
  int64_t bytes = 0;      // of copies: expected and not yet there
  uint64_t phase = 0;     // number of the phase that is under way; its parity is what test_wait asks about
  View arriving;          // of what arrived in this phase
  View completed;         // of the phase that ended last
  Use made{};             // mbarrier.init
  std::vector<Use> uses;
};

// Bytes of an asynchronous copy are there, and `seen` is what it did: the phase that is under way counts it.
void complete_tx(Block& block, uint32_t address, uint64_t bytes, const View& seen);
// `count` threads arrive, as cp.async.mbarrier.arrive does once the thread's earlier cp.async are done.
void arrive(Block& block, uint32_t address, uint32_t count, const View& seen);
// Without .noinc it also adds to what the phase waits for, when it is issued.
void expect_more(Block& block, uint32_t address, uint32_t count);

}  // namespace gpu
