// Building blocks of the products of decoding. P V reads V's rows in place, and so do the scores of a few
// queries (stream.h): dot products along contiguous memory give a vector of partial sums each, and kSums of
// these are reduced together.
#pragma once

#include <type_traits>

#include "common/gemm.h"

namespace resformer::RESFORMER_ISA {

// Products with rows of a cache of elements C. A word is a float32 of q or P, for Pairs two bfloat16.
template <class Element>
struct Widened {
  using C = Element;
  using Dot = F32;
  static constexpr int kStep = kLanes;  // elements of a row per vector of words
  static inline Vec load_row(const C* p) { return load(p); }
  static inline Vec load_row_first(const C* p, int64_t count) { return load_first(p, count); }
  // Words of P from its numbers at one token, or at two that a word holds.
  static inline Vec word(Vec first, Vec) { return first; }
  // Elements from d on of the kPack rows that a word of P multiplies, as columns; `rest` of them unless 0.
  static inline void load_columns(const C* const* rows, int64_t d, int64_t rest, Vec* columns) {
    columns[0] = rest ? load_row_first(rows[0] + d, rest) : load_row(rows[0] + d);
  }
};

#if defined(RESFORMER_ISA_AVX512_BF16)
struct Pairs {
  using C = bf16;
  using Dot = Bf16Pair;
  static constexpr int kStep = 2 * kLanes;
  static inline __m512i raw(const C* p) { return _mm512_loadu_si512(p); }
  static inline __m512i raw_first(const C* p, int64_t count) {
    return _mm512_maskz_loadu_epi16((1u << count) - 1u, p);
  }
  static inline Vec load_row(const C* p) { return _mm512_castsi512_ps(raw(p)); }
  static inline Vec load_row_first(const C* p, int64_t count) {
    return _mm512_castsi512_ps(raw_first(p, count));
  }
  static inline Vec word(Vec first, Vec second) {
    const auto narrow = [](Vec x) {
      return _mm512_cvtepu16_epi32(reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(x)));
    };
    return _mm512_castsi512_ps(_mm512_or_si512(narrow(first), _mm512_slli_epi32(narrow(second), 16)));
  }
  static inline void load_columns(const C* const* rows, int64_t d, int64_t rest, Vec* columns) {
    // Word i of two interleaved rows is (first[i], second[i]), the pair that vdpbf16ps sums.
    alignas(64) static constexpr uint16_t kLow[32] = {0,  32, 1,  33, 2,  34, 3,  35, 4,  36, 5,
                                                      37, 6,  38, 7,  39, 8,  40, 9,  41, 10, 42,
                                                      11, 43, 12, 44, 13, 45, 14, 46, 15, 47};
    const __m512i low = _mm512_load_si512(kLow), high = _mm512_add_epi16(low, _mm512_set1_epi16(16));
    const __m512i a = rest ? raw_first(rows[0] + d, rest) : raw(rows[0] + d);
    const __m512i b = rest ? raw_first(rows[1] + d, rest) : raw(rows[1] + d);
    columns[0] = _mm512_castsi512_ps(_mm512_permutex2var_epi16(a, low, b));
    columns[1] = _mm512_castsi512_ps(_mm512_permutex2var_epi16(a, high, b));
  }
};
#endif

constexpr int kSums = kLanes == 16 ? 16 : 8;

// alpha times the sum over lanes of each of kSums vectors, in order.
static inline void reduce_all(const Vec* x, float alpha, float* sums) {
#if defined(RESFORMER_ISA_AVX512) || defined(RESFORMER_ISA_AVX512_BF16)
  Vec pair[8], four[4], half[2];
  // A blend and a shuffle for two vectors: a blend needs no shuffle unit.
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i)
    pair[i] = add(_mm512_mask_blend_ps(0xcccc, x[2 * i], x[2 * i + 1]),
                  _mm512_shuffle_ps(x[2 * i], x[2 * i + 1], 0x4e));
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i)
    four[i] = add(_mm512_shuffle_ps(pair[2 * i], pair[2 * i + 1], 0x88),
                  _mm512_shuffle_ps(pair[2 * i], pair[2 * i + 1], 0xdd));
#pragma GCC unroll 2
  for (int i = 0; i < 2; ++i)
    half[i] = add(_mm512_shuffle_f32x4(four[2 * i], four[2 * i + 1], 0x88),
                  _mm512_shuffle_f32x4(four[2 * i], four[2 * i + 1], 0xdd));
  const Vec all =
      add(_mm512_shuffle_f32x4(half[0], half[1], 0x88), _mm512_shuffle_f32x4(half[0], half[1], 0xdd));
  store(sums, mul(all, set1(alpha)));
#elif defined(RESFORMER_ISA_AVX2)
  Vec four[2];
#pragma GCC unroll 2
  for (int i = 0; i < 2; ++i)
    four[i] =
        _mm256_hadd_ps(_mm256_hadd_ps(x[4 * i], x[4 * i + 1]), _mm256_hadd_ps(x[4 * i + 2], x[4 * i + 3]));
  const Vec all =
      add(_mm256_permute2f128_ps(four[0], four[1], 0x20), _mm256_permute2f128_ps(four[0], four[1], 0x31));
  store(sums, mul(all, set1(alpha)));
#else
  for (int i = 0; i < kSums; ++i) sums[i] = alpha * reduce_add(x[i]);
#endif
}

// acc[r][columns of one chunk] += P V over `tokens` rows of V. `rest`: elements of the row's tail, else 0.
template <class M, int R, int V>
static inline void value_tile(const float* p, int64_t p_row, const typename M::C* const* values,
                              int64_t offset, int64_t tokens, int64_t rest, float* acc, int64_t acc_row) {
  Vec sum[R][V];
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v) sum[r][v] = load(acc + r * acc_row + v * kLanes);
  }
  const auto step = [&](int64_t word, const Vec* columns) {
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
      const Vec weight = M::Dot::broadcast(p + r * p_row + word);
#pragma GCC unroll 8
      for (int v = 0; v < V; ++v) sum[r][v] = M::Dot::dot(weight, columns[v], sum[r][v]);
    }
  };
  constexpr int kVecs = M::kStep / kLanes;
  for (int64_t t = 0; t < tokens; t += M::Dot::kPack) {
    const typename M::C* rows[M::Dot::kPack];
#pragma GCC unroll 2
    for (int i = 0; i < M::Dot::kPack; ++i) rows[i] = values[t + i] + offset;
    Vec columns[V];
#pragma GCC unroll 8
    for (int v = 0; v < V; v += kVecs) M::load_columns(rows, v * kLanes, rest, columns + v);
    step(t / M::Dot::kPack, columns);
  }
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v) store(acc + r * acc_row + v * kLanes, sum[r][v]);
  }
}

// Rows are padded and processed together: up to eight in powers of two, more in fours with a tail of two or
// one.
static inline int64_t padded(int64_t rows) {
  if (rows <= 8) return rows <= 2 ? rows : rows <= 4 ? 4 : 8;
  return rows % 4 == 3 ? rows + 1 : rows;
}
template <class Body>
static inline void by_fours(int64_t rows, const Body& body) {
  int64_t r = 0;
  for (; rows - r > 2; r += 4) body(r, std::integral_constant<int, 4>());
  if (rows - r == 2) body(r, std::integral_constant<int, 2>());
  if (rows - r == 1) body(r, std::integral_constant<int, 1>());
}

}  // namespace resformer::RESFORMER_ISA
