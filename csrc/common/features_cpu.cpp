#include <torch/csrc/stable/library.h>
#include <torch/headeronly/util/Exception.h>

#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <string>
#include <string_view>

#include "common/cpu_features.h"

#if defined(__x86_64__)
#include <cpuid.h>
#endif

namespace resformer {
namespace {

constexpr const char* kNames[] = {"portable", "avx2", "avx512", "avx512_bf16", "avx512_amx"};

#if defined(__x86_64__)
// __builtin_cpu_supports also asks the operating system whether it saves the wide registers.
Isa detect() {
  __builtin_cpu_init();
#if defined(RESFORMER_HAVE_AVX512)
  const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
#if defined(RESFORMER_HAVE_AVX512_BF16)
  const bool bf16 = avx512 && __builtin_cpu_supports("avx512bf16");
#if defined(RESFORMER_HAVE_AVX512_AMX)
  if (bf16 && amx_missing().empty()) return Isa::avx512_amx;
#endif
  if (bf16) return Isa::avx512_bf16;
#endif
  if (avx512) return Isa::avx512;
#endif
#if defined(RESFORMER_HAVE_AVX2)
  // F16C has no name in older compilers' __builtin_cpu_supports; every CPU with AVX2 and FMA has it.
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return Isa::avx2;
#endif
  return Isa::portable;
}

bool is_amd() {
  unsigned eax = 0, name[3] = {0, 0, 0};
  if (!__get_cpuid(0, &eax, &name[0], &name[2], &name[1])) return false;
  return std::memcmp(name, "AuthenticAMD", 12) == 0;
}
#else
Isa detect() { return Isa::portable; }
bool is_amd() { return false; }
#endif

// On AMD (Zen 4 and later) vdpbf16ps doubles the rate of a float32 FMA. On Intel server cores it issues once
// in two cycles, half the FLOP rate of two FMA ports (measured: 83 against 171 GFLOP/s a core), so widening
// wins there. AMX waits for somebody to measure it.
Isa fastest() {
  const Isa best = best_isa();
  if (best < Isa::avx512_bf16) return best;
  return is_amd() ? Isa::avx512_bf16 : Isa::avx512;
}

std::string why_not(Isa wanted) {
  if (wanted != Isa::avx512_amx || best_isa() < Isa::avx512_bf16) return "";
  const std::string missing = amx_missing();
  return missing.empty() ? "" : ": " + missing;
}

}  // namespace

Isa best_isa() {
  static const Isa isa = detect();
  return isa;
}

Isa current_isa() {
  const char* wanted = std::getenv("RESFORMER_CPU");
  if (wanted == nullptr || *wanted == '\0') {
    static const Isa isa = fastest();
    return isa;
  }
  for (int i = 0; i < static_cast<int>(sizeof(kNames) / sizeof(kNames[0])); ++i) {
    if (std::string_view(wanted) != kNames[i]) continue;
    STD_TORCH_CHECK(i <= static_cast<int>(best_isa()), "RESFORMER_CPU=", wanted,
                    " cannot run here: this machine and build go up to ",
                    kNames[static_cast<int>(best_isa())], why_not(static_cast<Isa>(i)));
    if (static_cast<Isa>(i) == Isa::avx512_amx) request_amx();
    return static_cast<Isa>(i);
  }
  STD_TORCH_CHECK(false, "RESFORMER_CPU takes portable, avx2, avx512, avx512_bf16 or avx512_amx, got ",
                  wanted);
}

int64_t cpu_isa() { return static_cast<int64_t>(current_isa()); }
int64_t cpu_isa_best() { return static_cast<int64_t>(best_isa()); }

}  // namespace resformer

// These two read no tensor, so nothing but CompositeExplicitAutograd can select them.
STABLE_TORCH_LIBRARY_IMPL(resformer, CompositeExplicitAutograd, m) {
  m.impl("cpu_isa", TORCH_BOX(&resformer::cpu_isa));
  m.impl("cpu_isa_best", TORCH_BOX(&resformer::cpu_isa_best));
}
