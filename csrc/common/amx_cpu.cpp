#include <torch/headeronly/util/Exception.h>

#include <string>

#include "common/cpu_features.h"

#if defined(__x86_64__) && defined(__linux__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>
#endif

namespace resformer {

#if defined(RESFORMER_EMULATE_AMX)

// A test's library, whose tile instructions are emulated where the processor does not know them.
std::string amx_missing() { return ""; }
void request_amx() {}

#elif defined(__x86_64__) && defined(__linux__)

namespace {

constexpr unsigned kTileConfig = 17, kTileData = 18;  // numbers of the two parts of XSAVE's state
constexpr int kRequestPermission = 0x1023;            // ARCH_REQ_XCOMP_PERM of asm/prctl.h, Linux 5.16

bool system_saves_tiles() {
  unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
  constexpr unsigned kOsxsave = 1u << 27;
  if (!__get_cpuid(1, &eax, &ebx, &ecx, &edx) || (ecx & kOsxsave) == 0) return false;
  unsigned low = 0, high = 0;
  asm volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  constexpr unsigned kBoth = 1u << kTileConfig | 1u << kTileData;
  return (low & kBoth) == kBoth;
}

}  // namespace

std::string amx_missing() {
  unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
  const bool known = __get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx) != 0;
  constexpr unsigned kBf16 = 1u << 22, kTile = 1u << 24;
  std::string lacks;
  if (!known || (edx & kTile) == 0) lacks = "amx-tile";
  if (!known || (edx & kBf16) == 0) lacks += lacks.empty() ? "amx-bf16" : " and amx-bf16";
  if (!lacks.empty()) return "the processor has no " + lacks;
  if (!system_saves_tiles()) return "the system does not save AMX's tiles (XCR0; Linux 5.16 and later does)";
  return "";
}

void request_amx() {
  static const int error = syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0 ? 0 : errno;
  STD_TORCH_CHECK(error == 0, "RESFORMER_CPU=avx512_amx: Linux refused this process AMX's tile state",
                  " (arch_prctl(ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA): ", std::strerror(error), ")",
                  error == ENOSPC ? ": a thread's alternate signal stack is too small for it" : "",
                  error == EINVAL ? ": Linux 5.16 and later grants it" : "");
}

#else

std::string amx_missing() { return "AMX is used on x86-64 under Linux alone"; }
void request_amx() {}

#endif

}  // namespace resformer
