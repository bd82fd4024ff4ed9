// The register tile behind every matrix product of the CPU kernels: C (+)= A B with B's columns in vectors.
//
// Operands are 32-bit words. A word is one float32, or two bfloat16 that lie next to each other along the
// summed axis (vdpbf16ps multiplies both), so one tile serves float32 and packed bfloat16. A is read by
// broadcast at any strides, which makes a transposed A free; B is read in rows of `vecs` vectors.
#pragma once

#include "common/simd.h"

namespace resformer::RESFORMER_ISA {

// What a thread holds while it multiplies: tile registers, where a product has any.
struct NoSession {};

struct F32 {
  static constexpr int kPack = 1;
  using Session = NoSession;
  static inline Vec broadcast(const float* p) { return set1(*p); }
  static inline Vec dot(Vec a, Vec b, Vec c) { return fma(a, b, c); }
};

#if defined(RESFORMER_ISA_AVX512_BF16)
struct Bf16Pair {
  static constexpr int kPack = 2;
  using Session = NoSession;
  static inline Vec broadcast(const float* p) { return set1(*p); }
  static inline Vec dot(Vec a, Vec b, Vec c) {
    return _mm512_dpbf16_ps(c, reinterpret_cast<__m512bh>(a), reinterpret_cast<__m512bh>(b));
  }
};
#endif

struct TileArgs {
  const float* a;  // word (row, k) at a[row * a_row + k * a_k]
  int64_t a_row, a_k;
  const float* b;  // row k of the tile's columns at b + k * b_row
  int64_t b_row;
  int64_t k;  // words to sum over
  float* c;   // row-major float32
  int64_t c_row;
  float alpha;  // C = alpha * A B, where the tile does not accumulate
};

// A small tile leaves registers over: it sums in several chains, against the latency of a multiply-add and
// for a smaller rounding error.
constexpr int chains_of(int rows, int vecs) {
  const int fit = kTileRows * kTileVecs / (rows * vecs);
  return fit >= 4 ? 4 : fit >= 2 ? 2 : 1;
}

template <class Dot, int rows, int vecs>
static inline void tile_step(const float* a, int64_t a_row, const float* b, Vec (&acc)[rows][vecs]) {
  Vec column[vecs];
#pragma GCC unroll 4
  for (int j = 0; j < vecs; ++j) column[j] = load(b + j * kLanes);
#pragma GCC unroll 8
  for (int i = 0; i < rows; ++i) {
    const Vec x = Dot::broadcast(a + i * a_row);
#pragma GCC unroll 4
    for (int j = 0; j < vecs; ++j) acc[i][j] = Dot::dot(x, column[j], acc[i][j]);
  }
}

template <class Dot, int rows, int vecs, bool accumulate>
static void tile(const TileArgs& t) {
  // For scores by rows alone: forward and backward split the keys into different tiles and must find the same
  // bits.
  constexpr int chains = chains_of(rows, accumulate ? vecs : kTileVecs);
  Vec acc[chains][rows][vecs];
#pragma GCC unroll 4
  for (int s = 0; s < chains; ++s) {
#pragma GCC unroll 8
    for (int i = 0; i < rows; ++i) {
#pragma GCC unroll 4
      for (int j = 0; j < vecs; ++j) acc[s][i][j] = zero();
    }
  }
  const float *a = t.a, *b = t.b;
  const int64_t a_row = t.a_row, a_k = t.a_k, b_row = t.b_row;
  int64_t k = t.k;
  for (; k >= chains; k -= chains) {
#pragma GCC unroll 4
    for (int s = 0; s < chains; ++s) {
      tile_step<Dot, rows, vecs>(a, a_row, b, acc[s]);
      a += a_k;
      b += b_row;
    }
  }
  if constexpr (chains > 1) {
    for (; k > 0; --k, a += a_k, b += b_row) tile_step<Dot, rows, vecs>(a, a_row, b, acc[0]);
#pragma GCC unroll 2
    for (int half = chains / 2; half > 0; half /= 2) {
#pragma GCC unroll 2
      for (int s = 0; s < half; ++s) {
#pragma GCC unroll 8
        for (int i = 0; i < rows; ++i) {
#pragma GCC unroll 4
          for (int j = 0; j < vecs; ++j) acc[s][i][j] = add(acc[s][i][j], acc[s + half][i][j]);
        }
      }
    }
  }
  float* c = t.c;
  const int64_t c_row = t.c_row;
  const Vec alpha = set1(t.alpha);
#pragma GCC unroll 8
  for (int i = 0; i < rows; ++i, c += c_row) {
#pragma GCC unroll 4
    for (int j = 0; j < vecs; ++j) {
      if constexpr (accumulate) {
        store(c + j * kLanes, add(load(c + j * kLanes), acc[0][i][j]));
      } else {
        store(c + j * kLanes, mul(alpha, acc[0][i][j]));
      }
    }
  }
}

using TileFn = void (*)(const TileArgs&);

template <class Dot, bool accumulate, int vecs>
static TileFn tile_of_rows(int64_t rows) {
  switch (rows) {
    case 1:
      return tile<Dot, 1, vecs, accumulate>;
    case 2:
      return tile<Dot, 2, vecs, accumulate>;
    case 3:
      return tile<Dot, 3, vecs, accumulate>;
#if defined(RESFORMER_ISA_PORTABLE)
    default:
      return tile<Dot, 4, vecs, accumulate>;
#else
    case 4:
      return tile<Dot, 4, vecs, accumulate>;
    case 5:
      return tile<Dot, 5, vecs, accumulate>;
    default:
      return tile<Dot, 6, vecs, accumulate>;
#endif
  }
}

template <class Dot, bool accumulate>
static TileFn tile_of(int64_t rows, int64_t vecs) {
  switch (vecs) {
    case 1:
      return tile_of_rows<Dot, accumulate, 1>(rows);
#if defined(RESFORMER_ISA_AVX512) || defined(RESFORMER_ISA_AVX512_BF16)
    case 3:
      return tile_of_rows<Dot, accumulate, 3>(rows);
    case 4:
      return tile_of_rows<Dot, accumulate, 4>(rows);
#endif
    default:
      return tile_of_rows<Dot, accumulate, 2>(rows);
  }
}

// A panel is what one tile is wide: B's columns come in panels, the last one narrower.
constexpr int64_t kPanel = kTileVecs * kLanes;

static inline int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }
static inline int64_t round_up(int64_t x, int64_t to) { return (x + to - 1) / to * to; }

// B of shape (k, columns) as tiles read it: panel p starts at data + p * panel_stride, its row k at + k * row
// (or, for packed panels, whose rows are as wide as the panel itself, row == 0).
struct Columns {
  const float* data;
  int64_t columns;  // a multiple of kLanes
  int64_t panel_stride;
  int64_t row;
};

static inline Columns packed_panels(const float* data, int64_t k, int64_t columns) {
  return {data, columns, k * kPanel, 0};
}
static inline Columns row_major(const float* data, int64_t columns) {
  return {data, columns, kPanel, columns};
}

// Range of a block of kTileRows rows: [lo, hi) are columns of B (scores) or indices of the summed axis.
struct Span {
  int32_t lo, hi;
};

// C[rows, columns] = alpha * A B, only the tiles that meet a block's span of columns.
template <class Dot>
static void gemm_scores(const float* a, int64_t a_row, const Columns& b, int64_t k, int64_t rows,
                        const Span* spans, float alpha, float* c, int64_t c_row) {
  for (int64_t first = 0; first < b.columns; first += kPanel) {
    const int64_t width = smaller(kPanel, b.columns - first);
    const float* panel = b.data + first / kPanel * b.panel_stride;
    const int64_t row = b.row ? b.row : width;
    for (int64_t r = 0; r < rows; r += kTileRows) {
      const Span span = spans[r / kTileRows];
      const int64_t lo = larger(span.lo, first) - first, hi = smaller(span.hi, first + width) - first;
      if (lo >= hi) continue;
      const int64_t from = lo / kLanes, vecs = (hi + kLanes - 1) / kLanes - from;
      const int64_t tile_rows = smaller(kTileRows, rows - r);
      tile_of<Dot, false>(tile_rows, vecs)({a + r * a_row, a_row, 1, panel + from * kLanes, row, k,
                                            c + r * c_row + first + from * kLanes, c_row, alpha});
    }
  }
}

// C[rows, columns] += A B, each block summing over its own span of k (in words).
template <class Dot>
static void gemm_accumulate(const float* a, int64_t a_row, int64_t a_k, const Columns& b, int64_t rows,
                            const Span* spans, float* c, int64_t c_row) {
  for (int64_t first = 0; first < b.columns; first += kPanel) {
    const int64_t width = smaller(kPanel, b.columns - first);
    const float* panel = b.data + first / kPanel * b.panel_stride;
    const int64_t row = b.row ? b.row : width;
    for (int64_t r = 0; r < rows; r += kTileRows) {
      const Span span = spans[r / kTileRows];
      if (span.lo >= span.hi) continue;
      tile_of<Dot, true>(smaller(kTileRows, rows - r),
                         width / kLanes)({a + r * a_row + span.lo * a_k, a_row, a_k, panel + span.lo * row,
                                          row, span.hi - span.lo, c + r * c_row + first, c_row, 1.0f});
    }
  }
}

}  // namespace resformer::RESFORMER_ISA

#if defined(RESFORMER_ISA_AVX512_AMX)
#include "common/gemm_amx.h"
#endif
