// W h for some rows and one or two panels of units: the register tiles, and products with sparse weights.
#pragma once

#include "common/simd.h"
#include "reservoir/reservoir.h"

namespace resformer::RESFORMER_ISA {

constexpr int64_t kPanel = kTileVecs * kLanes;
// Length of partial sums: that much of a panel stays in the first-level cache, and short sums round less.
constexpr int64_t kBlock = 64;
constexpr int kWideRows = 2;  // up to this many rows take two panels at once, for enough independent chains

static inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

static inline float to_scalar(float x) { return x; }
static inline float to_scalar(bf16 x) { return to_float(x); }

static inline float fma(float a, float b, float c) {
#if defined(__FMA__)
  return __builtin_fmaf(a, b, c);
#else
  return a * b + c;
#endif
}

// c (+)= a b for `rows` rows and `panels` panels of `vecs` vectors; sums over k in order, in one chain each.
// The number of rows chooses the instance, and changes nothing else.
template <class E, int rows, int panels, int vecs>
static void product_tile(const float* const* a, int64_t at, const E* b, int64_t panel_stride, int64_t k,
                         float* c, int64_t c_row, bool accumulate) {
  constexpr int all = panels * vecs;
  Vec sum[rows][all];
  const float* x[rows];
#pragma GCC unroll 8
  for (int i = 0; i < rows; ++i) {
    x[i] = a[i] + at;
#pragma GCC unroll 8
    for (int j = 0; j < all; ++j) sum[i][j] = zero();
  }
  for (int64_t step = 0; step < k; ++step, b += vecs * kLanes) {
    Vec column[all];
#pragma GCC unroll 8
    for (int j = 0; j < all; ++j) column[j] = load(b + j / vecs * panel_stride + j % vecs * kLanes);
#pragma GCC unroll 8
    for (int i = 0; i < rows; ++i) {
      const Vec value = set1(x[i][step]);
#pragma GCC unroll 8
      for (int j = 0; j < all; ++j) sum[i][j] = fma(value, column[j], sum[i][j]);
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < rows; ++i) {
#pragma GCC unroll 8
    for (int j = 0; j < all; ++j) {
      float* at_j = c + i * c_row + j * kLanes;
      store(at_j, accumulate ? add(load(at_j), sum[i][j]) : sum[i][j]);
    }
  }
}

template <class E>
using ProductTile = void (*)(const float* const*, int64_t, const E*, int64_t, int64_t, float*, int64_t, bool);

template <class E, int vecs>
static ProductTile<E> tile_of_vecs(int64_t rows, bool pair) {
  if (pair) return rows == 1 ? product_tile<E, 1, 2, vecs> : product_tile<E, 2, 2, vecs>;
  switch (rows) {
    case 1:
      return product_tile<E, 1, 1, vecs>;
    case 2:
      return product_tile<E, 2, 1, vecs>;
    case 3:
      return product_tile<E, 3, 1, vecs>;
    case 4:
      return product_tile<E, 4, 1, vecs>;
#if !defined(RESFORMER_ISA_PORTABLE)
    case 5:
      return product_tile<E, 5, 1, vecs>;
    case 6:
      return product_tile<E, 6, 1, vecs>;
#endif
    default:
      return nullptr;
  }
}

// `pair`: two whole panels.
template <class E>
static ProductTile<E> tile_for(int64_t rows, int64_t vecs, bool pair) {
  switch (vecs) {
    case 1:
      return tile_of_vecs<E, 1>(rows, false);
#if defined(RESFORMER_ISA_AVX512) || defined(RESFORMER_ISA_AVX512_BF16)
    case 3:
      return tile_of_vecs<E, 3>(rows, false);
    case 4:
      return tile_of_vecs<E, 4>(rows, pair);
    default:
      return tile_of_vecs<E, 2>(rows, false);
#else
    default:
      return tile_of_vecs<E, 2>(rows, pair);
#endif
  }
}

// z[i][0 .. width) (+)= the product of row i's `k` values from a[i] with a packed panel, or two.
template <class E>
static void multiply(const float* const* a, int64_t count, const E* packed, int64_t k, int64_t width,
                     bool pair, float* z, int64_t z_row, bool accumulate) {
  const int64_t vecs = width / kLanes, panel_stride = k * width;
  for (int64_t from = 0; from < k; from += kBlock) {
    const int64_t length = least(kBlock, k - from);
    const E* b = packed + from * width;
    for (int64_t i = 0; i < count; i += kTileRows) {
      const int64_t rows = least(kTileRows, count - i);
      tile_for<E>(rows, vecs, pair)(a + i, from, b, panel_stride, length, z + i * z_row, z_row,
                                    accumulate || from > 0);
    }
  }
}

// Sums of a CSR weight, four units at a time: one unit's additions wait for each other. `term(i, sum)` adds
// entry i.
template <class Sum, class Term, class Put>
static inline void sum_sparse(const int64_t* rows, int64_t begin, int64_t end, Sum nothing, const Term& term,
                              const Put& put) {
  int64_t unit = begin;
  for (; unit + 4 <= end; unit += 4) {
    const int64_t* starts = rows + unit;
    int64_t shortest = starts[1] - starts[0];
    for (int j = 1; j < 4; ++j) shortest = least(shortest, starts[j + 1] - starts[j]);
    Sum sum[4] = {nothing, nothing, nothing, nothing};
    for (int64_t i = 0; i < shortest; ++i) {
#pragma GCC unroll 4
      for (int j = 0; j < 4; ++j) sum[j] = term(starts[j] + i, sum[j]);
    }
    for (int j = 0; j < 4; ++j) {
      for (int64_t i = starts[j] + shortest; i < starts[j + 1]; ++i) sum[j] = term(i, sum[j]);
      put(unit + j, sum[j]);
    }
  }
  for (; unit < end; ++unit) {
    Sum sum = nothing;
    for (int64_t i = rows[unit]; i < rows[unit + 1]; ++i) sum = term(i, sum);
    put(unit, sum);
  }
}

// turned[unit * kLanes + i] = a[i][unit] for `count` rows, at most kLanes; further lanes repeat the last row.
static inline void turn(const float* const* a, int64_t count, int64_t width, float* turned) {
  float block[kLanes * kLanes];
  for (int64_t at = 0; at < width; at += kLanes) {
    for (int64_t i = 0; i < kLanes; ++i) store(block + i * kLanes, load(a[least(i, count - 1)] + at));
    transpose_block(reinterpret_cast<const uint32_t*>(block), kLanes,
                    reinterpret_cast<uint32_t*>(turned + at * kLanes), kLanes);
  }
}

}  // namespace resformer::RESFORMER_ISA
