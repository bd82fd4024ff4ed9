// Operands of the tile products, copied once per head into the order that tiles read them in.
//
// Rows of Q, K and dO become rows of words; K (and in backward V') is also transposed; V' is mixed here, once
// per element, rounded to the values' dtype, and never written anywhere else unless the caller asked for it.
#pragma once

#include "attention/attention.h"
#include "common/gemm.h"
#include "common/parallel.h"
#include "common/rows.h"

namespace resformer::RESFORMER_ISA {

// Two rows of bfloat16 to one row of words whose halves are (first, second): the summed axis runs over rows.
static inline void interleave_rows(const bf16* first, const bf16* second, int64_t dim, int64_t columns,
                                   float* words) {
  uint32_t* out = reinterpret_cast<uint32_t*>(words);
  int64_t d = 0;
#if defined(RESFORMER_ISA_AVX512_BF16)
  for (; d + kLanes <= dim; d += kLanes) {
    const __m512i low =
        _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(first + d)));
    const __m512i high =
        _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(second + d)));
    _mm512_storeu_si512(out + d, _mm512_or_si512(low, _mm512_slli_epi32(high, 16)));
  }
#endif
  for (; d < dim; ++d) out[d] = first[d].bits | static_cast<uint32_t>(second[d].bits) << 16;
  for (; d < columns; ++d) out[d] = 0;
}

// Rows r and r + 1 of packed bfloat16 rows (zero-padded to whole words) to row r / 2 of pairs.
static inline void interleave_words(const float* rows, int64_t stride, int64_t r, bool last, int64_t columns,
                                    float* pairs) {
  const bf16* first = reinterpret_cast<const bf16*>(rows + r * stride);
  const bf16* second = reinterpret_cast<const bf16*>(rows + (r + 1) * stride);
  float* out = pairs + r / 2 * columns;
  if (!last) return interleave_rows(first, second, columns, columns, out);
  for (int64_t d = 0; d < columns; ++d) out[d] = float_from_bits(first[d].bits);
}

// V' = lambda_v V + lambda_first V1 for one (batch, time, head), arXiv 2410.17897: in float32, rounded once.
class ValueRow {
 public:
  explicit ValueRow(const Problem& p) : p_(p), varied_(2 * round_up(p.dim_v, kLanes)) {}

  // The row itself where nothing is mixed, else `into` after it was filled.
  template <class T>
  const T* get(int64_t b, int64_t t, int64_t h, T* into) {
    if (!p_.mixes()) return (p_.v.data ? p_.v : p_.v_first).row<const T>(b, t, h);
    const T *v = p_.v.row<const T>(b, t, h), *first = p_.v_first.row<const T>(b, t, h);
    const Coefficient &cv = p_.lambda_v, &cf = p_.lambda_first;
    if (cv.uniform_in_row() && cf.uniform_in_row()) {
      const float x = cv.at(b, t, h, 0), y = cf.at(b, t, h, 0);
      mix(v, first, into, [x](int64_t) { return set1(x); }, [y](int64_t) { return set1(y); });
    } else {
      float *x = varied_.get(), *y = x + round_up(p_.dim_v, kLanes);
      coefficient_row(cv, cv.row(b, t, h), p_.dim_v, x);
      coefficient_row(cf, cf.row(b, t, h), p_.dim_v, y);
      mix(v, first, into, [x](int64_t d) { return load(x + d); }, [y](int64_t d) { return load(y + d); });
    }
    return into;
  }

 private:
  template <class T, class X, class Y>
  void mix(const T* v, const T* first, T* into, const X& x, const Y& y) const {
    int64_t d = 0;
    for (; d + kLanes <= p_.dim_v; d += kLanes) {
      store(into + d, fma(y(d), load(first + d), mul(x(d), load(v + d))));
    }
    if (d == p_.dim_v) return;
    T tails[3][kLanes] = {};
    const int64_t rest = p_.dim_v - d;
    memcpy(tails[0], v + d, rest * sizeof(T));
    memcpy(tails[1], first + d, rest * sizeof(T));
    store(tails[2], fma(y(d), load(tails[1]), mul(x(d), load(tails[0]))));
    memcpy(into + d, tails[2], rest * sizeof(T));
  }

  const Problem& p_;
  Scratch varied_;  // the coefficients of a row that differ from channel to channel
};

}  // namespace resformer::RESFORMER_ISA
