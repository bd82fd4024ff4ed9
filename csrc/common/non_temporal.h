// Shared by kernels bound by memory: non-temporal stores, which bypass the caches, and prefetching.
#pragma once

#include <cstdint>

namespace resformer {

// Results of at least this size are written with non-temporal stores: they would not stay in a cache, and
// an ordinary store reads its line first.
constexpr int64_t kNonTemporalBytes = 16 << 20;

constexpr int64_t kPrefetchBytes = 4096;  // distance at which an operand is prefetched

}  // namespace resformer

#if defined(RESFORMER_ISA)

#include "common/simd.h"

namespace resformer::RESFORMER_ISA {

// Prefetches a line into the second-level cache. The hardware prefetcher there does not see lines that a
// non-temporal hint brings: with that hint Intel's cores read at half the bandwidth.
static inline void prefetch_line(const void* p) { __builtin_prefetch(p, 0, 2); }

// stream(p, x): a non-temporal store of a whole vector at a multiple of its size. Not for data that is read
// again soon.

#if defined(RESFORMER_ISA_AVX512) || defined(RESFORMER_ISA_AVX512_BF16)

static inline void stream(float* p, Vec x) { _mm512_stream_ps(p, x); }
template <class T>
static inline void stream(T* p, Vec x) {
  alignas(32) T narrow[kLanes];
  store(narrow, x);
  _mm256_stream_si256(reinterpret_cast<__m256i*>(p), _mm256_load_si256(reinterpret_cast<__m256i*>(narrow)));
}
static inline void end_of_stream() { _mm_sfence(); }

#elif defined(RESFORMER_ISA_AVX2)

static inline void stream(float* p, Vec x) { _mm256_stream_ps(p, x); }
template <class T>
static inline void stream(T* p, Vec x) {
  alignas(16) T narrow[kLanes];
  store(narrow, x);
  _mm_stream_si128(reinterpret_cast<__m128i*>(p), _mm_load_si128(reinterpret_cast<__m128i*>(narrow)));
}
static inline void end_of_stream() { _mm_sfence(); }

#else

template <class T>
static inline void stream(T* p, Vec x) {
  store(p, x);
}
static inline void end_of_stream() {}

#endif

template <class T>
static inline bool may_stream(const T* p) {
  return (reinterpret_cast<uintptr_t>(p) & (kLanes * sizeof(T) - 1)) == 0;
}

}  // namespace resformer::RESFORMER_ISA

#endif
