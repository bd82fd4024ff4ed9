// Which build of a kernel runs: every *_cpu_isa.cpp file is compiled once per instruction set.
#pragma once

#include <string>

namespace resformer {

enum class Isa : int { portable = 0, avx2 = 1, avx512 = 2, avx512_bf16 = 3, avx512_amx = 4 };

// The highest instruction set that both this processor and this build have.
Isa best_isa();

// The one in use: RESFORMER_CPU where it is set, else the fastest here. Throws on a name that is unknown or
// cannot run.
Isa current_isa();

// Why AMX's bfloat16 tiles cannot be used here, empty where they can.
std::string amx_missing();

// Asks the system, once, to let this process use them. Throws where it refuses.
void request_amx();

}  // namespace resformer
