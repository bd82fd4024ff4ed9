// The two products of a decoding block in the order of memory: all heads of a token, then the next token.
// Only this order keeps the hardware prefetcher busy; one head at a time over the block's tokens costs a
// third of the bandwidth. So scores and words of P lie by token, a lane for each row of each head, and a pass
// over the accumulators of all heads serves a few tokens.
//
// With each line that is read, the same line of the next block is prefetched, `ahead` bytes further on.
#pragma once

#include "common/non_temporal.h"
#include "kvcache/tile.h"

namespace resformer::RESFORMER_ISA {

// Tokens (bfloat16: pairs of tokens) whose V one pass over the accumulators adds.
constexpr int kAbreast = 2;

template <class C>
static RESFORMER_INLINE void fetch(const C* at, int64_t ahead) {
  prefetch_line(reinterpret_cast<const char*>(at) + ahead);
}

// sum[r] = q[r] . row for R rows of q (words), lane by lane. W: steps of a row where known
// at compile time, else 0.
template <class M, int R, int W>
static RESFORMER_INLINE void stream_head(const float* q, int64_t words, const typename M::C* row, int64_t dim,
                                         int64_t ahead, Vec* sum) {
  constexpr int kBytes = M::kStep * sizeof(typename M::C);
  const int64_t whole = W ? W : dim / M::kStep;
  if constexpr (W) words = W * kLanes;
  Vec acc[R];
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) acc[r] = zero();
#pragma GCC unroll 8
  for (int64_t w = 0; w < whole; ++w) {
    const Vec k = M::load_row(row + w * M::kStep);
    if (w * kBytes % 64 == 0) fetch(row + w * M::kStep, ahead);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) acc[r] = M::Dot::dot(load(q + r * words + w * kLanes), k, acc[r]);
  }
  if (const int64_t rest = W ? 0 : dim - whole * M::kStep) {
    const Vec k = M::load_row_first(row + whole * M::kStep, rest);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) acc[r] = M::Dot::dot(load(q + r * words + whole * kLanes), k, acc[r]);
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) sum[r] = acc[r];
}

// Scores of one token: R rows of q for each of its heads, to out[head * R + row]. `q` has R rows of `words` a
// head.
template <class M, int R, int W>
static RESFORMER_INLINE void stream_scores(const float* q, int64_t words, const typename M::C* key,
                                           int64_t head_stride, int64_t heads, int64_t dim, int64_t ahead,
                                           float alpha, float* out) {
  constexpr int kHeads = kSums / R;
  if constexpr (W) words = W * kLanes;
  for (; heads >= kHeads; heads -= kHeads, out += kSums) {
    Vec acc[kSums];
#pragma GCC unroll 16
    for (int h = 0; h < kHeads; ++h, q += R * words, key += head_stride)
      stream_head<M, R, W>(q, words, key, dim, ahead, acc + h * R);
    reduce_all(acc, alpha, out);
  }
  if (heads == 0) return;
  Vec acc[kSums];
  for (int i = 0; i < kSums; ++i) acc[i] = zero();
  for (int h = 0; h < heads; ++h, q += R * words, key += head_stride)
    stream_head<M, R, W>(q, words, key, dim, ahead, acc + h * R);
  reduce_all(acc, alpha, out);
}

// A row of V, and the distance in bytes to the row to prefetch.
template <class C>
struct ValueRow {
  const C* at;
  int64_t ahead;
};

// acc += P V for G words of P, each a token or two. p[word * width + head * R + row]; rows: of head 0.
template <class M, int R, int W, int G>
static RESFORMER_INLINE void stream_values(const float* p, int64_t width, const ValueRow<typename M::C>* rows,
                                           int64_t head_stride, int64_t heads, int64_t dim, float* acc,
                                           int64_t acc_row) {
  using C = typename M::C;
  constexpr int kVecs = M::kStep / kLanes, kBytes = M::kStep * sizeof(C), kRows = G * M::Dot::kPack;
  if constexpr (W) acc_row = round_up(W * M::kStep, 2 * kLanes);
  const C* at[kRows];
#pragma GCC unroll 4
  for (int i = 0; i < kRows; ++i) at[i] = rows[i].at;
  for (int64_t h = 0; h < heads; ++h, p += R, acc += R * acc_row) {
    Vec weight[R][G];
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
#pragma GCC unroll 2
      for (int g = 0; g < G; ++g) weight[r][g] = M::Dot::broadcast(p + g * width + r);
    }
    const auto step = [&](int64_t d, int64_t rest) {
      Vec columns[G][kVecs];
#pragma GCC unroll 2
      for (int g = 0; g < G; ++g) M::load_columns(at + g * M::Dot::kPack, d, rest, columns[g]);
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) {
#pragma GCC unroll 2
        for (int v = 0; v < kVecs; ++v) {
          float* out = acc + r * acc_row + d + v * kLanes;
          Vec sum = load(out);
#pragma GCC unroll 2
          for (int g = 0; g < G; ++g) sum = M::Dot::dot(weight[r][g], columns[g][v], sum);
          store(out, sum);
        }
      }
    };
    const auto whole = [&](int64_t d) {
      if (d / M::kStep * kBytes % 64 == 0) {
#pragma GCC unroll 4
        for (int i = 0; i < kRows; ++i) fetch(at[i] + d, rows[i].ahead);
      }
      step(d, 0);
    };
    if constexpr (W) {
#pragma GCC unroll 8
      for (int w = 0; w < W; ++w) whole(w * M::kStep);
    } else {
      int64_t d = 0;
      for (; d + M::kStep <= dim; d += M::kStep) whole(d);
      if (d < dim) step(d, dim - d);
    }
#pragma GCC unroll 4
    for (int i = 0; i < kRows; ++i) at[i] += head_stride;
  }
}

// Calls body with the steps of a row as a constant for the usual head dimensions, else with 0.
template <class M, class Body>
static RESFORMER_INLINE void by_width(int64_t dim, const Body& body) {
  if (dim == 2 * M::kStep) return body(std::integral_constant<int, 2>());
  if (dim == 4 * M::kStep) return body(std::integral_constant<int, 4>());
  if (dim == 8 * M::kStep) return body(std::integral_constant<int, 8>());
  body(std::integral_constant<int, 0>());
}

}  // namespace resformer::RESFORMER_ISA
