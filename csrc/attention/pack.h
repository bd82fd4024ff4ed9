// Operands of the tile products, copied once per head into the order that tiles read them in.
//
// Rows of Q, K and dO become rows of words; K (and in backward V') is also transposed; V' is mixed here, once per
// element, rounded to the values' dtype, and never written anywhere else unless the caller asked for it.
#pragma once

#include "attention/attention.h"
#include "common/gemm.h"
#include "common/parallel.h"

namespace resformer::RESFORMER_ISA {

// Words of a row of `dim` elements, whole vectors of them so that rows stay aligned and tails are zero.
template <class Dot>
static inline int64_t row_words(int64_t dim) {
  return round_up((dim + Dot::kPack - 1) / Dot::kPack, kLanes);
}

template <class Dot, class T>
static inline void pack_row(const T* src, int64_t dim, float* words) {
  const int64_t total = row_words<Dot>(dim);
  if constexpr (Dot::kPack == 2) {
    memcpy(words, src, dim * sizeof(T));
    memset(reinterpret_cast<char*>(words) + dim * sizeof(T), 0, total * sizeof(float) - dim * sizeof(T));
  } else {
    int64_t d = 0;
    for (; d + kLanes <= dim; d += kLanes) store(words + d, load(src + d));
    for (; d < dim; ++d) words[d] = to_float(src[d]);
    for (; d < total; ++d) words[d] = 0.0f;
  }
}

// Two rows of bfloat16 to one row of words whose halves are (first, second): the summed axis runs over rows.
static inline void interleave_rows(const bf16* first, const bf16* second, int64_t dim, int64_t columns, float* words) {
  uint32_t* out = reinterpret_cast<uint32_t*>(words);
  int64_t d = 0;
#if defined(RESFORMER_ISA_AVX512_BF16)
  for (; d + kLanes <= dim; d += kLanes) {
    const __m512i low = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(first + d)));
    const __m512i high = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(second + d)));
    _mm512_storeu_si512(out + d, _mm512_or_si512(low, _mm512_slli_epi32(high, 16)));
  }
#endif
  for (; d < dim; ++d) out[d] = first[d].bits | static_cast<uint32_t>(second[d].bits) << 16;
  for (; d < columns; ++d) out[d] = 0;
}

// `count` rows of words to columns [at, at + kLanes) of a tile's packed panels; missing rows are zero.
static inline void pack_transposed(
    const float* rows, int64_t row_stride, int64_t count, int64_t words, int64_t at, int64_t columns, float* panels) {
  const int64_t panel = at / kPanel * kPanel, width = smaller(kPanel, columns - panel);
  const uint32_t* src = reinterpret_cast<const uint32_t*>(rows);
  uint32_t* dst = reinterpret_cast<uint32_t*>(panels) + panel * words + (at - panel);
  int64_t w = 0;
  if (count == kLanes) {
    for (; w + kLanes <= words; w += kLanes) transpose_block(src + w, row_stride, dst + w * width, width);
  }
  for (; w < words; ++w) {
    for (int64_t r = 0; r < kLanes; ++r) dst[w * width + r] = r < count ? src[r * row_stride + w] : 0u;
  }
}

// V' = lambda_v V + lambda_first V1 for one (batch, time, head), arXiv 2410.17897: in float32, rounded once.
class ValueRow {
 public:
  explicit ValueRow(const Problem& p) : p_(p), scratch_(2 * round_up(p.dim_v, kLanes)) {}

  // The row itself where nothing is mixed, else `into` after it was filled.
  template <class T>
  const T* get(int64_t b, int64_t t, int64_t h, T* into) {
    if (!p_.mixes()) return (p_.v.data ? p_.v : p_.v_first).row<const T>(b, t, h);
    const T *v = p_.v.row<const T>(b, t, h), *first = p_.v_first.row<const T>(b, t, h);
    const float* cv = coefficient(p_.lambda_v, b, t, h, scratch_.get());
    const float* cf = coefficient(p_.lambda_first, b, t, h, scratch_.get() + round_up(p_.dim_v, kLanes));
    int64_t d = 0;
    for (; d + kLanes <= p_.dim_v; d += kLanes) {
      store(into + d, fma(load(cf + d), load(first + d), mul(load(cv + d), load(v + d))));
    }
    for (; d < p_.dim_v; ++d) {
      into[d] = from_float<T>(cf[d] * to_float(first[d]) + cv[d] * to_float(v[d]));
    }
    return into;
  }

 private:
  const float* coefficient(const Coefficient& c, int64_t b, int64_t t, int64_t h, float* row) {
    if (c.uniform_in_row()) {
      const float value = c.at(b, t, h, 0);
      for (int64_t d = 0; d < p_.dim_v; ++d) row[d] = value;
    } else {
      for (int64_t d = 0; d < p_.dim_v; ++d) row[d] = c.at(b, t, h, d);
    }
    return row;
  }

  const Problem& p_;
  Scratch scratch_;
};

}  // namespace resformer::RESFORMER_ISA
