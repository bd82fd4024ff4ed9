// Selects the build of an op's kernels: one table of functions per instruction set.
#pragma once

#include "common/cpu_features.h"

// The portable build stands in for builds that do not exist, which current_isa() never returns.
#if defined(RESFORMER_HAVE_AVX2)
#define RESFORMER_BUILD_AVX2 avx2
#else
#define RESFORMER_BUILD_AVX2 portable
#endif
#if defined(RESFORMER_HAVE_AVX512)
#define RESFORMER_BUILD_AVX512 avx512
#else
#define RESFORMER_BUILD_AVX512 portable
#endif
#if defined(RESFORMER_HAVE_AVX512_BF16)
#define RESFORMER_BUILD_AVX512_BF16 avx512_bf16
#else
#define RESFORMER_BUILD_AVX512_BF16 portable
#endif

#if defined(RESFORMER_HAVE_AVX512_AMX)
#define RESFORMER_BUILD_AVX512_AMX avx512_amx
#else
#define RESFORMER_BUILD_AVX512_AMX portable
#endif

#define RESFORMER_DECLARE_TABLE(isa, Table, name) \
  namespace isa {                                 \
  extern const Table name;                        \
  }

// In namespace resformer of a file outside the builds. Declares the tables that <op>_cpu_isa.cpp defines as
// `extern const Table name = {...}` in namespace RESFORMER_ISA, and current_<name>(), which gives the one in
// use. An op that has no build for AMX takes the one below it.
#define RESFORMER_DISPATCH(Table, name) RESFORMER_DISPATCH_AND(Table, name, RESFORMER_BUILD_AVX512_BF16)
// The same for an op that has one.
#define RESFORMER_DISPATCH_AMX(Table, name)        \
  RESFORMER_DECLARE_TABLE(avx512_amx, Table, name) \
  RESFORMER_DISPATCH_AND(Table, name, RESFORMER_BUILD_AVX512_AMX)

#define RESFORMER_DISPATCH_AND(Table, name, amx)                                                \
  RESFORMER_DECLARE_TABLE(portable, Table, name)                                                \
  RESFORMER_DECLARE_TABLE(avx2, Table, name)                                                    \
  RESFORMER_DECLARE_TABLE(avx512, Table, name)                                                  \
  RESFORMER_DECLARE_TABLE(avx512_bf16, Table, name)                                             \
  inline const Table& current_##name() {                                                        \
    static constexpr const Table* builds[] = {&portable::name, &RESFORMER_BUILD_AVX2::name,     \
                                              &RESFORMER_BUILD_AVX512::name,                    \
                                              &RESFORMER_BUILD_AVX512_BF16::name, &amx::name};  \
    static_assert(sizeof(builds) / sizeof(builds[0]) == static_cast<int>(Isa::avx512_amx) + 1); \
    return *builds[static_cast<int>(current_isa())];                                            \
  }
