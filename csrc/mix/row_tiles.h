// Iteration of the mix kernels over their operands: rows in order, each in tiles of whole vectors, with rows
// further on prefetched.
#pragma once

#include "common/non_temporal.h"
#include "mix/mix.h"

namespace resformer::RESFORMER_ISA {
namespace {

constexpr int64_t kTile = 512;  // elements of a row that are processed at a time

// body(d, load, store) for each vector, and once for the tail. STREAM: whole vectors are written with
// non-temporal stores.
template <bool STREAM = false, class Body>
RESFORMER_INLINE void for_vectors(int64_t n, const Body& body) {
  int64_t d = 0;
  for (; d + kLanes <= n; d += kLanes) {
    body(
        d, [](const auto* p) __attribute__((always_inline)) { return load(p); },
        [](auto* p, Vec x) __attribute__((always_inline)) {
          if constexpr (STREAM) {
            stream(p, x);
          } else {
            store(p, x);
          }
        });
  }
  if (d < n) {
    const int64_t rest = n - d;
    body(
        d, [rest](const auto* p) { return load_first(p, rest); },
        [rest](auto* p, Vec x) { store_first(p, x, rest); });
  }
}

// Coefficients over a tile: `weights` where they differ along it, else `weight`.
struct Weights {
  const float* weights;
  float weight;
};

template <class T>
void widen(const T* from, int64_t n, float* to) {
  for_vectors(n, [&](int64_t d, auto get, auto put) { put(to + d, get(from + d)); });
}

Weights coefficients_of(const Coefficient& c, int64_t row, int64_t d, int64_t n, float* buffer) {
  if (c.data == nullptr) return {nullptr, c.value};
  const int64_t start = row + d * c.stride[3];
  if (c.stride[3] == 0) return {nullptr, c.load(start)};
  if (c.stride[3] != 1) {
    for (int64_t i = 0; i < n; ++i) buffer[i] = c.load(start + i * c.stride[3]);
    return {buffer, 0.0f};
  }
  if (c.dtype == DType::float32) return {static_cast<const float*>(c.data) + start, 0.0f};
  if (c.dtype == DType::bfloat16) {
    widen(static_cast<const bf16*>(c.data) + start, n, buffer);
  } else {
    widen(static_cast<const f16*>(c.data) + start, n, buffer);
  }
  return {buffer, 0.0f};
}

struct Place {
  int64_t row, b, t;
};

Place place_of(const MixShape& shape, int64_t row) { return {row, row / shape.time, row % shape.time}; }

// A tile of row `now`; the same tile of row `later` is prefetched.
struct Position {
  Place now, later;
  int64_t h, d, n;
};

template <class T>
struct Operand {
  const T* now;
  const T* later;

  RESFORMER_INLINE void prefetch(int64_t d) const { prefetch_line(later + d); }
};

template <class T>
Operand<T> operand_at(const MixSource& source, const Position& p) {
  const T* data = static_cast<const T*>(source.data) + p.d;
  return {data + source.offset(p.now.b, p.now.t, p.now.row, p.h),
          data + source.offset(p.later.b, p.later.t, p.later.row, p.h)};
}

// An operand that is in the first-level cache already.
template <class T>
Operand<T> cached(const T* p) {
  return {p, p};
}

Weights coefficients_of(const MixSource& source, const Position& p, float* buffer) {
  return coefficients_of(source.coefficient, source.coefficient.row(p.now.b, p.now.t, p.h), p.d, p.n, buffer);
}

// body(position) for each tile of each head of a row of T.
template <class T, class Body>
void for_tiles(const MixShape& shape, int64_t row, const Body& body) {
  const int64_t width = shape.heads * shape.dim * static_cast<int64_t>(sizeof(T));
  const int64_t ahead = kPrefetchBytes / width < 1 ? 1 : kPrefetchBytes / width;
  const Place now = place_of(shape, row), later = place_of(shape, smaller(row + ahead, shape.rows() - 1));
  for (int64_t h = 0; h < shape.heads; ++h) {
    for (int64_t d = 0; d < shape.dim; d += kTile)
      body(Position{now, later, h, d, smaller(kTile, shape.dim - d)});
  }
}

}  // namespace
}  // namespace resformer::RESFORMER_ISA
