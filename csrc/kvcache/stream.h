// The two products of a decoding block in the order of memory: a token's row of every head, then the next
// token's. Only this order keeps the processor's own prefetching at work; taking a head at a time over the
// block's tokens costs a third of the bandwidth. Instead the sums move: scores come out by token and are
// transposed, and the accumulators of all heads are passed through once a token.
#pragma once

#include "kvcache/tile.h"

namespace resformer::RESFORMER_ISA {

// acc[r] = q[r] . row for R rows of q (words), unsummed.
template <class M, int R, class Fetch>
static RESFORMER_INLINE void stream_head(const float* q, int64_t words, const typename M::C* row, int64_t dim,
                                         Vec* acc, const Fetch& fetch) {
  constexpr int kBytes = M::kStep * sizeof(typename M::C);
  const int64_t whole = dim / M::kStep, rest = dim - whole * M::kStep;
  Vec sum[R];
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) sum[r] = zero();
  for (int64_t w = 0; w < whole; ++w) {
    const Vec k = M::load_row(row + w * M::kStep);
    if (w % (64 / kBytes) == 0) fetch();
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) sum[r] = M::Dot::dot(load(q + r * words + w * kLanes), k, sum[r]);
  }
  if (rest) {
    const Vec k = M::load_row_first(row + whole * M::kStep, rest);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) sum[r] = M::Dot::dot(load(q + r * words + whole * kLanes), k, sum[r]);
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) acc[r] = sum[r];
}

// Scores of one token: R rows of q for each of its heads, to out[head * R + row]. `q` has R rows of `words` a
// head. fetch() is called once for every line of K.
template <class M, int R, class Fetch>
static RESFORMER_INLINE void stream_scores(const float* q, int64_t words, const typename M::C* key,
                                           int64_t head_stride, int64_t heads, int64_t dim, float alpha,
                                           float* out, const Fetch& fetch) {
  constexpr int kHeads = kSums / R;
  int64_t first = 0;
  for (; first + kHeads <= heads; first += kHeads) {
    Vec acc[kSums];
#pragma GCC unroll 16
    for (int h = 0; h < kHeads; ++h)
      stream_head<M, R>(q + (first + h) * R * words, words, key + (first + h) * head_stride, dim, acc + h * R,
                        fetch);
    reduce_all(acc, alpha, out + first * R);
  }
  if (first == heads) return;
  Vec acc[kSums];
  for (int i = 0; i < kSums; ++i) acc[i] = zero();
  for (int h = 0; first + h < heads; ++h)
    stream_head<M, R>(q + (first + h) * R * words, words, key + (first + h) * head_stride, dim, acc + h * R,
                      fetch);
  reduce_all(acc, alpha, out + first * R);
}

// acc += P V for one token, or two of them where a word of P holds two. p[(head * R + row) * p_row] is the
// word.
template <class M, int R, class Fetch>
static RESFORMER_INLINE void stream_values(const float* p, int64_t p_row, const typename M::C* const* values,
                                           int64_t offset, int64_t head_stride, int64_t heads, int64_t dim,
                                           float* acc, int64_t acc_row, const Fetch& fetch) {
  constexpr int kVecs = M::kStep / kLanes, kBytes = M::kStep * sizeof(typename M::C);
  for (int64_t h = 0; h < heads; ++h) {
    Vec weight[R];
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) weight[r] = M::Dot::broadcast(p + (h * R + r) * p_row);
    float* sums = acc + h * R * acc_row;
    const typename M::C* rows[M::Dot::kPack];
#pragma GCC unroll 2
    for (int i = 0; i < M::Dot::kPack; ++i) rows[i] = values[i] + offset + h * head_stride;
    const auto step = [&](int64_t d, int64_t rest) {
      Vec columns[kVecs];
      M::load_columns(rows, d, rest, columns);
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) {
#pragma GCC unroll 2
        for (int v = 0; v < kVecs; ++v) {
          float* at = sums + r * acc_row + d + v * kLanes;
          store(at, M::Dot::dot(weight[r], columns[v], load(at)));
        }
      }
    };
    int64_t d = 0;
    for (; d + M::kStep <= dim; d += M::kStep) {
      step(d, 0);
      if (d % (M::kStep * (64 / kBytes)) == 0) {
#pragma GCC unroll 2
        for (int i = 0; i < M::Dot::kPack; ++i) fetch();
      }
    }
    if (d < dim) step(d, dim - d);
  }
}

}  // namespace resformer::RESFORMER_ISA
