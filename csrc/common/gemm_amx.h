// The products of gemm.h on AMX's tile registers: one tile of A, of 16 rows by 16 words, meets a panel of B,
// whose rows of words are what tdpbf16ps calls VNNI order.
//
// An element of C depends on its row of A, its column of B and the order of steps along the summed axis
// alone, whatever tile it is in: forward and backward find the same score bits.
#pragma once

#include "common/amx.h"

namespace resformer::RESFORMER_ISA {

static_assert(kTileRows == amx::kRows && kLanes == amx::kWords && kTileVecs == 4);

struct Bf16Tile {
  static constexpr int kPack = 2;

  // Tiles for the thread that makes it, until it goes: the products below find them configured.
  struct Session {
    Session() { amx::configure(amx::kRows); }
    ~Session() { amx::release(); }
    Session(const Session&) = delete;
    Session& operator=(const Session&) = delete;
  };
};

constexpr int kStep = amx::kWords;  // words that a tile product sums over

template <int vecs>
static inline void zero_tiles() {
  amx::zero<0>();
  if constexpr (vecs > 1) amx::zero<1>();
  if constexpr (vecs > 2) amx::zero<2>();
  if constexpr (vecs > 3) amx::zero<3>();
}

template <int vecs>
static inline void load_tiles(const float* c, int64_t stride) {
  amx::load<0>(c, stride);
  if constexpr (vecs > 1) amx::load<1, kLanes>(c, stride);
  if constexpr (vecs > 2) amx::load<2, 2 * kLanes>(c, stride);
  if constexpr (vecs > 3) amx::load<3, 3 * kLanes>(c, stride);
}

template <int vecs>
static inline void store_tiles(float* c, int64_t stride) {
  amx::store<0>(c, stride);
  if constexpr (vecs > 1) amx::store<1, kLanes>(c, stride);
  if constexpr (vecs > 2) amx::store<2, 2 * kLanes>(c, stride);
  if constexpr (vecs > 3) amx::store<3, 3 * kLanes>(c, stride);
}

// One step along the summed axis, strides in bytes. Loads of B alternate with products, which take twice as
// long.
template <int vecs>
static inline void step_tiles(const float* a, int64_t a_stride, const float* b, int64_t b_stride) {
  using namespace amx;
  amx::load<kA>(a, a_stride);
  amx::load<kB>(b, b_stride);
  dot<0, kA, kB>();
  if constexpr (vecs > 1) {
    amx::load<kB + 1, kLanes>(b, b_stride);
    dot<1, kA, kB + 1>();
  }
  if constexpr (vecs > 2) {
    amx::load<kB + 2, 2 * kLanes>(b, b_stride);
    dot<2, kA, kB + 2>();
  }
  if constexpr (vecs > 3) {
    amx::load<kB, 3 * kLanes>(b, b_stride);
    dot<3, kA, kB>();
  }
}

// A block of up to 16 rows of A as tiles: `steps` whole ones, and the words that are left over beside zeros.
struct TileRows {
  const float* data;     // step s at data + s * step
  int64_t step, stride;  // words, bytes
  int64_t steps, rest;
  alignas(64) float last[amx::kRows * kStep];
  alignas(64) float turned[8 * amx::kRows * kStep];
  static constexpr int64_t kMost = 8 * kStep;  // words that `turned` has room for

  // Rows of words next to each other: read where they lie.
  void read(const float* a, int64_t a_row, int64_t rows, int64_t k) {
    data = a;
    step = kStep;
    stride = a_row * sizeof(float);
    split(k);
    if (rest == 0) return;
    for (int64_t r = 0; r < rows; ++r) {
      resformer::RESFORMER_ISA::store(last + r * kStep, load_first(a + r * a_row + steps * kStep, rest));
    }
  }

  // A transposed A, row r of word k at a[r + k * a_k]: turned block by block, once for all of B's panels.
  void turn(const float* a, int64_t a_k, int64_t rows, int64_t k) {
    data = turned;
    step = amx::kRows * kStep;
    stride = kStep * sizeof(float);
    split(k);
    for (int64_t s = 0; s < steps; ++s) turn_block(a + s * kStep * a_k, a_k, rows, kStep, turned + s * step);
    if (rest > 0) turn_block(a + steps * kStep * a_k, a_k, rows, rest, last);
  }

 private:
  void split(int64_t k) {
    steps = k / kStep;
    rest = k % kStep;
  }

  static void turn_block(const float* a, int64_t a_k, int64_t rows, int64_t count, float* out) {
    alignas(64) float block[amx::kRows * kStep];
    if (rows < amx::kRows || count < kStep) {
      for (int64_t i = 0; i < kStep; ++i) {
        const Vec row = i < count ? load_first(a + i * a_k, rows) : zero();
        resformer::RESFORMER_ISA::store(block + i * kStep, row);
      }
      a = block;
      a_k = kStep;
    }
    transpose_block(reinterpret_cast<const uint32_t*>(a), a_k, reinterpret_cast<uint32_t*>(out), kStep);
  }
};

template <int vecs>
static void score_tile(const TileArgs& t, int64_t rows) {
  const int64_t a_stride = t.a_row * sizeof(float), b_stride = t.b_row * sizeof(float);
  const float *a = t.a, *b = t.b;
  zero_tiles<vecs>();
  for (int64_t k = 0; k < t.k; k += kStep, a += kStep, b += kStep * t.b_row) {
    step_tiles<vecs>(a, a_stride, b, b_stride);
  }
  store_tiles<vecs>(t.c, t.c_row * sizeof(float));
  if (t.alpha == 1.0f) return;
  const Vec alpha = set1(t.alpha);
  for (int64_t r = 0; r < rows; ++r) {
    float* c = t.c + r * t.c_row;
    for (int j = 0; j < vecs; ++j) store(c + j * kLanes, mul(alpha, load(c + j * kLanes)));
  }
}

template <int vecs>
static void sum_tile(const TileRows& a, const float* b, int64_t b_row, float* c, int64_t c_row) {
  const int64_t b_stride = b_row * sizeof(float), a_stride = a.stride, step = a.step, steps = a.steps;
  const float* left = a.data;
  load_tiles<vecs>(c, c_row * sizeof(float));
  for (int64_t s = 0; s < steps; ++s, left += step, b += kStep * b_row) {
    step_tiles<vecs>(left, a_stride, b, b_stride);
  }
  if (a.rest > 0) {
    alignas(64) float rows[kStep * vecs * kLanes];
    for (int64_t i = 0; i < kStep; ++i) {
      for (int j = 0; j < vecs; ++j) {
        store(rows + (i * vecs + j) * kLanes, i < a.rest ? load(b + i * b_row + j * kLanes) : zero());
      }
    }
    step_tiles<vecs>(a.last, kStep * sizeof(float), rows, sizeof(float) * vecs * kLanes);
  }
  store_tiles<vecs>(c, c_row * sizeof(float));
}

static inline void score_tile(const TileArgs& t, int64_t rows, int64_t vecs) {
  switch (vecs) {
    case 1:
      return score_tile<1>(t, rows);
    case 2:
      return score_tile<2>(t, rows);
    case 3:
      return score_tile<3>(t, rows);
    default:
      return score_tile<4>(t, rows);
  }
}

static inline void sum_tile(const TileRows& a, const float* b, int64_t b_row, int64_t vecs, float* c,
                            int64_t c_row) {
  switch (vecs) {
    case 1:
      return sum_tile<1>(a, b, b_row, c, c_row);
    case 2:
      return sum_tile<2>(a, b, b_row, c, c_row);
    case 3:
      return sum_tile<3>(a, b, b_row, c, c_row);
    default:
      return sum_tile<4>(a, b, b_row, c, c_row);
  }
}

// Calls block(first, last) for the whole blocks of 16 rows, then for the rows left over, with tiles that are
// as high.
template <class Block>
static inline void by_tile_height(int64_t rows, const Block& block) {
  const int64_t whole = rows / amx::kRows * amx::kRows;
  block(0, whole);
  if (whole == rows) return;
  amx::configure(rows - whole);
  block(whole, rows);
  amx::configure(amx::kRows);
}

// As in gemm.h. Rows of A and B's panels reach to a whole step of words, with zeros past k: row_words().
template <class Dot>
  requires(__is_same(Dot, Bf16Tile))
static void gemm_scores(const float* a, int64_t a_row, const Columns& b, int64_t k, int64_t rows,
                        const Span* spans, float alpha, float* c, int64_t c_row) {
  by_tile_height(rows, [&](int64_t begin, int64_t end) {
    for (int64_t first = 0; first < b.columns; first += kPanel) {
      const int64_t width = smaller(kPanel, b.columns - first), row = b.row ? b.row : width;
      const float* panel = b.data + first / kPanel * b.panel_stride;
      for (int64_t r = begin; r < end; r += kTileRows) {
        const Span span = spans[r / kTileRows];
        const int64_t lo = larger(span.lo, first) - first, hi = smaller(span.hi, first + width) - first;
        if (lo >= hi) continue;
        const int64_t from = lo / kLanes, vecs = (hi + kLanes - 1) / kLanes - from;
        score_tile({a + r * a_row, a_row, 1, panel + from * kLanes, row, k,
                    c + r * c_row + first + from * kLanes, c_row, alpha},
                   smaller(kTileRows, end - r), vecs);
      }
    }
  });
}

// As in gemm.h, with a_row or a_k 1. An A that is read where it lies meets one panel at a time, which stays
// in the first-level cache; one that is turned meets them all.
template <class Dot>
  requires(__is_same(Dot, Bf16Tile))
static void gemm_accumulate(const float* a, int64_t a_row, int64_t a_k, const Columns& b, int64_t rows,
                            const Span* spans, float* c, int64_t c_row) {
  TileRows left;
  const int64_t group = a_k == 1 ? kPanel : b.columns;
  by_tile_height(rows, [&](int64_t begin, int64_t end) {
    for (int64_t start = 0; start < b.columns; start += group) {
      for (int64_t r = begin; r < end; r += kTileRows) {
        for (int64_t lo = spans[r / kTileRows].lo; lo < spans[r / kTileRows].hi; lo += TileRows::kMost) {
          const int64_t k = smaller(TileRows::kMost, spans[r / kTileRows].hi - lo),
                        height = smaller(kTileRows, end - r);
          const float* at = a + r * a_row + lo * a_k;
          if (a_k == 1) {
            left.read(at, a_row, height, k);
          } else {
            left.turn(at, a_k, height, k);
          }
          for (int64_t first = start; first < smaller(start + group, b.columns); first += kPanel) {
            const int64_t width = smaller(kPanel, b.columns - first), row = b.row ? b.row : width;
            const float* panel = b.data + first / kPanel * b.panel_stride;
            sum_tile(left, panel + lo * row, row, width / kLanes, c + r * c_row + first, c_row);
          }
        }
      }
    }
  });
}

}  // namespace resformer::RESFORMER_ISA
