#pragma once

#include "decode.h"

namespace gpu {

void add_lanes(Decoders& decoders);
bool decode_warp_barrier(const Statement& given, Build& build, Instruction& to);  // bar.warp.sync

}  // namespace gpu
