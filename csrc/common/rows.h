// Rows of a tensor to rows of words (see gemm.h), and back.
#pragma once

#include "common/coefficients.h"
#include "common/gemm.h"

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

template <class T>
static inline void widen_row(const T* src, int64_t dim, float* out) {
  pack_row<F32>(src, dim, out);
}

// The row of a coefficient at `offset`, a number for each channel.
static inline void coefficient_row(const Coefficient& c, int64_t offset, int64_t dim, float* out) {
  if (c.data == nullptr || c.stride[3] != 1) {
    for (int64_t d = 0; d < dim; ++d) out[d] = c.data ? c.load(offset + d * c.stride[3]) : c.value;
    for (int64_t d = dim; d < round_up(dim, kLanes); ++d) out[d] = 0.0f;
  } else if (c.dtype == DType::bfloat16) {
    widen_row(static_cast<const bf16*>(c.data) + offset, dim, out);
  } else if (c.dtype == DType::float16) {
    widen_row(static_cast<const f16*>(c.data) + offset, dim, out);
  } else {
    widen_row(static_cast<const float*>(c.data) + offset, dim, out);
  }
}

// `count` rows of words to columns [at, at + kLanes) of a tile's packed panels; missing rows are zero.
static inline void pack_transposed(const float* rows, int64_t row_stride, int64_t count, int64_t words,
                                   int64_t at, int64_t columns, float* panels) {
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

static inline void prefetch_row(const void* row, int64_t bytes) {
  for (int64_t at = 0; at < bytes; at += 64) __builtin_prefetch(static_cast<const char*>(row) + at);
}

// A row of float32 sums, times a factor, in the tensor's dtype.
template <class T>
static inline void scale_row(const float* src, float factor, int64_t dim, T* out) {
  int64_t d = 0;
  for (; d + kLanes <= dim; d += kLanes) store(out + d, mul(load(src + d), set1(factor)));
  for (; d < dim; ++d) out[d] = from_float<T>(src[d] * factor);
}

// sum += factor * row
template <class T>
static inline void add_row(float factor, const T* row, int64_t dim, float* sum) {
  const Vec x = set1(factor);
  int64_t d = 0;
  for (; d + kLanes <= dim; d += kLanes) store(sum + d, fma(x, load(row + d), load(sum + d)));
  for (; d < dim; ++d) sum[d] += factor * to_float(row[d]);
}

}  // namespace resformer::RESFORMER_ISA
