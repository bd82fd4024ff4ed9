// Vector operations of the scan beside those of simd.h: products of complex numbers whose parts are
// interleaved, and sums in float64.
#pragma once

#include "common/non_temporal.h"

namespace resformer::RESFORMER_ISA {

#if defined(RESFORMER_ISA_AVX512) || defined(RESFORMER_ISA_AVX512_BF16)

static inline void add_to(double* sums, Vec x) {
  const __m512d low = _mm512_cvtps_pd(_mm512_castps512_ps256(x));
  const __m512d high = _mm512_cvtps_pd(_mm512_extractf32x8_ps(x, 1));
  _mm512_storeu_pd(sums, _mm512_add_pd(_mm512_loadu_pd(sums), low));
  _mm512_storeu_pd(sums + 8, _mm512_add_pd(_mm512_loadu_pd(sums + 8), high));
}

// a * b + c, each lane pair a complex number.
static inline Vec complex_fma(Vec a, Vec b, Vec c) {
  const Vec cross = _mm512_fmaddsub_ps(_mm512_movehdup_ps(a), _mm512_permute_ps(b, 0xb1), c);
  return _mm512_fmaddsub_ps(_mm512_moveldup_ps(a), b, cross);
}
// conj(a) * b.
static inline Vec conj_mul(Vec a, Vec b) {
  const Vec cross = _mm512_mul_ps(_mm512_movehdup_ps(a), _mm512_permute_ps(b, 0xb1));
  return _mm512_fmsubadd_ps(_mm512_moveldup_ps(a), b, cross);
}

#elif defined(RESFORMER_ISA_AVX2)

static inline void add_to(double* sums, Vec x) {
  const __m256d low = _mm256_cvtps_pd(_mm256_castps256_ps128(x));
  const __m256d high = _mm256_cvtps_pd(_mm256_extractf128_ps(x, 1));
  _mm256_storeu_pd(sums, _mm256_add_pd(_mm256_loadu_pd(sums), low));
  _mm256_storeu_pd(sums + 4, _mm256_add_pd(_mm256_loadu_pd(sums + 4), high));
}

static inline Vec complex_fma(Vec a, Vec b, Vec c) {
  const Vec cross = _mm256_fmaddsub_ps(_mm256_movehdup_ps(a), _mm256_permute_ps(b, 0xb1), c);
  return _mm256_fmaddsub_ps(_mm256_moveldup_ps(a), b, cross);
}
static inline Vec conj_mul(Vec a, Vec b) {
  const Vec cross = _mm256_mul_ps(_mm256_movehdup_ps(a), _mm256_permute_ps(b, 0xb1));
  return _mm256_fmsubadd_ps(_mm256_moveldup_ps(a), b, cross);
}

#else

static inline void add_to(double* sums, Vec x) {
  for (int i = 0; i < kLanes; ++i) sums[i] += x[i];
}

static inline Vec complex_fma(Vec a, Vec b, Vec c) {
  const Vec re = {a[0], a[0], a[2], a[2]}, im = {-a[1], a[1], -a[3], a[3]},
            swapped = {b[1], b[0], b[3], b[2]};
  return re * b + (im * swapped + c);
}
static inline Vec conj_mul(Vec a, Vec b) {
  const Vec re = {a[0], a[0], a[2], a[2]}, im = {a[1], -a[1], a[3], -a[3]},
            swapped = {b[1], b[0], b[3], b[2]};
  return re * b + im * swapped;
}

#endif

}  // namespace resformer::RESFORMER_ISA
