// One vector of float32 in the instruction set this translation unit is compiled for (see cpu_features.h).
//
// Everything lives in a namespace named after the instruction set: the linker must never merge an AVX-512
// copy of an inline function with a portable one. For the same reason nothing here calls a std:: template.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "common/scalar.h"

#if !defined(RESFORMER_ISA)
#error "compile through build_support/native.py, which names the instruction set in RESFORMER_ISA"
#endif

namespace resformer::RESFORMER_ISA {

// Degree-5 and degree-4 fits of 2^f with the constant term 1 (so exp2(0) == 1): relative error 1.4e-7
// and 2.9e-6.
enum class Precision { full, half };

#if defined(RESFORMER_ISA_AVX512) || defined(RESFORMER_ISA_AVX512_BF16)

using Vec = __m512;
constexpr int kLanes = 16;
#if defined(RESFORMER_ISA_AVX512_AMX)
constexpr int kTileRows = 16;  // those of a tile register
#else
constexpr int kTileRows = 6;  // 6 x 4 accumulators, 4 columns and a broadcast fit in 32 registers
#endif
constexpr int kTileVecs = 4;

static inline Vec zero() { return _mm512_setzero_ps(); }
static inline Vec set1(float x) { return _mm512_set1_ps(x); }
static inline Vec load(const float* p) { return _mm512_loadu_ps(p); }
static inline void store(float* p, Vec x) { _mm512_storeu_ps(p, x); }
static inline Vec add(Vec a, Vec b) { return _mm512_add_ps(a, b); }
static inline Vec sub(Vec a, Vec b) { return _mm512_sub_ps(a, b); }
static inline Vec mul(Vec a, Vec b) { return _mm512_mul_ps(a, b); }
static inline Vec div(Vec a, Vec b) { return _mm512_div_ps(a, b); }
static inline Vec fma(Vec a, Vec b, Vec c) { return _mm512_fmadd_ps(a, b, c); }
static inline Vec max(Vec a, Vec b) { return _mm512_max_ps(a, b); }
static inline bool any_greater(Vec a, Vec b) { return _mm512_cmp_ps_mask(a, b, _CMP_GT_OQ) != 0; }
static inline float reduce_add(Vec x) { return _mm512_reduce_add_ps(x); }
static inline float reduce_max(Vec x) { return _mm512_reduce_max_ps(x); }
static inline Vec load_first(const float* p, int64_t count) {
  return _mm512_maskz_loadu_ps(static_cast<__mmask16>((1u << count) - 1), p);
}
static inline void store_first(float* p, Vec x, int64_t count) {
  _mm512_mask_storeu_ps(p, static_cast<__mmask16>((1u << count) - 1), x);
}
// x in the lanes [lo, hi), `other` elsewhere.
static inline Vec keep_lanes(Vec x, int32_t lo, int32_t hi, Vec other) {
  const __m512i lane = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  const __mmask16 from_lo = _mm512_cmpge_epi32_mask(lane, _mm512_set1_epi32(lo));
  return _mm512_mask_mov_ps(other, _mm512_mask_cmplt_epi32_mask(from_lo, lane, _mm512_set1_epi32(hi)), x);
}

static inline Vec load(const bf16* p) {
  const __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  return _mm512_castsi512_ps(_mm512_slli_epi32(wide, 16));
}
static inline Vec load(const f16* p) {
  return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}
static inline Vec load(const int8_t* p) {
  return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
}
static inline void store(f16* p, Vec x) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p),
                      _mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
static inline void store(bf16* p, Vec x) {
#if defined(RESFORMER_ISA_AVX512_BF16)
  const __m256i narrow = reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(x));
#else
  const __m512i bits = _mm512_castps_si512(x);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const __m512i rounded = _mm512_add_epi32(_mm512_add_epi32(bits, odd), _mm512_set1_epi32(0x7fff));
  const __mmask16 nan = _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q);
  const __m512i quiet = _mm512_or_si512(bits, _mm512_set1_epi32(0x00400000));
  const __m256i narrow =
      _mm512_cvtepi32_epi16(_mm512_srli_epi32(_mm512_mask_mov_epi32(rounded, nan, quiet), 16));
#endif
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), narrow);
}

// The constant first: max returns its second operand where either is NaN.
static inline Vec clamp_low(Vec x, float low) { return _mm512_max_ps(_mm512_set1_ps(low), x); }
static inline Vec round_nearest(Vec x) {
  return _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}
static inline Vec power_of_two(Vec n) { return _mm512_scalef_ps(_mm512_set1_ps(1.0f), n); }

// 2^floor(x) comes from scalef; vreduceps gives x - floor(x), and 0 for -inf, so no clamp is needed and NaN
// stays NaN.
template <Precision precision>
static inline Vec exp2(Vec x) {
  const Vec f = _mm512_reduce_ps(x, 0x09);
  Vec p;
  if constexpr (precision == Precision::full) {
    p = fma(set1(0.000216129149f), f, set1(0.0012467847f));
    p = fma(p, f, set1(0.00967545155f));
    p = fma(p, f, set1(0.0554852821f));
    p = fma(p, f, set1(0.240229309f));
    p = fma(p, f, set1(0.693147063f));
  } else {
    p = fma(set1(0.0134266848f), f, set1(0.0522424728f));
    p = fma(p, f, set1(0.241280198f));
    p = fma(p, f, set1(0.693044841f));
  }
  return _mm512_scalef_ps(fma(p, f, set1(1.0f)), x);
}

// 16 x 16 words: 4 rounds of 16 shuffles. dst[c * dst_stride + r] = src[r * src_stride + c].
static inline void transpose_block(const uint32_t* src, int64_t src_stride, uint32_t* dst,
                                   int64_t dst_stride) {
  __m512i r[16], t[16];
#pragma GCC unroll 16
  for (int i = 0; i < 16; ++i) r[i] = _mm512_loadu_si512(src + i * src_stride);
#pragma GCC unroll 8
  for (int i = 0; i < 16; i += 2) {
    t[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]);
    t[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 16; i += 4) {
    r[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
    r[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
    r[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
    r[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    t[i] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0x88);
    t[i + 4] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0xdd);
    t[i + 8] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0x88);
    t[i + 12] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0xdd);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    _mm512_storeu_si512(dst + (i)*dst_stride, _mm512_shuffle_i32x4(t[i], t[i + 8], 0x88));
    _mm512_storeu_si512(dst + (i + 4) * dst_stride, _mm512_shuffle_i32x4(t[i + 4], t[i + 12], 0x88));
    _mm512_storeu_si512(dst + (i + 8) * dst_stride, _mm512_shuffle_i32x4(t[i], t[i + 8], 0xdd));
    _mm512_storeu_si512(dst + (i + 12) * dst_stride, _mm512_shuffle_i32x4(t[i + 4], t[i + 12], 0xdd));
  }
}

#elif defined(RESFORMER_ISA_AVX2)

using Vec = __m256;
constexpr int kLanes = 8;
constexpr int kTileRows = 6;  // 6 x 2 accumulators, 2 columns and a broadcast fit in 16 registers
constexpr int kTileVecs = 2;

static inline Vec zero() { return _mm256_setzero_ps(); }
static inline Vec set1(float x) { return _mm256_set1_ps(x); }
static inline Vec load(const float* p) { return _mm256_loadu_ps(p); }
static inline void store(float* p, Vec x) { _mm256_storeu_ps(p, x); }
static inline __m256i first_lanes(int64_t count) {
  const __m256i lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
  return _mm256_cmpgt_epi32(_mm256_set1_epi32(static_cast<int32_t>(count)), lane);
}
static inline Vec load_first(const float* p, int64_t count) {
  return _mm256_maskload_ps(p, first_lanes(count));
}
static inline void store_first(float* p, Vec x, int64_t count) {
  _mm256_maskstore_ps(p, first_lanes(count), x);
}
static inline Vec add(Vec a, Vec b) { return _mm256_add_ps(a, b); }
static inline Vec sub(Vec a, Vec b) { return _mm256_sub_ps(a, b); }
static inline Vec mul(Vec a, Vec b) { return _mm256_mul_ps(a, b); }
static inline Vec div(Vec a, Vec b) { return _mm256_div_ps(a, b); }
static inline Vec fma(Vec a, Vec b, Vec c) { return _mm256_fmadd_ps(a, b, c); }
static inline Vec max(Vec a, Vec b) { return _mm256_max_ps(a, b); }
static inline bool any_greater(Vec a, Vec b) {
  return _mm256_movemask_ps(_mm256_cmp_ps(a, b, _CMP_GT_OQ)) != 0;
}
static inline float reduce_add(Vec x) {
  __m128 y = _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
  y = _mm_add_ps(y, _mm_movehl_ps(y, y));
  return _mm_cvtss_f32(_mm_add_ss(y, _mm_movehdup_ps(y)));
}
static inline float reduce_max(Vec x) {
  __m128 y = _mm_max_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
  y = _mm_max_ps(y, _mm_movehl_ps(y, y));
  return _mm_cvtss_f32(_mm_max_ss(y, _mm_movehdup_ps(y)));
}
static inline Vec keep_lanes(Vec x, int32_t lo, int32_t hi, Vec other) {
  const __m256i lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
  const __m256i below_lo = _mm256_cmpgt_epi32(_mm256_set1_epi32(lo), lane);
  const __m256i below_hi = _mm256_cmpgt_epi32(_mm256_set1_epi32(hi), lane);
  return _mm256_blendv_ps(other, x, _mm256_castsi256_ps(_mm256_andnot_si256(below_lo, below_hi)));
}

static inline Vec load(const bf16* p) {
  const __m256i wide = _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  return _mm256_castsi256_ps(_mm256_slli_epi32(wide, 16));
}
static inline Vec load(const f16* p) {
  return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}
static inline Vec load(const int8_t* p) {
  return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))));
}
static inline void store(f16* p, Vec x) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p),
                   _mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
static inline void store(bf16* p, Vec x) {
  const __m256i bits = _mm256_castps_si256(x);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  const __m256i rounded = _mm256_add_epi32(_mm256_add_epi32(bits, odd), _mm256_set1_epi32(0x7fff));
  const __m256i quiet = _mm256_or_si256(bits, _mm256_set1_epi32(0x00400000));
  const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(x, x, _CMP_UNORD_Q));
  const __m256i high = _mm256_srli_epi32(_mm256_blendv_epi8(rounded, quiet, nan), 16);
  const __m256i packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(high, high), 0x08);
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_castsi256_si128(packed));
}

// The constant first: max returns its second operand where either is NaN.
static inline Vec clamp_low(Vec x, float low) { return _mm256_max_ps(_mm256_set1_ps(low), x); }
static inline Vec round_nearest(Vec x) {
  return _mm256_round_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}
static inline Vec power_of_two(Vec n) {
  return _mm256_castsi256_ps(
      _mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127)), 23));
}

static inline void transpose_block(const uint32_t* src, int64_t src_stride, uint32_t* dst,
                                   int64_t dst_stride) {
  __m256i r[8], t[8];
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i)
    r[i] = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(src + i * src_stride));
#pragma GCC unroll 4
  for (int i = 0; i < 8; i += 2) {
    t[i] = _mm256_unpacklo_epi32(r[i], r[i + 1]);
    t[i + 1] = _mm256_unpackhi_epi32(r[i], r[i + 1]);
  }
#pragma GCC unroll 2
  for (int i = 0; i < 8; i += 4) {
    r[i] = _mm256_unpacklo_epi64(t[i], t[i + 2]);
    r[i + 1] = _mm256_unpackhi_epi64(t[i], t[i + 2]);
    r[i + 2] = _mm256_unpacklo_epi64(t[i + 1], t[i + 3]);
    r[i + 3] = _mm256_unpackhi_epi64(t[i + 1], t[i + 3]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    const __m256i low = _mm256_permute2x128_si256(r[i], r[i + 4], 0x20);
    const __m256i high = _mm256_permute2x128_si256(r[i], r[i + 4], 0x31);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(dst + i * dst_stride), low);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(dst + (i + 4) * dst_stride), high);
  }
}

#else  // portable: GCC and Clang vector extensions, SSE2 on x86-64 and NEON on arm64

typedef float Vec __attribute__((vector_size(16)));
typedef int32_t VecInt __attribute__((vector_size(16)));
constexpr int kLanes = 4;
constexpr int kTileRows = 4;
constexpr int kTileVecs = 2;

static inline Vec set1(float x) { return Vec{x, x, x, x}; }
static inline Vec zero() { return set1(0.0f); }
static inline Vec load(const float* p) {
  Vec x;
  memcpy(&x, p, sizeof(x));
  return x;
}
static inline void store(float* p, Vec x) { memcpy(p, &x, sizeof(x)); }
static inline Vec add(Vec a, Vec b) { return a + b; }
static inline Vec sub(Vec a, Vec b) { return a - b; }
static inline Vec mul(Vec a, Vec b) { return a * b; }
static inline Vec div(Vec a, Vec b) { return a / b; }
static inline Vec fma(Vec a, Vec b, Vec c) { return a * b + c; }
static inline Vec max(Vec a, Vec b) { return a > b ? a : b; }
static inline bool any_greater(Vec a, Vec b) {
  const VecInt greater = a > b;
  return (greater[0] | greater[1] | greater[2] | greater[3]) != 0;
}
static inline float reduce_add(Vec x) { return (x[0] + x[2]) + (x[1] + x[3]); }
static inline float reduce_max(Vec x) {
  const float a = x[0] > x[2] ? x[0] : x[2], b = x[1] > x[3] ? x[1] : x[3];
  return a > b ? a : b;
}
static inline Vec keep_lanes(Vec x, int32_t lo, int32_t hi, Vec other) {
  const VecInt lane = {0, 1, 2, 3};
  return ((lane >= lo) & (lane < hi)) ? x : other;
}
template <class T>
static inline Vec load(const T* p) {
  return Vec{to_float(p[0]), to_float(p[1]), to_float(p[2]), to_float(p[3])};
}
template <class T>
static inline void store(T* p, Vec x) {
  for (int i = 0; i < kLanes; ++i) p[i] = from_float<T>(x[i]);
}

// Comparisons with NaN are false, so NaN passes through.
static inline Vec clamp_low(Vec x, float low) { return x < set1(low) ? set1(low) : x; }
// Adding and taking off 1.5 * 2^23 rounds to the nearest integer for |x| < 2^22; the clamp above sees to
// that.
static inline Vec round_nearest(Vec x) { return (x + set1(12582912.0f)) - set1(12582912.0f); }
static inline Vec power_of_two(Vec n) {
  const VecInt exponent = (__builtin_convertvector(n, VecInt) + 127) << 23;
  Vec x;
  memcpy(&x, &exponent, sizeof(x));
  return x;
}

static inline void transpose_block(const uint32_t* src, int64_t src_stride, uint32_t* dst,
                                   int64_t dst_stride) {
  for (int c = 0; c < kLanes; ++c) {
    for (int r = 0; r < kLanes; ++r) dst[c * dst_stride + r] = src[r * src_stride + c];
  }
}

#endif

#if !defined(RESFORMER_ISA_AVX512) && !defined(RESFORMER_ISA_AVX512_BF16)
// Below 2^-127 the result is 0: power_of_two(-127) has a zero exponent field. For x up to 127.
template <Precision precision>
static inline Vec exp2(Vec x) {
  const Vec clamped = clamp_low(x, -127.0f);
  const Vec n = round_nearest(clamped);
  const Vec f = sub(clamped, n);
  Vec p;
  if constexpr (precision == Precision::full) {
    p = fma(set1(0.00015353362f), f, set1(0.00133988739f));
    p = fma(p, f, set1(0.00961843692f));
    p = fma(p, f, set1(0.0555033237f));
    p = fma(p, f, set1(0.240226477f));
    p = fma(p, f, set1(0.693147182f));
  } else {
    p = fma(set1(0.00958285294f), f, set1(0.0559064262f));
    p = fma(p, f, set1(0.240240991f));
    p = fma(p, f, set1(0.693124175f));
  }
  return mul(fma(p, f, set1(1.0f)), power_of_two(n));
}
#endif

// p of e^x = 2^n (1 + p): no cancellation near zero. For x in [-87, 88].
static inline Vec reduced_exp(Vec x, Vec* two_n) {
  constexpr float kLog2e = 1.44269504088896341f, kLn2High = 0.693145751953125f,
                  kLn2Low = 1.42860682030941723e-6f;
  const Vec n = round_nearest(mul(x, set1(kLog2e)));
  *two_n = power_of_two(n);
  const Vec r = fma(n, set1(-kLn2Low), fma(n, set1(-kLn2High), x));
  Vec p = fma(set1(1.0f / 5040.0f), r, set1(1.0f / 720.0f));
  p = fma(p, r, set1(1.0f / 120.0f));
  p = fma(p, r, set1(1.0f / 24.0f));
  p = fma(p, r, set1(1.0f / 6.0f));
  p = fma(p, r, set1(0.5f));
  return fma(mul(p, r), r, r);
}

// tanh(x) = e / (e + 2) with e = exp(2x) - 1 built as 2^n (e^r - 1) + (2^n - 1): no cancellation near zero.
// Its slope 1 - tanh^2 is 4 e^2x / (e + 2)^2, without the cancellation where tanh is near 1.
static inline Vec tanh(Vec x, Vec* slope) {
  Vec two_n;
  const Vec p =
      reduced_exp(clamp_low(sub(zero(), clamp_low(sub(zero(), add(x, x)), -21.0f)), -21.0f), &two_n);
  const Vec e = fma(two_n, p, sub(two_n, set1(1.0f))), divisor = add(e, set1(2.0f));
  if (slope) *slope = div(mul(set1(4.0f), fma(two_n, p, two_n)), mul(divisor, divisor));
  return div(e, divisor);
}

// The first `count` elements, fewer than kLanes, and zeros: nothing past them is read or written.
template <class T>
static inline Vec load_first(const T* p, int64_t count) {
  T padded[kLanes] = {};
  memcpy(padded, p, count * sizeof(T));
  return load(padded);
}
template <class T>
static inline void store_first(T* p, Vec x, int64_t count) {
  T padded[kLanes];
  store(padded, x);
  memcpy(p, padded, count * sizeof(T));
}

static inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

}  // namespace resformer::RESFORMER_ISA
