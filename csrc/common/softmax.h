// The online softmax over rows of scores, masked by position.
#pragma once

#include "common/gemm.h"

namespace resformer::RESFORMER_ISA {

constexpr float kLog2e = 1.44269504088896341f;
constexpr double kLn2 = 0.693147180559945309;
constexpr float kMinusInf = -__builtin_inff();

// The running maximum moves only when a score exceeds it by this much: softmax does not depend on the shift,
// float32 has room for its exponential, and most tiles then need neither a horizontal maximum nor a rescaled
// accumulator.
constexpr float kSlack = 8.0f;

// The unit that scores are kept in. For 16-bit inputs it is log2: the factor log2(e) is folded into the scale
// and exp is exp2. float32 keeps natural scores and pays a multiplication, because a rounded factor is an
// error of every score, and because a row with one key must find P = exp(s - LSE) = 1 again.
template <Precision precision>
struct Scores {
  static constexpr bool kNatural = precision == Precision::full;
  static constexpr float kUnit = kNatural ? 1.0f : kLog2e;

  static inline Vec exp(Vec x) {
    if constexpr (kNatural) x = mul(x, set1(kLog2e));
    return exp2<precision>(x);
  }
  static inline float exp(float x) {
    alignas(64) float lanes[kLanes];
    store(lanes, exp(set1(x)));
    return lanes[0];
  }
  // Natural log of a softmax's denominator, whose maximum is m and sum l. In float64: backward takes exp of
  // this, where a rounding error is one of every probability of the row.
  static inline float lse(float m, float l) {
    if constexpr (kNatural) return static_cast<float>(m + __builtin_log(static_cast<double>(l)));
    return static_cast<float>((m + __builtin_log2(static_cast<double>(l))) * kLn2);
  }
};

// A row's softmax whose keys have all been seen: `factor` normalises its sum, 0 where it saw nothing, and
// `lse` is natural. A sink, natural too, joins the denominator; it may be too low for the unit of scores, so
// an empty row's LSE is the sink itself.
struct ClosedRow {
  float factor, lse;
};

template <class Unit>
static inline ClosedRow close_row(float m, float l, const float* sink, bool wants_lse) {
  float weight = 1.0f;
  if (sink) {
    const float score = *sink * Unit::kUnit, top = score > m ? score : m;
    weight = m == kMinusInf ? 1.0f : Unit::exp(m - top);
    l = l * weight + (score == kMinusInf ? 0.0f : Unit::exp(score - top));
    m = top;
  }
  if (l == 0.0f) return {0.0f, sink ? *sink : kMinusInf};
  return {weight / l, wants_lse ? Unit::lse(m, l) : 0.0f};
}

static inline int64_t lane_floor(int64_t column) { return column / kLanes * kLanes; }
static inline int64_t lane_ceil(int64_t column) { return round_up(column, kLanes); }

// -inf in the columns of [from, to) outside each row's [lo, hi), for rows whose bounds ascend. By whole
// vectors: they are loaded again at once, and a vector load from under a narrower store waits for memory.
template <int rows>
static inline void mask_rows(float* s, int64_t stride, int64_t from, int64_t to, const int64_t* lo,
                             const int64_t* hi, int64_t key) {
  if (lo[rows - 1] - key <= from && hi[0] - key >= to) return;
  int32_t begin[rows], end[rows];
  for (int i = 0; i < rows; ++i) {
    begin[i] = static_cast<int32_t>(smaller(larger(lo[i] - key, from), to));
    end[i] = static_cast<int32_t>(smaller(larger(hi[i] - key, from), to));
  }
  const auto mask = [&](int32_t c) {
    for (int i = 0; i < rows; ++i) {
      float* at = s + i * stride + c;
      store(at, keep_lanes(load(at), begin[i] - c, end[i] - c, set1(kMinusInf)));
    }
  };
  int32_t c = static_cast<int32_t>(from);
  for (; c < begin[rows - 1]; c += kLanes) mask(c);
  const int32_t last = static_cast<int32_t>(lane_floor(end[0]));
  for (c = c > last ? c : last; c < to; c += kLanes) mask(c);
}

// Running softmax state of one row: maximum (in the unit of scores) and lane-wise partial sums.
struct RowState {
  float m;
  alignas(64) float l[kLanes];
};

// How many rows the softmax takes abreast: their maxima, sums and bases stay in registers, and a short span
// costs its loop's mispredicted end once for all of them.
constexpr int kRowsAbreast = kTileRows == 16 ? 4 : kTileVecs == 4 ? 6 : kTileRows == 6 ? 3 : 2;
static_assert(kTileRows % kRowsAbreast == 0);

// Turns the scores s[from, to) of some rows into probabilities (in place, as words of Dot), with columns
// outside each row's keys [lo, hi) masked.
template <class Dot, Precision precision, int rows>
static inline void softmax_rows(float* s, int64_t stride, int64_t from, int64_t to, const int64_t* lo,
                                const int64_t* hi, int64_t key, RowState* state, float* acc,
                                int64_t columns) {
  mask_rows<rows>(s, stride, from, to, lo, hi, key);
  Vec top[rows], sum[rows], base[rows];
#pragma GCC unroll 6
  for (int i = 0; i < rows; ++i) top[i] = load(s + i * stride + from);
  for (int64_t c = from + kLanes; c < to; c += kLanes) {
#pragma GCC unroll 6
    for (int i = 0; i < rows; ++i) top[i] = max(top[i], load(s + i * stride + c));
  }
  for (int i = 0; i < rows; ++i) {
    RowState& row = state[i];
    if (any_greater(top[i], set1(row.m + kSlack))) {
      const float m = reduce_max(top[i]);
      if (row.m != kMinusInf) {
        const Vec shrink = set1(Scores<precision>::exp(row.m - m));
        store(row.l, mul(load(row.l), shrink));
        float* out = acc + i * columns;
        for (int64_t d = 0; d < columns; d += kLanes) store(out + d, mul(load(out + d), shrink));
      }
      row.m = m;
    }
    base[i] = set1(row.m == kMinusInf ? 0.0f : row.m);
    sum[i] = load(row.l);
  }
  for (int64_t c = from; c < to; c += kLanes) {
#pragma GCC unroll 6
    for (int i = 0; i < rows; ++i) {
      float* at = s + i * stride;
      const Vec p = Scores<precision>::exp(sub(load(at + c), base[i]));
      sum[i] = add(sum[i], p);
      if constexpr (Dot::kPack == 2) {
        store(reinterpret_cast<bf16*>(at) + c, p);
      } else {
        store(at + c, p);
      }
    }
  }
  for (int i = 0; i < rows; ++i) store(state[i].l, sum[i]);
}

}  // namespace resformer::RESFORMER_ISA
