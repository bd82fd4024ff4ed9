#pragma once

#include "decode.h"
#include "machine.h"

namespace gpu {

void add_barriers(Decoders& decoders);   // bar, barrier
void add_mbarriers(Decoders& decoders);  // mbarrier

// Lanes of a warp have ended: barriers that count on all threads of the block cannot be reached any more.
void lanes_ended(Warp& warp);

}  // namespace gpu
