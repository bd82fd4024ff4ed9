// Asynchronous copies: the parts of their decoder.
#pragma once

#include "decode.h"

namespace gpu {

bool decode_bulk(const Statement& given, Build& build, Instruction& to);
// numbers: how many groups may be left, and whether .read is given.
bool decode_wait_group(const Statement& given, Build& build, Instruction& to, Step step);

}  // namespace gpu
